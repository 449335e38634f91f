"""Applies a method to the gradients of parameters."""

from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_znorm.gradients.collect import UnsupportedGradientError, collect_grads
from lightning_znorm.gradients.kernels import affine_
from lightning_znorm.gradients.methods import AffineMethod, GradientMethod


@torch.no_grad()
def transform_named_grads_(
    named_parameters: Iterable[tuple[str, Tensor]], method: GradientMethod, loss_scale: Tensor | None = None
) -> None:
    """Replaces the gradients of named parameters by the method's, in place.

    Args:
        named_parameters: Names, for messages, and parameters.
        method: An affine method, or a function from a gradient to its replacement.
        loss_scale: Factor by which the gradients are larger than the true ones because the optimizer will divide by it,
            a scalar tensor.

    Raises:
        UnsupportedGradientError: If a gradient is sparse or a DTensor, or a function returns another shape.
    """
    grads = collect_grads(named_parameters)
    if isinstance(method, AffineMethod):
        affine_(grads, method, loss_scale)
        return
    for grad in grads:
        result = method(grad if loss_scale is None else grad / loss_scale)
        if result.shape != grad.shape:
            raise UnsupportedGradientError(
                f"{method} made a tensor of shape {tuple(result.shape)} from a gradient of shape {tuple(grad.shape)}"
            )
        # Who divides by the scale looks for inf later, and the function may leave no trace of one: 0 * inf is NaN.
        grad.copy_(result if loss_scale is None else result * loss_scale + 0 * grad)
