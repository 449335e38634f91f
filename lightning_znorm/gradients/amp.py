"""Gradients under a GradScaler: where they still hold the loss scale, and what to do about it."""

import inspect

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler, OptState
from torch.optim import Optimizer


def is_unscaled(scaler: GradScaler, optimizer: Optimizer) -> bool:
    """Whether ``scaler.unscale_`` has been called on the optimizer since its last step."""
    return scaler._per_optimizer_states[id(optimizer)]["stage"] is not OptState.READY


def unscales_in_step(optimizer: Optimizer) -> bool:
    """Whether the optimizer divides by the loss scale in its own ``step``, as fused ones do."""
    return bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def found_inf(scaler: GradScaler | None, optimizer: Optimizer) -> list[Tensor]:
    """What ``scaler.unscale_`` has found in the gradients of an optimizer: a scalar of each device, zero for no inf."""
    if scaler is None or not scaler.is_enabled():
        return []
    return list(scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values())


def take_over_scale_(scaler: GradScaler, optimizer: Optimizer) -> Tensor | None:
    """Prepares the gradients of an optimizer that unscales in its step for a method, which needs the true ones.

    Calling ``scaler.unscale_`` early makes ``scaler.step`` hand the optimizer no scale, and skip the step on inf as
    ever. An optimizer that takes the scaler itself divides all the same.

    Returns:
        The factor that the gradients hold, and must hold after the method too, or ``None`` if they are the true ones.
    """
    if "grad_scaler" in inspect.signature(optimizer.step).parameters:
        return scaler._get_scale_async()
    with torch.no_grad():
        scaler.unscale_(optimizer)
        # FSDP's scaler counts the ranks that have found inf, and fused kernels skip the step at one exactly.
        for found_inf in scaler._per_optimizer_states[id(optimizer)]["found_inf_per_device"].values():
            found_inf.clamp_(max=1)
    return None


def scale_of(scaler: GradScaler) -> Tensor:
    """The scale that gradients hold before they are unscaled, where it is: a scalar tensor on the device."""
    return scaler._get_scale_async()  # type: ignore[return-value]  # there is one once a loss has been scaled
