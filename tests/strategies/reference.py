"""The steps of a run under any strategy, by hand, in one process, from the weights before each of them."""

from collections.abc import Callable
from contextlib import nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tests.gradients.reference import centralized, sing, wide, zscore
from tests.strategies.training import LEARNING_RATE, STEPS, Scenario, Weights, batch_of, loss_of

METHODS: dict[str, Callable[[Tensor], Tensor]] = {
    "znorm": lambda grad: zscore(grad) if grad.numel() > 1 else grad,
    "centralization": lambda grad: centralized(grad) if grad.ndim > 1 else grad,
    "sing": lambda grad: sing(grad) if grad.numel() > 1 else grad,
}

# Of rounding, in units of the last place of 1.0.
UNIT = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}
WEIGHT_TYPES = {"64-true": torch.float64, "bf16-true": torch.bfloat16, "16-true": torch.float16}


def records(directory: Path, name: str, processes: int) -> list[dict[str, Any]]:
    """What each process wrote down."""
    return [_record(directory / f"{name}-{rank}.pt") for rank in range(processes)]


@cache
def _record(file: Path) -> dict[str, Any]:
    return torch.load(file, weights_only=True)


def gradients(scenario: Scenario, weights: Weights, number: int, share: int, scale: float) -> Weights:
    """The gradients of one batch of one process, by the parameters' names.

    In float64, or in the type that the scenario computes in, which no other result but its own rounding has.
    """
    network = scenario.network()
    weight_type = WEIGHT_TYPES.get(scenario.precision, torch.float32)
    computes_in = scenario.computes_in or (weight_type if weight_type.itemsize == 2 else torch.float64)
    network.to(torch.float32 if scenario.autocast else computes_in)
    network.load_state_dict(weights)
    network.to(scenario.device)
    images, labels = (tensor.to(scenario.device) for tensor in batch_of(scenario, number, share))
    with torch.autocast(scenario.device, computes_in, cache_enabled=False) if scenario.autocast else nullcontext():
        loss = loss_of(network, images, labels)
    named = {name: param for name, param in network.named_parameters() if param.requires_grad}
    grads = torch.autograd.grad(loss * scale, list(named.values()))
    return {name: wide(grad.cpu()) / scale for name, grad in zip(named, grads, strict=True)}


def update(scenario: Scenario, weights: Weights, step: int, scale: float) -> Weights:
    """What the method makes of the mean gradient of all batches of one step."""
    numbers = range(step * scenario.accumulate, (step + 1) * scenario.accumulate)
    shares = [
        gradients(scenario, weights, number, share, scale) for number in numbers for share in range(scenario.shares)
    ]
    means = {name: torch.stack([grads[name] for grads in shares]).mean(dim=0) for name in shares[0]}
    if scenario.two_optimizers and step % 2 == 0:
        means = {name: mean for name, mean in means.items() if not name.startswith("tied.")}
    method = METHODS[scenario.callback]
    return {name: mean if name in scenario.leaves else method(mean) for name, mean in means.items()}


def tolerance(scenario: Scenario, weight: Tensor, change: Tensor) -> Tensor:
    """How far a weight may be from the reference, element by element.

    Of float64 and float32 runs, some units of rounding of the largest change. In half precision, the reference rounds
    the gradients of each process as the run does, so that autocast leaves a fraction of a unit; FSDP1 also adds
    gradients up in half precision, tensor parallelism activations, and weights of half precision are rounded too.
    """
    weight_type = WEIGHT_TYPES.get(scenario.precision, torch.float32)
    unit = UNIT[scenario.computes_in or weight_type]
    if unit <= UNIT[torch.float32]:
        units = 128.0
    elif scenario.shares < scenario.processes:
        units = 4.0
    else:
        units = 0.125 if scenario.autocast else 2.0
    # Where a method leaves the change small, it is the difference of gradients that were rounded before.
    bound = LEARNING_RATE * units * unit * change.abs().max().clamp_min(0.02)
    return bound + (1 if weight_type.itemsize == 2 else 4) * UNIT[weight_type] * weight.abs()


def check(name: str, scenario: Scenario, record: dict[str, Any], buffers: Weights | None = None) -> Weights:
    """Compares what each step of a run did to the weights with the step by hand.

    Args:
        name: The scenario's, for messages.
        scenario: What is special about it.
        record: What a process wrote down.
        buffers: Momentum from the run before, if it goes on from one.

    Returns:
        The momentum at the end.
    """
    weights, scales, every = record["weights"], record["scales"], scenario.accumulate
    assert len(weights) == STEPS * every + 1
    first = 0 if scenario.resumes is None else STEPS
    buffers = dict(buffers or {})
    for step in range(STEPS):
        before, after = weights[step * every], weights[(step + 1) * every]
        for between in weights[step * every : (step + 1) * every]:
            assert all(torch.equal(between[key], before[key]) for key in before), f"{name}: moved before step {step}"
        changes: Weights = {}
        overflows = scenario.overflowing_batch is not None and scenario.overflowing_batch // every == step
        if not overflows:
            changes = update(scenario, before, first + step, scales[step * every])
            for key, change in changes.items():
                buffers[key] = change + scenario.momentum * buffers.get(key, 0.0)
        # A shared weight has two names.
        shared = {"tied.second.weight": "tied.first.weight"}
        for key, weight in after.items():
            stays = shared.get(key, key) not in changes  # frozen, or not stepped
            change = torch.zeros(()) if stays else buffers[shared.get(key, key)]
            expected = wide(before[key]) - LEARNING_RATE * change
            error = (wide(weight) - expected).abs()
            allowed = tolerance(scenario, wide(before[key]), change)
            if stays:
                allowed = torch.zeros_like(error)
            assert torch.isfinite(error).all(), f"{name}, step {step}, {key}"
            worst = float((error - allowed).max())
            assert worst <= 0, (
                f"{name}, step {step}, {key}: {float(error.max()):.3g} off, {worst:.3g} more than allowed"
            )
    return buffers
