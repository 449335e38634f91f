"""The steps of a run under DeepSpeed, by hand, in one process, from the weights before each of them."""

import itertools
import math
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.gradients.reference import centralized, zscore
from tests.strategies.deepspeed_training import (
    LEARNING_RATE,
    SECOND_LEARNING_RATE,
    STEPS,
    Network,
    Scenario,
    batch_of,
    is_in_second_group,
)

Weights = dict[str, Tensor]
Record = dict[str, Any]


def records(directory: Path, name: str, processes: int) -> list[Record]:
    """What each process wrote down."""
    return [_record(directory / f"{name}-{processes}-{rank}.pt") for rank in range(processes)]


@cache
def _record(file: Path) -> Record:
    return torch.load(file, weights_only=True)


def true_grads(scenario: Scenario, rounded: Weights, step: int, processes: int) -> Weights:
    """The gradients of a step's batches of all processes, in float64.

    Divided twice by the number of batches that each process accumulates: by Lightning 2.6, and by DeepSpeed. The
    methods make up for it, and one-element parameters do not.
    """
    network = Network().double()
    network.load_state_dict(rounded, strict=False)  # the shared weight has one of its names
    losses = []
    for batch in range(step * scenario.accumulate, (step + 1) * scenario.accumulate):
        for rank in range(processes):
            inputs, labels = batch_of(batch, rank)
            losses.append(F.cross_entropy(network(inputs.double()), labels))
    (torch.stack(losses).mean() / scenario.accumulate).backward()
    return {
        name: torch.zeros_like(param) if param.grad is None else param.grad
        for name, param in network.named_parameters()
        if param.requires_grad
    }


def updates_of(scenario: Scenario, grads: Weights) -> Weights:
    """What the method makes of gradients, clipped, in float64."""
    updates = {}
    for name, grad in grads.items():
        chosen = not scenario.options or (grad.ndim >= 2 and "head" not in name)
        if not chosen or grad.numel() == 1:
            updates[name] = grad.double()
        elif scenario.centralize:
            updates[name] = centralized(grad) if grad.ndim > 1 else grad.double()
        else:
            updates[name] = zscore(grad)
    if scenario.clip is not None:
        norm = math.sqrt(sum(update.square().sum().item() for update in updates.values()))
        assert norm > 2 * scenario.clip
        updates = {name: update * scenario.clip / (norm + 1e-6) for name, update in updates.items()}
    return updates


def stepped(scenario: Scenario, before: Weights, updates: Weights) -> Weights:
    after = {}
    for name, weight in before.items():
        slow = scenario.two_groups and is_in_second_group(name)
        after[name] = weight.double()
        if name in updates:
            after[name] = after[name] - (SECOND_LEARNING_RATE if slow else LEARNING_RATE) * updates[name]
    return after


def steps(scenario: Scenario, record: Record) -> Iterator[tuple[int, Weights, Weights]]:
    """The number of each step, the weights before it, and those after it; of the steps that are taken."""
    assert len(record["weights"]) == STEPS + 1
    for step, (before, after) in enumerate(itertools.pairwise(record["weights"])):
        if scenario.overflowing_batch is None or scenario.overflowing_batch // scenario.accumulate != step:
            yield step, before, after


def assert_weights(actual: Weights, expected: Weights, atol: float, rtol: float = 0.0, what: str = "") -> None:
    assert list(actual) == list(expected)
    for name, weight in expected.items():
        torch.testing.assert_close(
            actual[name].double(), weight, rtol=rtol, atol=atol, msg=lambda text, name=name: f"{what}, {name}: {text}"
        )


def check(scenario: Scenario, record: Record, processes: int) -> None:
    """Compares what each step of a run did to the weights with the step by hand."""
    if scenario.precision == "32-true":
        for step, before, after in steps(scenario, record):
            updates = updates_of(scenario, true_grads(scenario, before, step, processes))
            assert_weights(after, stepped(scenario, before, updates), atol=2e-6, what=f"step {step}")
        return
    # Offloaded gradients are in float32, and those in float16 are widened for the loss scale.
    # DeepSpeed before 0.19 accumulates those of stage 2 in float32, and then rounds them.
    is_exact = scenario.offload or scenario.precision.startswith("16-") or (scenario.config and scenario.stage != 2)
    for step, before, after in steps(scenario, record):
        grads = {key: grad.double() / record["scales"][step] for key, grad in record["grads"][step].items()}
        # The gradients that the callback saw are those of all batches, within the rounding of the network.
        for key, true in true_grads(scenario, record["rounded"][step], step, processes).items():
            if true.ndim > 1:  # those of vectors may be small differences of large numbers
                assert (grads[key] - true).norm() <= 0.1 * true.norm(), key
        # From the same gradients, the step is exact: relative to the update, where that is stored in bfloat16.
        updates = updates_of(scenario, grads)
        moved = {key: (before[key].double() - after[key].double()) for key in updates}
        zero = {key: torch.zeros_like(weight) for key, weight in before.items() if key in updates}
        expected = {key: -value for key, value in stepped(scenario, zero, updates).items()}
        assert_weights(moved, expected, atol=2e-6, rtol=1e-6 if is_exact else 2**-8, what=f"step {step}")
