"""Measures gradients, wherever they are, and leaves them as they are."""

from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_znorm.gradients.kernels import measure_shards
from lightning_znorm.gradients.shards import Shard, whole_shard
from lightning_znorm.gradients.slots import GradientSlot, read_gradients
from lightning_znorm.gradients.statistics import ROUNDING_UNITS, Statistics


@torch.no_grad()
def measure_gradients(
    slots: Iterable[GradientSlot], loss_scale: Tensor | None = None
) -> tuple[list[GradientSlot], Statistics]:
    """Takes the statistics of the whole gradients at some slots, and brings them to the host in one copy.

    Where gradients are sharded, all processes that hold a part must call this with the same slots in the same order:
    they exchange two small sums for each process group, however many gradients there are.

    Args:
        slots: Where the gradients are.
        loss_scale: Factor by which they are larger than the true ones, a scalar tensor; the statistics are those of
            the true ones.

    Returns:
        The slots that have a gradient, and its statistics: an entry for each, in their order, in float64 on the CPU. A
        deviation within the rounding of the mean is zero. An inf or NaN anywhere in a gradient, or squared deviations
        that overflow in the gradient's type, leave a mean or a deviation that is not finite.

    Raises:
        UnsupportedGradientError: If a gradient is sparse, of 8 bits, or cannot be put together from the processes.
    """
    slots = list(slots)
    found: dict[Shard, GradientSlot] = {}
    for slot, grad in zip(slots, read_gradients(slots), strict=True):
        if grad is not None and grad.shape.numel() > 0:
            found[grad if isinstance(grad, Shard) else whole_shard(grad)] = slot
    if not found:
        return [], Statistics(*(torch.zeros(0, dtype=torch.float64) for _ in range(3)))
    shards, mean, m2 = measure_shards(found)
    parts = [torch.view_as_real(mean).flatten() if mean.is_complex() else mean, m2]
    if loss_scale is not None:
        parts.append(loss_scale.to(m2.device, m2.dtype, non_blocking=True).view(1))
    is_complex = mean.is_complex()
    mean, m2, *scales = torch.split(_to_host(torch.cat(parts)).double(), [part.numel() for part in parts])
    if is_complex:
        mean = torch.view_as_complex(mean.view(-1, 2))
    for scale in scales:
        mean, m2 = mean / scale, m2 / scale / scale
    count = torch.tensor([float(shard.shape.numel()) for shard in shards], dtype=torch.float64)
    rounding = ROUNDING_UNITS * torch.tensor([_unit(shard) for shard in shards], dtype=torch.float64) * mean.abs()
    m2 = m2.masked_fill((m2 / count).sqrt() <= rounding, 0.0)
    # Back into the order of the slots.
    number = {shard: index for index, shard in enumerate(shards)}
    order = torch.tensor([number[shard] for shard in found])
    return list(found.values()), Statistics(count[order], mean[order], m2[order])


def _to_host(tensor: Tensor) -> Tensor:
    """The only thing here that waits for a device."""
    return tensor.cpu()


def _unit(shard: Shard) -> float:
    """Unit of rounding of the type that a shard's statistics are computed in."""
    # A process that holds nothing of a gradient does not know its type, which is nearly always single precision.
    is_double = shard.local is not None and shard.local.dtype in (torch.float64, torch.complex128)
    return torch.finfo(torch.float64 if is_double else torch.float32).eps
