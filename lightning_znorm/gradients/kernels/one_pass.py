"""The affine kernel for tensors on a CPU: measured as they are, and rewritten by one operation.

Clipping by norm reads each gradient, then reads and writes it. So does this: sum and squares are taken of a block while
it is in cache, and ``(g - shift) * scale`` is one addition, ``-shift * scale + scale * g``, which PyTorch vectorizes.
"""

from functools import lru_cache

import torch
from torch import Tensor

from lightning_znorm.gradients.kernels.maps import affine_map
from lightning_znorm.gradients.methods import AffineMethod
from lightning_znorm.gradients.statistics import Statistics

TYPES = frozenset({torch.float32, torch.float64})

# Elements that stay in the second-level cache of a core between squares and sum. The bound also keeps a float32 dot
# product exact to a few units of rounding: it was off by up to 2 of them, at 2^18 elements by 12, at 2^20 by 81.
BLOCK = 2**17

# Elements measured and rewritten at a time: they stay in the last cache, and memory is read once and written once.
_CHUNK = 2**21


def affine_(tensors: list[Tensor], method: AffineMethod, loss_scale: Tensor | None = None) -> None:
    """Applies a method that needs the deviation, as :func:`~lightning_znorm.gradients.kernels.blockwise.affine_` does.

    Args:
        tensors: On a CPU, contiguous, all of one of the ``TYPES``; each has one entry of the statistics, in this order.
        method: As there.
        loss_scale: As there.
    """
    chunk: list[Tensor] = []
    numel = 0
    for tensor in tensors:
        if chunk and numel + tensor.numel() > _CHUNK:
            _affine_(chunk, method, loss_scale)
            chunk, numel = [], 0
        chunk.append(tensor if tensor.ndim == 1 else tensor.view(-1))
        numel += tensor.numel()
    _affine_(chunk, method, loss_scale)


def _affine_(flats: list[Tensor], method: AffineMethod, loss_scale: Tensor | None) -> None:
    count = _counts(tuple([flat.numel() for flat in flats]), flats[0].dtype)
    squares, sums = (torch.stack(measured) for measured in zip(*map(_measure, flats), strict=True))
    mean = sums / count
    m2 = squares - sums * mean
    base = None
    # A mean larger than the deviation costs digits of it. Such a mean (or NaN) is subtracted first, and what its
    # rounding leaves is measured in its place.
    near = (count * mean.square() <= m2).tolist()
    if not all(near):
        base = mean.masked_fill(torch.tensor(near), 0.0)
        for index, flat in enumerate(flats):
            if not near[index]:
                flat.sub_(base[index])
                squares[index], sums[index] = _measure(flat)
        mean = sums / count
        m2 = (squares - sums * mean).clamp_(min=0)
    stats = Statistics(count, mean if base is None else base + mean, m2)
    shift, scale = affine_map(stats, method, loss_scale)
    if shift is stats.mean:
        offset = -mean
    else:
        offset = (torch.zeros_like(mean) if base is None else base) - (0 if shift is None else shift)
    scales = [1.0] * len(flats)
    if scale is not None:
        offset, scales = offset * scale, scale.tolist()
    for flat, own_offset, own_scale in zip(flats, offset.unbind(), scales, strict=True):
        torch.add(own_offset, flat, alpha=own_scale, out=flat)


def _measure(flat: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of squares, and sum, of a flat tensor: in this order, because squares are the faster to come from memory."""
    if flat.numel() <= BLOCK:
        return torch.dot(flat, flat), flat.sum()
    squares, sums = zip(*((torch.dot(part, part), part.sum()) for part in torch.split(flat, BLOCK)), strict=True)
    return torch.stack(squares).sum(), torch.stack(sums).sum()


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # for whoever asks next
def _counts(sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.tensor(sizes, dtype=dtype)
