"""Applies a method to the gradients of parameters."""

from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_znorm.gradients.collect import UnsupportedGradientError, collect_grads
from lightning_znorm.gradients.kernels import affine_
from lightning_znorm.gradients.methods import AffineMethod, GradientMethod, describe


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
        TypeError: If the method or a parameter is none.
        UnsupportedGradientError: If a gradient is sparse or sharded, and then before any is changed; or if a function
            returns anything but a tensor of its argument's shape.
    """
    name = describe(method)
    grads = collect_grads(named_parameters)
    if isinstance(method, AffineMethod):
        affine_(grads, method, loss_scale)
        return
    for grad in grads:
        result = method(grad if loss_scale is None else grad / loss_scale)
        if not isinstance(result, Tensor) or result.shape != grad.shape:
            made = f"a tensor of shape {tuple(result.shape)}" if isinstance(result, Tensor) else repr(result)
            raise UnsupportedGradientError(
                f"{name} made {made} from a gradient of shape {tuple(grad.shape)}, and must return its replacement"
            )
        # Who divides by the scale looks for inf later, and the function may leave no trace of one: 0 * inf is NaN.
        grad.copy_(result if loss_scale is None else result * loss_scale + 0 * grad)
