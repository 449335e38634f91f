"""The affine kernel for tensors on a CPU: measured as they are, and rewritten by one operation.

Clipping by norm reads each gradient, then reads and writes it. So does this: squares, sum and rewriting follow each
other while a gradient is in cache, and ``(g - shift) * scale`` is one addition, ``-shift * scale + scale * g``, which
PyTorch vectorizes.
"""

from functools import lru_cache

import torch
from torch import Tensor

from lightning_znorm.gradients.kernels.maps import affine_map
from lightning_znorm.gradients.methods import AffineMethod
from lightning_znorm.gradients.statistics import Statistics

TYPES = frozenset({torch.float32, torch.float64})

# The longer a float32 dot product, the less exact: of normally distributed elements it was off by 2 units of rounding
# at 2^17, by 4 at 2^18, by 23 at 2^20, by 173 at 2^22. Longer tensors are measured in rows, and were off by 0.3.
BLOCK = 2**17
_ROW = 2**10

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
    if flat.numel() <= 2 * _CHUNK:
        return _squares(flat), flat.sum()
    squares, sums = zip(*((_squares(part), part.sum()) for part in torch.split(flat, _CHUNK)), strict=True)
    return torch.stack(squares).sum(), torch.stack(sums).sum()


def _squares(flat: Tensor) -> Tensor:
    """Sum of squares of a flat tensor.

    A thread reads the same part of it here as in the sum and in the rewriting, one of equal parts in their order: what
    lies in the cache of a core is out of reach for a core with another cache, and several times slower to fetch.
    """
    numel = flat.numel()
    if numel <= BLOCK:
        return torch.dot(flat, flat)
    rest = numel % _ROW
    rows = (flat[:-rest] if rest else flat).view(-1, _ROW)
    squares = _squares(torch.linalg.vector_norm(rows, dim=1))
    return squares + torch.dot(flat[-rest:], flat[-rest:]) if rest else squares


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # for whoever asks next
def _counts(sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.tensor(sizes, dtype=dtype)
