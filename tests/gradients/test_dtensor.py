"""Gradients that are DTensors, of FSDP2 and tensor parallelism: the result is that of unsharded gradients."""

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call

from tests.distributed import ProcessesError, run_distributed
from tests.fsdp import needs_fsdp2_on_cpu
from tests.gradients.dtensor_gradients import (
    CASES,
    EXPANDED,
    LR,
    MODELS,
    PROCESSES,
    STEPS,
    Blocks,
    Network,
    gradient,
    loss_of,
    run,
    scenarios,
)
from tests.gradients.reference import centralized, wide, zscore
from tests.gradients.test_zscore import TOLERANCE

METHODS = ["zscore", "adaptive", "centralized"]


Records = list[dict[str, Any]]


@cache
def group_of(name: str) -> tuple[str, list[str]]:
    return next((group, list(members)) for group, members in scenarios().items() if name in members)


@cache
def group_records(group: str, *names: str) -> Records | ProcessesError:
    """Return what became of scenarios in each of the processes, or why nothing did."""
    try:
        return run_distributed(run, group, names, processes=PROCESSES)
    except ProcessesError as error:
        return error


def records(name: str) -> list[Any]:
    """Return what became of a scenario in each of the processes, which run those of a group one after the other.

    Where one of a group fails, each of them runs alone, and fails alone.
    """
    group, names = group_of(name)
    result = group_records(group, *names)
    if isinstance(result, ProcessesError):
        result = group_records(group, name)
    if isinstance(result, ProcessesError):
        raise result
    return [record[name] for record in result]


def reference(grad: Tensor, method: str) -> Tensor:
    """Return the result by definition. Single elements, and rows of them, stay as they are."""
    if method in ("zscore", "adaptive"):
        centering = "full" if method == "zscore" else method
        return zscore(grad, centering=centering) if grad.numel() > 1 else wide(grad)
    return centralized(grad) if grad.ndim > 1 and grad[:1].numel() > 1 else wide(grad)


def check(record: dict[str, Any], method: str, *names: str) -> None:
    assert sorted(record["after"]) == sorted(names)
    for name in names:
        before, after = record["before"][name], record["after"][name]
        assert after.dtype == before.dtype
        torch.testing.assert_close(
            wide(after),
            reference(before, method),
            rtol=0,
            atol=3 * TOLERANCE[before.dtype],
            msg=lambda text, name=name: f"{name}: {text}",
        )


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("case", CASES)
def test_one_gradient(case: str, method: str) -> None:
    for one_by_one in records(f"one_by_one {method}"):
        record = one_by_one[case]
        check({"before": {case: record["before"]}, "after": {case: record["after"]}}, method, case)
        assert record["in_place"] or "sum" in case  # those that lie in memory in another way are copied


@pytest.mark.parametrize("method", METHODS)
def test_all_together(method: str) -> None:
    for record in records(f"together {method}"):
        check(record, method, "plain_first", *CASES, "plain", "plain_float32")


def test_reference_tells_the_whole_from_its_parts() -> None:
    # The z-score of what a process holds is another one.
    whole = gradient((7, 3))
    of_parts = torch.cat([zscore(part) for part in whole.chunk(PROCESSES)])
    assert (zscore(whole) - of_parts).abs().max() > 0.1


@pytest.mark.parametrize("method", METHODS)
def test_all_processes_agree(method: str) -> None:
    first, *others = (record["after"] for record in records(f"together {method}"))
    for other in others:
        assert all(torch.equal(first[name], other[name]) for name in first)


@pytest.mark.parametrize("method", METHODS)
def test_elements_that_share_memory(method: str) -> None:
    for record in records(f"shared_memory {method}"):
        check(record, method, *EXPANDED)


@pytest.mark.parametrize("method", METHODS)
def test_the_same_gradient_of_two_parameters(method: str) -> None:
    for record in records(f"the_same_twice {method}"):
        check(record, method, "shard_first", "shard_second", "sum_first", "sum_second")


@pytest.mark.parametrize("method", METHODS)
def test_collective_still_running(method: str) -> None:
    for record in records(f"in_flight {method}"):
        check(record, method, "dtensor", "plain")


@pytest.mark.parametrize("method", METHODS)
def test_missing_gradients(method: str) -> None:
    for record in records(f"missing {method}"):
        check(record, method, "present")
        assert record["none"]


@pytest.mark.parametrize("method", METHODS)
def test_parameters_frozen_after_the_backward_pass(method: str) -> None:
    for record in records(f"frozen_later {method}"):
        check(record, method, "sharded", "plain")


@pytest.mark.parametrize("method", METHODS)
def test_mesh_of_some_ranks(method: str) -> None:
    for rank, record in enumerate(records(f"submesh {method}")):
        check(record, method, "everywhere", *(["shard", "sum"] if rank < 2 else []))


def test_refused_by_name_before_anything_changes() -> None:
    for messages in records("refused"):
        assert "gradient of parameter 2 is neither replicated nor sharded, but Partial(max)" in messages["largest"]
        assert "redistribute" in messages["largest"]
        assert (
            "parameter 0 is sharded over processes, and _VariableFunctionsClass.sign is a function"
            in messages["function"]
        )


@pytest.mark.parametrize("count", [44, 440])
@pytest.mark.parametrize(("method", "collectives"), [("zscore", 2), ("adaptive", 2), ("centralized", 1)])
def test_collectives(method: str, collectives: int, count: int) -> None:
    # Of a call for rows that are cut nowhere, there are none at all.
    expected = 0 if method == "centralized" else collectives
    for record in records(f"counted {method} {count} sharded"):
        assert record["all_reduce"] == expected
        assert record["traffic"] == ({"c10d.allreduce_": expected} if expected else {})
    for record in records(f"counted {method} {count} whole"):
        assert (record["all_reduce"], record["traffic"]) == (0, {})


@pytest.mark.parametrize(("method", "rounds"), [("zscore", 2), ("adaptive", 2), ("centralized", 1)])
def test_collectives_of_several_meshes(method: str, rounds: int) -> None:
    # Three groups (the line, and two directions of the square), and the sums that are taken first: one for each
    # direction, and for each of sum and mean.
    sums = 4
    for record in records(f"together {method}"):
        assert record["all_reduce"] == 3 * rounds + sums
        assert record["traffic"] == {"c10d.allreduce_": 3 * rounds + sums}


def stepped(model: nn.Module, weights: dict[str, Tensor], inputs: list[Tensor], method: str) -> dict[str, Tensor]:
    """One process' SGD step along the transformed mean of the gradients, from its definition."""
    given = {name: wide(weight).requires_grad_() for name, weight in weights.items()}
    loss = sum(loss_of(functional_call(model, given, (batch.double(),))) for batch in inputs) / len(inputs)
    grads = torch.autograd.grad(loss, list(given.values()), allow_unused=True)
    return {
        name: weight.detach() - LR * (0 if grad is None else reference(grad, method))
        for (name, weight), grad in zip(given.items(), grads, strict=True)
    }


def check_step(name: str, method: str, step: int, before: Any, after: Any, tolerance: float) -> None:
    _, inputs, _, shards = MODELS[name]
    model = Network() if name in ("fsdp", "hybrid") else Blocks()
    expected = stepped(model, before, [inputs(shard, step) for shard in range(shards)], method)
    assert set(after) == set(expected)
    for key, weight in after.items():
        torch.testing.assert_close(
            wide(weight), expected[key], rtol=0, atol=tolerance, msg=lambda text, key=key: f"step {step}, {key}: {text}"
        )


# Of the gradients, so that a scenario is what it says.
PLACEMENTS = {
    "fsdp": {"(Shard(dim=0),)"},
    "hybrid": {"(Replicate(), Shard(dim=0))"},
    "tensor_parallel": {"(Partial(sum),)", "(Shard(dim=0),)", "(Shard(dim=1),)", "(Replicate(),)"},
    "fsdp_and_tensor_parallel": {
        "(_StridedShard(dim=0, sf=2), Shard(dim=0))",
        "(Shard(dim=0), Shard(dim=1))",
        "(Shard(dim=0), Replicate())",
        "(Shard(dim=0),)",
    },
}


@pytest.mark.parametrize("way", ["called zscore", "attached zscore", "attached centralized"])
@pytest.mark.parametrize("name", MODELS)
def test_every_step_is_that_of_one_process(name: str, way: str) -> None:
    for record in records(f"{name} {way}"):
        assert len(record["weights"]) == STEPS + 1
        for step in range(STEPS):
            check_step(name, way.split()[1], step, *record["weights"][step : step + 2], tolerance=1e-11)
        assert record["placements"] == PLACEMENTS[name]


@needs_fsdp2_on_cpu
def test_grad_scaler() -> None:
    for record in records("scaled"):
        for step in range(STEPS):
            check_step("fsdp", "zscore", step, *record["weights"][step : step + 2], tolerance=2e-5)


@needs_fsdp2_on_cpu
def test_overflow_on_one_rank_skips_the_step_on_all() -> None:
    for record in records("overflow"):
        assert record["scales"] == [2.0**10, 2.0**10, 2.0**9]
        start, first, second = record["weights"]
        check_step("fsdp", "zscore", 0, start, first, tolerance=2e-5)
        assert all(torch.equal(first[key], second[key]) for key in first)
