"""Under every strategy and precision, each step is that of one process which sees all batches and whole gradients."""

import math
from itertools import product

import pytest
import torch

from lightning_znorm.gradients import UnsupportedGradientError
from tests.gradients.reference import wide
from tests.large_steps import LARGE_STEPS
from tests.strategies.conftest import Runs
from tests.strategies.reference import (
    METHODS,
    check,
    gradients,
    mean_gradients,
    moved_by_rounding,
    rate,
    tolerance,
    updates,
)
from tests.strategies.scenarios import DEFAULT, PRODUCT, SCENARIOS, STRATEGIES, Scenario, name_of, selected
from tests.strategies.support import PRECISIONS, SUPPORT
from tests.strategies.training import CALLBACKS, LEARNING_RATE, MOMENTUM, STEPS


def trained(name: str, scenario: Scenario) -> bool:
    """Whether the scenario trains all of its only epoch."""
    return scenario.resumes is None and scenario.refused is None and scenario.epochs == 1


def works(strategy: str, precision: str) -> bool:
    """Whether the README's table says that a strategy works with a precision."""
    return SUPPORT[STRATEGIES[strategy].kind][precision].works and not (strategy == "zero0" and precision[:2] == "16")


def test_default_tier_has_each_pair() -> None:
    """Pairs of strategy, precision, number of accumulated batches and optimizer, if they can be combined."""
    rows = [row for row in PRODUCT if name_of(row) in DEFAULT]
    assert {row[:2] for row in rows} == {pair for pair in product(STRATEGIES, PRECISIONS) if works(*pair)}
    assert {(row[0], row[2]) for row in rows} == set(product(STRATEGIES, (1, 4)))
    optimizers = {"SGD", "momentum", "fused", "manual"}
    of_dtensors = {"fsdp2", "tp", "fsdp2-tp"}
    assert {(row[0], row[3]) for row in rows} == {
        pair for pair in product(STRATEGIES, optimizers) if not (pair[0] in of_dtensors and pair[1] == "fused")
    }
    assert {row[1:3] for row in rows} == set(product(PRECISIONS, (1, 4)))
    assert {(row[1], row[3]) for row in rows} == set(product(PRECISIONS, optimizers))
    assert {row[2:] for row in rows} == set(product((1, 4), optimizers)) - {(4, "manual")}
    assert len(rows) < len(PRODUCT) / 5


@pytest.mark.parametrize("name", selected(trained))
def test_steps_are_those_of_one_process(runs: Runs, name: str) -> None:
    check(name, SCENARIOS[name], runs(name)[0])


@pytest.mark.parametrize("name", selected(lambda name, scenario: scenario.processes > 1))
def test_weights_are_identical_in_all_processes(runs: Runs, name: str) -> None:
    first, *others = runs(name)
    for other in others:
        for ours, theirs in zip(first["weights"], other["weights"], strict=True):
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name", selected(trained))
def test_only_what_has_gradients_moves(runs: Runs, name: str) -> None:
    scenario = SCENARIOS[name]
    first, *_, last = runs(name)[0]["weights"]
    stay = {"frozen.weight", "frozen.bias", *(["unused"] if "unused" in first else []), *scenario.frozen}
    assert {key for key in first if torch.equal(first[key], last[key])} == stay


@pytest.mark.parametrize("name", selected(lambda name, scenario: scenario.overflowing_batch is not None))
def test_overflow_in_one_process_skips_the_step_in_all(runs: Runs, name: str) -> None:
    scenario = SCENARIOS[name]
    batch, every = scenario.overflowing_batch, scenario.accumulate
    start = batch // every * every
    found = runs(name)
    for run in found:
        before, after = run["weights"][start], run["weights"][start + every]
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert run["scales"][start + every] == run["scales"][start] / (1 if has_constant_scale(scenario) else 2)
        assert not torch.equal(after["conv.weight"], run["weights"][-1]["conv.weight"])
    if "large_scale" in name:
        # No other step is skipped, although scaled z-scores are beyond the range of float16.
        assert found[0]["scales"] == [2.0**16, 2.0**16, 2.0**15, 2.0**15]
    if scenario.kind == "DeepSpeed":  # which keeps gradients elsewhere
        return
    # The scenario is what it says: where gradients are sharded, inf is in the last parameter's shard, or in all; DDP
    # does not average before the last batch of a step.
    sharded = scenario.kind == "FSDP" and "no_shard" not in name
    last_only = scenario.overflowing == "last parameter" and (sharded or (batch + 1) % every != 0)
    shards = 2  # also of four processes, under hybrid sharding
    for rank, run in enumerate(found):
        assert run["infinite"][batch] == (not last_only or rank % shards == shards - 1)
        assert not any(run["infinite"][:batch])


def has_constant_scale(scenario: Scenario) -> bool:
    return scenario.kind == "DeepSpeed" and scenario.strategy(1, "cpu").config.get("fp16", {}).get("loss_scale") != 0


@pytest.mark.parametrize("name", selected(lambda name, scenario: scenario.monitored))
def test_monitor_shows_whole_true_gradients(runs: Runs, name: str) -> None:
    scenario = SCENARIOS[name]
    first, *others = runs(name)
    shown = [{key: value for key, value in step.items() if key.startswith("grad")} for step in first["metrics"]]
    for run in others:
        for ours, theirs in zip(shown, run["metrics"], strict=True):
            assert all(ours[key] == pytest.approx(theirs[key], nan_ok=True) for key in ours)
    for step, weights in enumerate(first["weights"][:-1]):
        logged = shown[step + 1]
        if step == scenario.overflowing_batch:
            assert logged["grad/nonfinite"] == 1
            assert not math.isfinite(logged["grad/norm"])
            continue
        means = mean_gradients(scenario, weights, step, first["scales"][step])
        assert logged["grad/nonfinite"] == 0
        rtol = 1e-4 if scenario.computes_in is None else 0.05
        assert logged["grad/norm"] == pytest.approx(
            math.sqrt(sum(float(mean.square().sum()) for mean in means.values())), rel=rtol
        )
        assert len([key for key in logged if key.startswith("grad_sigma/")]) == len(means)
        for key, mean in means.items():
            size = float(mean.square().mean().sqrt())
            own = {kind: logged[f"grad_{kind}/network.{key}"] for kind in ("mean", "sigma", "norm")}
            assert own["mean"] == pytest.approx(float(mean.mean()), rel=rtol, abs=rtol * size)
            assert own["norm"] == pytest.approx(float(mean.norm()), rel=rtol)
            sigma = float(mean.std(correction=0)) if mean.numel() > 1 else 0.0
            assert own["sigma"] == pytest.approx(sigma, rel=rtol, abs=rtol * size)


@pytest.mark.parametrize("name", selected(lambda name, scenario: scenario.monitored))
def test_a_study_records_the_norm_of_whole_gradients(runs: Runs, name: str) -> None:
    scenario = SCENARIOS[name]
    first = runs(name)[0]
    assert first["parameters"] == sum(parameter.numel() for parameter in scenario.make_network().parameters())
    assert len(first["norms"]) == len(first["weights"]) - 1
    for step, (weights, recorded) in enumerate(zip(first["weights"], first["norms"], strict=False)):
        if step == scenario.overflowing_batch:
            assert not math.isfinite(recorded)
            continue
        means = mean_gradients(scenario, weights, step, first["scales"][step])
        norm = math.sqrt(sum(float(mean.square().sum()) for mean in means.values()))
        assert recorded == pytest.approx(norm, rel=1e-4 if scenario.computes_in is None else 0.05)


@pytest.mark.parametrize("name", selected(trained))
def test_untested_strategy_warns_once(runs: Runs, name: str) -> None:
    scenario = SCENARIOS[name]
    callback = type(CALLBACKS[scenario.callback]()).__name__
    for rank, run in enumerate(runs(name)):
        said = [message for message in run["warnings"] if f"{callback} has not been tested" in message]
        if rank == 0 and scenario.kind in ("FSDP", "DeepSpeed"):
            strategy = {"FSDP": "CPUFSDPStrategy", "DeepSpeed": "CPUDeepSpeedStrategy"}[scenario.kind]
            assert len(said) == 1
            assert said[0].startswith(f"{callback} has not been tested with {strategy} (tests.strategies.strategies)")
        else:
            assert said == []
        # There is no warning of a step without an effect either: a process may hold nothing of a gradient.
        others = [message for message in run["warnings"] if LARGE_STEPS not in message]
        assert not [message for message in others if message.startswith((f"{callback}:", "GradientMonitor:"))]


@pytest.mark.parametrize(
    "name", selected(lambda name, scenario: trained(name, scenario) and scenario.optimizer != "manual")
)
def test_first_process_alone_warns_of_large_steps(runs: Runs, name: str) -> None:
    """It judges by its own part of the weights, so that near the limit it may or may not warn."""
    scenario = SCENARIOS[name]
    first, *others = runs(name)
    weights = first["weights"][0]
    of_rate: dict[float, list[float]] = {}
    updates_of = {key: torch.ones_like(wide(weight)) for key, weight in weights.items() if key not in scenario.leaves}
    clipped = 1.0
    if scenario.clip is not None:
        clipped = min(1.0, scenario.clip / math.sqrt(sum(update.numel() for update in updates_of.values())))
    for key, update in updates_of.items():
        if update.ndim > 1 and update.numel() > 1 and key not in scenario.frozen:
            sums = of_rate.setdefault(rate(scenario, key), [0.0, 0.0])
            sums[0] += update.numel()
            sums[1] += float(wide(weights[key]).square().sum())
    factor = 1 / math.sqrt(1 - MOMENTUM**2) if scenario.optimizer == "momentum" else 1.0
    largest = max(own * factor * clipped * math.sqrt(count / square) for own, (count, square) in of_rate.items())
    counts = [sum(LARGE_STEPS in message for message in run["warnings"]) for run in (first, *others)]
    assert counts[1:] == [0] * len(others)
    if scenario.callback not in ("znorm", "adaptive") or largest < 0.35:
        assert counts[0] == 0
    elif largest > 0.75:
        assert counts[0] == 1


def counts_collectives(name: str, scenario: Scenario) -> bool:
    """Whether the collectives of the callback are counted, and not those of a monitor, which runs before it."""
    return scenario.kind == "DeepSpeed" and trained(name, scenario) and not scenario.monitored


@pytest.mark.parametrize("name", selected(counts_collectives))
def test_number_of_collectives(runs: Runs, name: str) -> None:
    scenario = SCENARIOS[name]
    in_fp32 = scenario.precision == "bf16-true" and "in_fp32" in name
    is_whole = scenario.processes == 1 or "zero0" in name or ("zero1" in name and in_fp32)
    each = 0 if is_whole else 1 if scenario.callback == "centralization" else 2
    before_the_step = [0] * (scenario.accumulate - 1)
    assert runs(name)[0]["collectives"] == [*before_the_step, each] * STEPS


@pytest.mark.parametrize("name", selected(lambda name, scenario: scenario.refused is not None))
def test_refused_before_the_first_step(runs: Runs, name: str) -> None:
    (run,) = runs(name)
    assert run["weights"] == []
    with pytest.raises(UnsupportedGradientError, match=SCENARIOS[name].refused):
        raise UnsupportedGradientError(run["refused"])


MISTAKEN = (
    "ddp-bf16-mixed",
    "fsdp-16-mixed",
    "fsdp2-bf16-true",
    "fsdp2-tp-bf16-mixed",
    "fsdp2-tp-bf16-true",
    "tp-32-true-momentum",
    "zero2-bf16-mixed-fused",
    "zero3-32-true",
    "fsdp-flat-adaptive",
    "fsdp2-tp-adaptive",
    "zero3-adaptive",
)


@pytest.mark.parametrize("name", selected(lambda name, scenario: name in MISTAKEN))
def test_mistakes_would_show(runs: Runs, name: str) -> None:
    """The tolerance tells the z-score of the mean from the z-scores of the parts of single processes."""
    scenario = SCENARIOS[name]
    run = runs(name)[0]
    weights = run["weights"][0]
    shares = [gradients(scenario, weights, 0, share, run["scales"][0]) for share in range(scenario.shares)]
    method = METHODS[scenario.callback]
    other_centring = METHODS["znorm" if scenario.callback == "adaptive" else "adaptive"]
    shows_centring = False
    scale = run["scales"][0]
    by_hand = updates(scenario, mean_gradients(scenario, weights, 0, scale), 0)
    moved = moved_by_rounding(scenario, weights, 0, scale, by_hand)
    for key in ("up.weight", "tied.first.weight", "norm.weight"):
        mean = torch.stack([share[key] for share in shares]).mean(dim=0)
        right = method(mean)
        halves = mean.flatten().chunk(2)  # of a tensor that is cut
        wrong = [torch.cat([method(half) for half in halves]).view_as(mean), mean]
        if scenario.shares > 1:
            wrong.append(torch.stack([method(share[key]) for share in shares]).mean(dim=0))
        allowed = tolerance(scenario, wide(weights[key]), right, moved=moved[key])
        for mistake in wrong:
            assert (LEARNING_RATE * (mistake - right).abs() > allowed).any()
        # Where the mean is small, the two are the same.
        shows_centring |= bool((LEARNING_RATE * (other_centring(mean) - right).abs() > allowed).any())
    assert shows_centring or scenario.callback != "adaptive"


@pytest.mark.parametrize("name", selected(lambda name, scenario: name == "zero2-clip-offload-three"))
def test_clipping_of_what_was_there_before_would_show(runs: Runs, name: str) -> None:
    scenario = SCENARIOS[name]
    grads = mean_gradients(scenario, runs(name)[0]["weights"][0], 0)
    norm = math.sqrt(sum(float(grad.square().sum()) for grad in grads.values()))
    ours = math.sqrt(sum(float(grad.square().sum()) for grad in updates(scenario, grads, 0).values()))
    assert ours == pytest.approx(scenario.clip, rel=1e-4)
    assert norm < ours * 10  # with a factor from this norm, the step would be several times as long
