"""ZNorm under DDP: every step is that of one process which sees the union of the processes' batches."""

import itertools
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.callbacks.ddp_training import (
    LEARNING_RATE,
    PROCESSES,
    SCENARIOS,
    STEPS,
    Network,
    Scenario,
    batch_of,
)
from tests.gradients.reference import zscore
from tests.processes import run_python

AUTOCAST = {"bf16-mixed": torch.bfloat16, "16-mixed": torch.float16}

Weights = dict[str, Tensor]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the two processes wrote down in all scenarios, which they run one after the other."""
    directory = tmp_path_factory.mktemp("ddp")
    finished = run_python(Path(__file__).with_name("ddp_training.py"), directory, "ddp", *SCENARIOS, timeout=180)
    assert finished.returncode == 0, finished.stdout
    return directory


def records(directory: Path, name: str) -> list[dict[str, Any]]:
    """What each process wrote down."""
    return [torch.load(directory / f"{name}-{rank}.pt", weights_only=True) for rank in range(PROCESSES)]


def shard_grads(scenario: Scenario, weights: Weights, scale: float, batch: int, rank: int) -> Weights:
    """The gradients of one batch of one process, without the loss scale; in the precision of the scenario."""
    network = Network(scenario.partly_used)
    network.load_state_dict(weights, assign=True)
    images, labels = batch_of(scenario, batch, rank)
    dtype = AUTOCAST.get(scenario.precision)
    with nullcontext() if dtype is None else torch.autocast("cpu", dtype=dtype, cache_enabled=False):
        loss = network.loss(images, labels, rank)
    named = dict(network.named_parameters())
    grads = torch.autograd.grad(loss * scale, list(named.values()), allow_unused=True)
    return {
        name: torch.zeros_like(param) if grad is None else grad / scale
        for (name, param), grad in zip(named.items(), grads, strict=True)
    }


def stepped(scenario: Scenario, weights: Weights, scale: float, step: int) -> Weights:
    """One process' SGD step along the z-score of the averaged gradient, from its definition."""
    batches = range(step * scenario.accumulate, (step + 1) * scenario.accumulate)
    if scenario.overflowing_batch in batches:
        return weights
    shards = [shard_grads(scenario, weights, scale, batch, rank) for batch in batches for rank in range(PROCESSES)]
    result = {}
    for name, weight in weights.items():
        grad = torch.stack([shard[name] for shard in shards]).double().mean(dim=0)
        result[name] = weight.double() - LEARNING_RATE * (zscore(grad) if grad.numel() > 1 else grad)
    return result


def check_every_step(name: str, record: dict[str, Any]) -> None:
    scenario, weights, scales = SCENARIOS[name], record["weights"], record["scales"]
    ends = range(0, STEPS * scenario.accumulate + 1, scenario.accumulate)
    assert len(weights) == ends[-1] + 1
    for step, (start, end) in enumerate(itertools.pairwise(ends)):
        expected = stepped(scenario, weights[start], scales[start], step)
        for key, weight in weights[end].items():
            torch.testing.assert_close(
                weight.double(),
                expected[key].double(),
                rtol=0,
                atol=1e-12 if scenario.precision == "64-true" else 1e-6,
                msg=lambda text, key=key, step=step: f"{name}, step {step}, {key}: {text}",
            )


@pytest.mark.parametrize("name", SCENARIOS)
def test_steps_are_those_of_one_process(runs: Path, name: str) -> None:
    check_every_step(name, records(runs, name)[0])


@pytest.mark.parametrize("name", SCENARIOS)
def test_weights_are_identical_in_all_processes(runs: Path, name: str) -> None:
    first, second = records(runs, name)
    for ours, theirs in zip(first["weights"], second["weights"], strict=True):
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_zscore_of_the_own_gradient_would_show(runs: Path) -> None:
    # The reference can tell the z-score of the average from the average of z-scores.
    weights = records(runs, "default")[0]["weights"][0]
    shards = [shard_grads(SCENARIOS["default"], weights, 1.0, 0, rank)["linear.weight"] for rank in range(PROCESSES)]
    right, wrong = zscore(torch.stack(shards).mean(dim=0)), torch.stack([zscore(shard) for shard in shards]).mean(dim=0)
    assert (right - wrong).abs().max() > 0.1


@pytest.mark.parametrize("name", SCENARIOS)
def test_gradients_stay_where_ddp_keeps_them(runs: Path, name: str) -> None:
    bucket_view = "gradient_as_bucket_view" in SCENARIOS[name].options
    for record in records(runs, name):
        assert record["moved_grads"] == []
        # The scenario is what it says: with bucket views, gradients share the storage of their bucket.
        grads = 6 if SCENARIOS[name].partly_used else 5
        storages = record["storages"][-1]
        assert storages < grads if bucket_view else storages == grads
        assert (storages > 1) == (not bucket_view or name == "small_buckets")


def test_used_by_one_process_and_by_none(runs: Path) -> None:
    record = records(runs, "find_unused")[0]
    start, end = record["weights"][0], record["weights"][-1]
    assert torch.equal(start["of_no_process"], end["of_no_process"])
    assert not torch.equal(start["of_second_process"], end["of_second_process"])


@pytest.mark.parametrize("name", [name for name in SCENARIOS if name.startswith("fp16_mixed")])
def test_overflow_in_one_process_skips_the_step_in_both(runs: Path, name: str) -> None:
    scenario = SCENARIOS[name]
    start = scenario.overflowing_batch // scenario.accumulate * scenario.accumulate
    for record in records(runs, name):
        before, after = (record["weights"][index] for index in (start, start + scenario.accumulate))
        assert all(torch.equal(before[key], after[key]) for key in before)
        assert record["scales"][start + scenario.accumulate] == record["scales"][start] / 2
        assert not torch.equal(after["linear.weight"], record["weights"][-1]["linear.weight"])


@pytest.mark.parametrize("strategy", ["ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_start_methods(tmp_path: Path, strategy: str) -> None:
    script = Path(__file__).with_name("ddp_training.py")
    finished = run_python(script, tmp_path, strategy, "default", timeout=120)
    assert finished.returncode == 0, finished.stdout
    check_every_step("default", records(tmp_path, "default")[1])


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("sparse", "the gradient of embedding.weight is sparse"),
        ("rank_0", "made a tensor of shape (0, 3) from a gradient of shape (16, 3)"),
        ("rank_1", "made a tensor of shape (0, 3) from a gradient of shape (16, 3)"),
    ],
)
def test_an_error_ends_all_processes(where: str, message: str) -> None:
    finished = run_python(Path(__file__).with_name("ddp_failure.py"), where, timeout=60)
    assert finished.returncode != 0
    assert message in finished.stdout
    assert "trained" not in finished.stdout
