"""Applies a method to gradients, wherever they are."""

from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_znorm.gradients.errors import UnsupportedGradientError
from lightning_znorm.gradients.kernels import affine_shards_, affine_wholes_
from lightning_znorm.gradients.methods import AffineMethod, GradientMethod, describe
from lightning_znorm.gradients.shards import Shard, whole_shard
from lightning_znorm.gradients.shared_memory import each_memory_once, may_share_memory
from lightning_znorm.gradients.slots import GradientSlot, UnnamedSlots, read_gradients


@torch.no_grad()
def transform_gradients_(
    slots: Iterable[GradientSlot], method: GradientMethod, loss_scale: Tensor | None = None
) -> list[Tensor | Shard | None]:
    """Replaces the gradients at some slots by the method's, in place.

    Where gradients are sharded, all processes that hold a part must call this with the same slots in the same order.

    Args:
        slots: Where the gradients are.
        method: An affine method, or a function from a gradient to its replacement.
        loss_scale: Factor by which the gradients are larger than the true ones because the optimizer will divide by it,
            a scalar tensor.

    Returns:
        What was found at each slot, in their order: ``None`` where there is no gradient.

    Raises:
        TypeError: If the method is none.
        UnsupportedGradientError: If a gradient is sparse, of 8 bits, or cannot be put together from the processes, or
            is sharded and the method a function, or if gradients overlap in memory, and then before any is changed; or
            if a function returns anything but a tensor of its argument's shape.
    """
    name = describe(method)
    if not isinstance(slots, UnnamedSlots):
        slots = list(slots)
    grads = read_gradients(slots)
    wholes = [grad for grad in grads if isinstance(grad, Tensor)]
    shards = [grad for grad in grads if isinstance(grad, Shard)] if len(wholes) < len(grads) else []
    if may_share_memory(wholes, shards):
        wholes, shards = each_memory_once(slots, grads)
    if shards and not isinstance(method, AffineMethod):
        name_of_first = next(slot.names[0] for slot, grad in zip(slots, grads, strict=True) if grad is shards[0])
        raise UnsupportedGradientError(
            f"the gradient of {name_of_first} is sharded over processes, and {name} is a function of whole "
            "gradients: write it as an AffineMethod, which works with their statistics"
        )
    if isinstance(method, AffineMethod):
        if method.pooled:
            # Shards of which everything is here, for their table knows which rows are of one tensor.
            shards = [*map(whole_shard, wholes), *shards]
        else:
            affine_wholes_(wholes, method, loss_scale)
        if shards:
            affine_shards_(shards, method, loss_scale)
            for slot in slots:
                slot.on_rewritten()
        return grads
    for grad in wholes:
        if grad.numel() == 0:
            continue
        result = method(grad if loss_scale is None else grad / loss_scale)
        if not isinstance(result, Tensor) or result.shape != grad.shape:
            made = f"a tensor of shape {tuple(result.shape)}" if isinstance(result, Tensor) else repr(result)
            raise UnsupportedGradientError(
                f"{name} made {made} from a gradient of shape {tuple(grad.shape)}, and must return its replacement"
            )
        # Who divides by the scale looks for inf later, and the function may leave no trace of one: 0 * inf is NaN.
        grad.copy_(result if loss_scale is None else result * loss_scale + 0 * grad)
    return grads
