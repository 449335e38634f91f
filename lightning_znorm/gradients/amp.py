"""Gradients under a GradScaler: whether they still hold the loss scale, and how to take it over.

The private names of GradScaler and of fused optimizers are used in this file alone, because no public ones tell what a
scaler has done. :func:`check_grad_scaler` tries them out.
"""

import inspect
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim import Optimizer

from lightning_znorm.gradients.exceptions import untested_torch


@lru_cache(maxsize=1)
def check_grad_scaler() -> None:
    """Try out, once, that GradScalers of this release of torch work as this file assumes.

    Raises:
        UnsupportedGradientError: If they do not. A method would be given gradients that still hold the scale, or none.
    """
    scaler = GradScaler("cpu", init_scale=4.0)
    plain: Any = _Trial()
    fused: Any = _FusedTrial()
    scaler.scale(torch.zeros(()))
    try:
        expected = {
            "its scale": float(scale_of(scaler)) == 4,
            "whether gradients are unscaled": not is_unscaled(scaler, plain),
        }
        scaler.unscale_(plain)
        expected["that gradients are unscaled"] = is_unscaled(scaler, plain)
        expected["what is infinite"] = [float(found) for found in found_inf(scaler, plain)] == [1.0]
        scaler.step(fused)
        expected["what it hands to fused optimizers"] = unscales_in_step(fused) and fused.was_given == (4.0, 1.0)
    except Exception as error:  # a name that is gone or means something else may raise anything
        raise untested_torch(f"GradScaler: {type(error).__name__}: {error}") from error
    for what, is_so in expected.items():
        if not is_so:
            raise untested_torch(f"GradScaler no longer tells {what}")


class _Trial:
    """The part of an optimizer that GradScaler uses. A real one would run the hooks for all optimizers of a program."""

    def __init__(self) -> None:
        weight = torch.zeros(1)
        weight.grad = torch.full((1,), torch.inf)
        self.param_groups = [{"params": [weight]}]


class _FusedTrial(_Trial):
    _step_supports_amp_scaling = True
    grad_scale: Tensor
    found_inf: Tensor

    def step(self) -> None:
        self.was_given = (float(self.grad_scale), float(self.found_inf))


def is_unscaled(scaler: GradScaler, optimizer: Optimizer) -> bool:
    """Return whether ``scaler.unscale_`` has been called on the optimizer since its last step."""
    return scaler._per_optimizer_states[id(optimizer)]["stage"] is not OptState.READY


def unscales_in_step(optimizer: Optimizer) -> bool:
    """Return whether the optimizer divides by the loss scale in its own ``step``, as fused ones do."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def found_inf(scaler: GradScaler | None, optimizer: Optimizer) -> list[Tensor]:
    """Return what ``scaler.unscale_`` has found in the gradients of an optimizer: for each device, zero if no inf."""
    if scaler is None or not scaler.is_enabled():
        return []
    return list(scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values())


def take_over_scale_(scaler: GradScaler, optimizer: Optimizer) -> Tensor | None:
    """Prepare the gradients of an optimizer that unscales in its step for a method, which needs the true gradients.

    After an early call of ``scaler.unscale_``, ``scaler.step`` hands no scale to the optimizer, and still skips the
    step on inf. An optimizer whose step takes the scaler divides by the scale in any case.

    Returns:
        The factor that the gradients hold, and must hold after the method too; ``None`` if they are the true ones.
    """
    if "grad_scaler" in inspect.signature(optimizer.step).parameters:
        return scale_of(scaler)
    with torch.no_grad():
        scaler.unscale_(optimizer)
        # FSDP's scaler counts the ranks that have found inf, and fused kernels skip the step at one exactly.
        for flag in found_inf(scaler, optimizer):
            flag.clamp_(max=1)
    return None


def scale_of(scaler: GradScaler) -> Tensor:
    """Return the scale that gradients hold before they are unscaled, as a scalar tensor on the device."""
    return scaler._get_scale_async()  # type: ignore[return-value]  # there is one once a loss has been scaled
