"""Under every strategy and precision, each step is that of one process which sees all batches and whole gradients."""

import math
from pathlib import Path

import pytest
import torch

from tests.gradients.reference import wide
from tests.strategies.reference import METHODS, check, gradients, records, tolerance
from tests.strategies.training import CALLBACKS, LEARNING_RATE, SCENARIOS

TRAINED = [name for name, scenario in SCENARIOS.items() if scenario.resumes is None]
OVERFLOWING = [name for name, scenario in SCENARIOS.items() if scenario.overflowing_batch is not None]


@pytest.mark.parametrize("name", TRAINED)
def test_steps_are_those_of_one_process(directory: Path, name: str) -> None:
    check(name, SCENARIOS[name], records(directory, name, 1)[0])


@pytest.mark.parametrize("name", [name for name, scenario in SCENARIOS.items() if scenario.processes > 1])
def test_weights_are_identical_in_all_processes(directory: Path, name: str) -> None:
    first, *others = records(directory, name, SCENARIOS[name].processes)
    for other in others:
        for ours, theirs in zip(first["weights"], other["weights"], strict=True):
            assert ours.keys() == theirs.keys()
            assert all(torch.equal(ours[key], theirs[key]) for key in ours)


@pytest.mark.parametrize("name", OVERFLOWING)
def test_overflow_in_one_process_skips_the_step_in_all(directory: Path, name: str) -> None:
    scenario = SCENARIOS[name]
    batch, every = scenario.overflowing_batch, scenario.accumulate
    start = batch // every * every
    runs = records(directory, name, scenario.processes)
    for run in runs:
        before, after = run["weights"][start], run["weights"][start + every]
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert run["scales"][start + every] == run["scales"][start] / 2
        assert not torch.equal(after["conv.weight"], run["weights"][-1]["conv.weight"])
    # The scenario is what it says: where gradients are sharded, inf is in the last parameter's shard, or in all; DDP
    # does not average before the last batch of a step.
    sharded = scenario.kind == "FSDP" and "no_shard" not in name
    last_only = scenario.overflowing == "last parameter" and (sharded or (batch + 1) % every != 0)
    shards = 2  # also of four processes, under hybrid sharding
    for rank, run in enumerate(runs):
        assert run["infinite"][batch] == (not last_only or rank % shards == shards - 1)
        assert not any(run["infinite"][:batch])


@pytest.mark.parametrize("name", [name for name, scenario in SCENARIOS.items() if scenario.monitored])
def test_monitor_shows_whole_true_gradients(directory: Path, name: str) -> None:
    scenario = SCENARIOS[name]
    first, *others = records(directory, name, scenario.processes)
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
        shares = [gradients(scenario, weights, step, share, first["scales"][step]) for share in range(scenario.shares)]
        means = {key: torch.stack([share[key] for share in shares]).mean(dim=0) for key in shares[0]}
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


@pytest.mark.parametrize("name", TRAINED)
def test_untested_strategy_warns_once(directory: Path, name: str) -> None:
    scenario = SCENARIOS[name]
    callback = CALLBACKS[scenario.callback].__name__
    for rank, run in enumerate(records(directory, name, scenario.processes)):
        said = [message for message in run["warnings"] if f"{callback} has not been tested" in message]
        if rank == 0 and scenario.kind == "FSDP":
            assert len(said) == 1
            assert said[0].startswith(f"{callback} has not been tested with CPUFSDPStrategy (__main__)")
        else:
            assert said == []
        # Nor does one of a step without an effect: a process may hold nothing of a gradient.
        assert not [message for message in run["warnings"] if message.startswith((f"{callback}:", "GradientMonitor:"))]


@pytest.mark.parametrize(
    "name", ["ddp-bf16-mixed", "fsdp-bf16-mixed", "fsdp-16-mixed", "tp-bf16-true", "fsdp2-32-true"]
)
def test_mistakes_would_show(directory: Path, name: str) -> None:
    """The tolerance tells apart the z-score of the mean from what a process would make of its own share."""
    scenario = SCENARIOS[name]
    run = records(directory, name, 1)[0]
    weights = run["weights"][0]
    shares = [gradients(scenario, weights, 0, share, run["scales"][0]) for share in range(scenario.shares)]
    for key in ("up.weight", "tied.first.weight", "norm.weight"):
        mean = torch.stack([share[key] for share in shares]).mean(dim=0)
        right = METHODS["znorm"](mean)
        halves = mean.flatten().chunk(2)  # of a tensor that is cut
        wrong = [torch.cat([METHODS["znorm"](half) for half in halves]).view_as(mean), mean]
        if scenario.shares > 1:
            wrong.append(torch.stack([METHODS["znorm"](share[key]) for share in shares]).mean(dim=0))
        allowed = tolerance(scenario, wide(weights[key]), right)
        for mistake in wrong:
            assert (LEARNING_RATE * (mistake - right).abs() > allowed).any()
