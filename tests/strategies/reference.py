"""The steps of a run in any scenario by hand: in one process, in float64, from the weights before each step."""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from tests.gradients.reference import centralized, sing, wide, zscore
from tests.strategies.network import batch_of, loss_of
from tests.strategies.scenarios import Scenario
from tests.strategies.strategies import Weights
from tests.strategies.training import LEARNING_RATE, MOMENTUM, SECOND_LEARNING_RATE, STEPS

Record = dict[str, Any]

METHODS: dict[str, Callable[[Tensor], Tensor]] = {
    "znorm": lambda grad: zscore(grad) if grad.numel() > 1 else grad,
    "adaptive": lambda grad: zscore(grad, centering="adaptive") if grad.numel() > 1 else grad,
    "centralization": lambda grad: centralized(grad) if grad.ndim > 1 else grad,
    "sing": lambda grad: sing(grad) if grad.numel() > 1 else grad,
}

# Tolerance for rounding, in units of the last place of 1.0.
UNIT = {torch.float64: 2.0**-52, torch.float32: 2.0**-23, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}

# A shared weight has two names.
SHARED = {"tied.second.weight": "tied.first.weight"}


def gradients(scenario: Scenario, weights: Weights, number: int, share: int, scale: float = 1.0) -> Weights:
    """Return the gradients of one batch of one process, by the parameters' names.

    In float64, or in the type that the scenario computes in, which no other result but its own rounding has.
    """
    network = scenario.make_network()
    network.is_last = share == scenario.shares - 1
    half = scenario.weight_type if scenario.weight_type.itemsize == 2 else None
    computes_in = torch.float64 if scenario.shows_gradients else scenario.computes_in or half or torch.float64
    network.to(torch.float32 if scenario.autocast else computes_in)
    network.load_state_dict(weights)
    network.to(scenario.device)
    dtype = torch.float64 if scenario.precision == "64-true" else torch.float32
    images, labels = (tensor.to(scenario.device) for tensor in batch_of(number, share, dtype))
    with torch.autocast(scenario.device, computes_in, cache_enabled=False) if scenario.autocast else nullcontext():
        loss = loss_of(network, images, labels)
    named = {name: param for name, param in network.named_parameters() if param.requires_grad}
    grads = torch.autograd.grad(loss * scale, list(named.values()), allow_unused=True)
    return {
        name: wide(torch.zeros_like(param) if grad is None else grad).cpu() / scale
        for (name, param), grad in zip(named.items(), grads, strict=True)
    }


def mean_gradients(scenario: Scenario, weights: Weights, step: int, scale: float = 1.0) -> Weights:
    """Return the mean gradients of all batches of one step, as the strategy hands them to the callback."""
    numbers = range(step * scenario.accumulate, (step + 1) * scenario.accumulate)
    every = [
        gradients(scenario, weights, number, share, scale) for number in numbers for share in range(scenario.shares)
    ]
    divisor = scenario.accumulate if scenario.divides_twice else 1
    return {name: torch.stack([grads[name] for grads in every]).mean(dim=0) / divisor for name in every[0]}


def updates(scenario: Scenario, grads: Weights, step: int) -> Weights:
    """Return the gradients of a step after the method and clipping, for the parameters that it moves."""
    method = METHODS[scenario.callback]
    made = {name: wide(grad) if name in scenario.leaves else method(wide(grad)) for name, grad in grads.items()}
    if scenario.clip is not None:
        norm = math.sqrt(sum(float(update.square().sum()) for update in made.values()))
        assert norm > 2 * scenario.clip
        made = {name: update * scenario.clip / (norm + 1e-6) for name, update in made.items()}
    if scenario.is_manual and not scenario.one_optimizer and step % 2 == 0:
        made = {name: update for name, update in made.items() if not name.startswith("tied.")}
    return made


def moved_by_rounding(scenario: Scenario, weights: Weights, step: int, scale: float, changes: Weights) -> Weights:
    """Return how far half precision moves a step by hand, at most, for each parameter.

    Where activations are added up in half precision, a run rounds otherwise than the reference does, and may end on the
    other side of the exact step. How far depends on the gradient: the z-scores of a small difference of large numbers
    move most.
    """
    if not adds_activations_in_half(scenario):
        return {name: torch.zeros(()) for name in changes}
    exact = replace(scenario, precision="32-true", computes_in=torch.float64, autocast=False)
    found = updates(exact, mean_gradients(exact, weights, step, scale), step)
    return {name: (change - found[name]).abs().max() for name, change in changes.items()}


def adds_activations_in_half(scenario: Scenario) -> bool:
    """Whether processes that share a batch add up activations of half precision."""
    unit = UNIT[scenario.computes_in or scenario.weight_type]
    return unit > UNIT[torch.float32] and scenario.shares < scenario.processes


def rate(scenario: Scenario, name: str) -> float:
    """Return the learning rate of a parameter."""
    return SECOND_LEARNING_RATE if scenario.optimizer == "momentum" and name.startswith("tied.") else LEARNING_RATE


def tolerance(
    scenario: Scenario,
    weight: Tensor,
    change: Tensor,
    learning_rate: float = LEARNING_RATE,
    moved: float | Tensor = 0.0,
) -> Tensor:
    """Return how far a weight may be from the reference, element by element.

    Args:
        scenario: What is special about the run.
        weight: The weight before the step.
        change: What the step subtracts from it, before the learning rate; with momentum, the sum of sizes.
        learning_rate: The weight's.
        moved: How far half precision moves the change itself, see `moved_by_rounding`; with momentum, the sum.

    Of float64 and float32 runs, some units of rounding of the largest change. In half precision, the reference rounds
    the gradients of each process as the run does, which under autocast leaves the rounding of float32 alone; FSDP1 also
    adds gradients up in half precision, tensor parallelism activations, and weights of half precision are rounded too.
    Under DeepSpeed, a step from the gradients that the callback saw is exact, apart from the rounding of its result.
    What half precision moves is allowed three times: a run is moved as far as the reference, not to the same place (a
    CPU with native bfloat16 was 2.7 times off).
    """
    if scenario.kind == "DeepSpeed":
        relative = 1e-6 if scenario.steps_in is torch.float32 else 2.0**-8
        return 2e-6 + relative * learning_rate * change.abs()
    unit = UNIT[scenario.computes_in or scenario.weight_type]
    if scenario.autocast and scenario.shares == scenario.processes:
        unit = UNIT[torch.float32]
    units = 128.0 if unit <= UNIT[torch.float32] else 2.0
    # If a method makes the change small, it is the difference of gradients that were rounded before.
    bound = learning_rate * units * unit * change.abs().max().clamp_min(0.02)
    of_weights = 1 if scenario.weight_type.itemsize == 2 else 4
    return bound + 3 * learning_rate * moved + of_weights * UNIT[scenario.weight_type] * weight.abs()


def shown_gradients(scenario: Scenario, record: Record, step: int, number: int) -> Weights:
    """Return the gradients that the callback saw, after checking that they are those of all batches up to rounding.

    Args:
        scenario: What is special about the run.
        record: What a process saw.
        step: Number of the step within the run.
        number: Number of the step since the beginning of training.
    """
    start = step * scenario.accumulate
    shown = {name: wide(grad) / record["scales"][start] for name, grad in record["gradients"][step].items()}
    weights = record["model_weights"][start]
    for name, mean in mean_gradients(scenario, weights, number).items():
        if mean.ndim > 1:  # those of vectors may be small differences of large numbers
            assert (shown[name] - mean).norm() <= 0.1 * mean.norm(), name
    return shown


def check(name: str, scenario: Scenario, record: Record, buffers: Weights | None = None) -> Weights:
    """Compare what each step of a run did to the weights with the step by hand.

    Args:
        name: The scenario's, for messages.
        scenario: What is special about it.
        record: What a process saw.
        buffers: Momentum from the run before, if it goes on from one.

    Returns:
        The momentum at the end.
    """
    weights, scales, every = record["weights"], record["scales"], scenario.accumulate
    assert len(weights) == STEPS * every + 1
    first = 0 if scenario.resumes is None else STEPS
    momentum = MOMENTUM if scenario.optimizer == "momentum" else 0.0
    buffers = dict(buffers or {})
    sizes = {key: buffer.abs() for key, buffer in buffers.items()}  # rounding does not cancel as changes do
    moved: Weights = {}
    for step in range(STEPS):
        before, after = weights[step * every], weights[(step + 1) * every]
        for between in weights[step * every : (step + 1) * every]:
            assert all(torch.equal(between[key], before[key]) for key in before), f"{name}: moved before step {step}"
        changes: Weights = {}
        overflows = scenario.overflowing_batch is not None and scenario.overflowing_batch // every == step
        if not overflows:
            if scenario.shows_gradients:
                grads = shown_gradients(scenario, record, step, first + step)
            else:
                grads = mean_gradients(scenario, before, first + step, scales[step * every])
            changes = updates(scenario, grads, first + step)
            now_moved = moved_by_rounding(scenario, before, first + step, scales[step * every], changes)
            for key, change in changes.items():
                buffers[key] = change + momentum * buffers.get(key, 0.0)
                sizes[key] = change.abs() + momentum * sizes.get(key, 0.0)
                moved[key] = now_moved[key] + momentum * moved.get(key, 0.0)
        for key, weight in after.items():
            own = SHARED.get(key, key)
            stays = own not in changes  # frozen, or not stepped
            change = torch.zeros(()) if stays else buffers[own]
            expected = wide(before[key]) - rate(scenario, key) * change
            error = (wide(weight) - expected).abs()
            allowed = (
                torch.zeros_like(error)
                if stays
                else tolerance(scenario, wide(before[key]), sizes[own], rate(scenario, own), moved[own])
            )
            assert torch.isfinite(error).all(), f"{name}, step {step}, {key}"
            worst = float((error - allowed).max())
            assert worst <= 0, (
                f"{name}, step {step}, {key}: {float(error.max()):.3g} off, {worst:.3g} more than allowed"
            )
    return buffers
