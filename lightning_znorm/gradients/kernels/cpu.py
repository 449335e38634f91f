"""The kernels for gradients on a CPU that need no copy, or are tiny.

Clipping by norm reads each gradient, then reads and writes it. So does the kernel for contiguous gradients: squares,
sum and rewriting follow each other while a gradient is in cache, and ``(g - shift) * scale`` is one addition,
``-shift * scale + scale * g``, which PyTorch vectorizes.

For tiny gradients, biases and scales, an operation costs as much as its call. They are concatenated, whatever their
sizes, and treated as the segments of one vector in double precision, so that neither the order of summation nor the
size of the mean matters.
"""

from collections import defaultdict
from collections.abc import Iterable
from contextlib import AbstractContextManager
from functools import lru_cache

import torch
from torch import Tensor

from lightning_znorm.gradients.kernels.affine import offset_and_scale, shift_and_scale
from lightning_znorm.gradients.kernels.cpu_blocks import CPU_BLOCK, transform_buffers_
from lightning_znorm.gradients.methods import AffineMethod, Centralization, Statistics, ZScore

_CONTIGUOUS_TYPES = frozenset({torch.float32, torch.float64})
_TINY_TYPES = frozenset({torch.float32, torch.float16, torch.bfloat16})

# Gradients of convolutions whose weights are in another memory format than torch's usual one, and how their dimensions
# lie in memory. The first dimension, whose elements are the rows, stays the first.
_CHANNELS_LAST = {4: (torch.channels_last, (0, 2, 3, 1)), 5: (torch.channels_last_3d, (0, 2, 3, 4, 1))}

# Larger tensors are faster by themselves than concatenated with others.
TINY_NUMEL = 512
# Elements that are concatenated at a time, of 8 bytes each, in four vectors.
_VECTOR_NUMEL = 2**16

# Elements measured and rewritten at a time: they stay in the last cache, and memory is read once and written once.
_CACHED_NUMEL = 2**21
# Length of the rows in which longer tensors than CPU_BLOCK are measured.
_ROW_NUMEL = 2**10


def transform_supported_(
    tensors: Iterable[Tensor], method: AffineMethod, loss_scale: Tensor | None = None
) -> list[Tensor]:
    """Apply a method to the tensors that these kernels support, each with statistics over all its elements.

    Args:
        tensors: Tensors on any devices. Those of less than two elements stay as they are.
        method: Returns shift and scale from the statistics.
        loss_scale: Factor by which the gradients are larger than the true ones, a scalar tensor.

    Returns:
        The unsupported tensors, unchanged: on other devices, with gaps or transposed, of other types.
    """
    unsupported: list[Tensor] = []
    tiny: defaultdict[torch.dtype, list[Tensor]] = defaultdict(list)
    contiguous: defaultdict[torch.dtype, list[Tensor]] = defaultdict(list)
    needs_std, max_tiny = method.needs_std, TINY_NUMEL
    for tensor in tensors:
        numel, dtype = tensor.numel(), tensor.dtype
        if numel < 2:
            continue
        if (ordered := _in_memory_order(tensor)) is None:
            unsupported.append(tensor)
        elif numel <= max_tiny and dtype in _TINY_TYPES:
            tiny[dtype].append(ordered)
        elif needs_std and dtype in _CONTIGUOUS_TYPES:
            contiguous[dtype].append(ordered)
        else:
            unsupported.append(tensor)
    with _without_autograd(method):
        for same_dtype in tiny.values():
            _transform_tiny_(same_dtype, method, loss_scale)
        for same_dtype in contiguous.values():
            _transform_contiguous_(same_dtype, method, loss_scale)
    return unsupported


def transform_supported_rows_(
    tensors: Iterable[Tensor], method: AffineMethod, loss_scale: Tensor | None = None
) -> list[Tensor]:
    """Apply a method to each row of the tensors that can be rewritten without a copy.

    Args:
        tensors: Tensors on any devices. Those without rows of several elements stay as they are.
        method: Returns shift and scale from the statistics.
        loss_scale: Factor by which the gradients are larger than the true ones, a scalar tensor.

    Returns:
        The unsupported tensors, unchanged: on other devices, with gaps or transposed, of other types.
    """
    unsupported: list[Tensor] = []
    matrices: defaultdict[torch.dtype, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        ndim = tensor.ndim
        if ndim < 2 or tensor.numel() <= (length := tensor.size(0)):
            continue
        if tensor.dtype in _CONTIGUOUS_TYPES and (ordered := _in_memory_order(tensor)) is not None:
            matrices[tensor.dtype].append(ordered if ndim == 2 else ordered.view(length, -1))
        else:
            unsupported.append(tensor)
    with _without_autograd(method):
        for same_dtype in matrices.values():
            transform_buffers_(same_dtype, method, loss_scale)
    return unsupported


def _in_memory_order(tensor: Tensor) -> Tensor | None:
    """Return a tensor, its dimensions in the order in which they lie in the memory of a CPU; its rows stay its rows.

    Returns:
        The tensor, or a contiguous view of it; ``None`` if it has gaps, is on another device or is no plain tensor.
    """
    # A subclass of Tensor may not work in inference mode.
    if type(tensor) is not Tensor or not tensor.is_cpu or tensor.is_neg():
        return None
    if tensor.is_contiguous():
        return tensor
    if (ndim := tensor.ndim) in _CHANNELS_LAST:
        memory_format, order = _CHANNELS_LAST[ndim]
        if tensor.is_contiguous(memory_format=memory_format):
            return tensor.permute(order)
    return None


def _without_autograd(method: AffineMethod) -> AbstractContextManager[object]:
    """Return inference mode, in which an operation costs a tenth less than with ``no_grad``, for our own methods.

    A user's method may keep what it is given, and a tensor of inference mode cannot be used for training.
    """
    return torch.inference_mode() if type(method) in (ZScore, Centralization) else torch.no_grad()


def _transform_contiguous_(tensors: list[Tensor], method: AffineMethod, loss_scale: Tensor | None) -> None:
    """Apply a method that needs the deviation to tensors of one of the ``_CONTIGUOUS_TYPES``."""
    flats: list[Tensor] = []
    numel = 0
    for tensor in tensors:
        if flats and numel + tensor.numel() > _CACHED_NUMEL:
            _transform_cached_(flats, method, loss_scale)
            flats, numel = [], 0
        flats.append(tensor if tensor.ndim == 1 else tensor.view(-1))
        numel += tensor.numel()
    _transform_cached_(flats, method, loss_scale)


def _transform_cached_(flats: list[Tensor], method: AffineMethod, loss_scale: Tensor | None) -> None:
    count = _counts(tuple([flat.numel() for flat in flats]), flats[0].dtype)
    squares, sums = (torch.stack(measured) for measured in zip(*map(_squares_and_sum, flats), strict=True))
    mean = sums / count
    m2 = squares - sums * mean
    subtracted = None
    # A mean larger than the deviation costs digits of it. Such a mean (or NaN) is subtracted first, and what its
    # rounding leaves is measured in its place.
    is_near_zero = (count * mean.square() <= m2).tolist()
    if not all(is_near_zero):
        subtracted = mean.masked_fill(torch.tensor(is_near_zero, device="cpu"), 0.0)
        for index, flat in enumerate(flats):
            if not is_near_zero[index]:
                flat.sub_(subtracted[index])
                squares[index], sums[index] = _squares_and_sum(flat)
        mean = sums / count
        m2 = (squares - sums * mean).clamp_(min=0)
    stats = Statistics(count, mean if subtracted is None else subtracted + mean, m2)
    shift, scale = shift_and_scale(stats, method, loss_scale)
    if shift is stats.mean:
        offset = -mean
    else:
        offset = (torch.zeros_like(mean) if subtracted is None else subtracted) - (0 if shift is None else shift)
    scales = [1.0] * len(flats)
    if scale is not None:
        offset, scales = offset * scale, scale.tolist()
    for flat, flat_offset, flat_scale in zip(flats, offset.unbind(), scales, strict=True):
        torch.add(flat_offset, flat, alpha=flat_scale, out=flat)


def _squares_and_sum(flat: Tensor) -> tuple[Tensor, Tensor]:
    """Return the sum of squares, and then the sum, of a flat tensor: squares are the faster to come from memory."""
    if flat.numel() <= 2 * _CACHED_NUMEL:
        return _sum_of_squares(flat), flat.sum()
    parts = torch.split(flat, _CACHED_NUMEL)
    squares, sums = zip(*((_sum_of_squares(part), part.sum()) for part in parts), strict=True)
    return torch.stack(squares).sum(), torch.stack(sums).sum()


def _sum_of_squares(flat: Tensor) -> Tensor:
    """Return the sum of squares of a flat tensor; if it is longer than ``CPU_BLOCK``, in rows.

    A thread reads the same part of it as in the sum and in the rewriting, one of equal parts in their order: what is in
    the cache of one core is several times slower to fetch for a core with another cache.
    """
    numel = flat.numel()
    if numel <= CPU_BLOCK:
        return torch.dot(flat, flat)
    tail = numel % _ROW_NUMEL
    rows = (flat[:-tail] if tail else flat).view(-1, _ROW_NUMEL)
    squares = _sum_of_squares(torch.linalg.vector_norm(rows, dim=1))
    return squares + torch.dot(flat[-tail:], flat[-tail:]) if tail else squares


def _transform_tiny_(tensors: list[Tensor], method: AffineMethod, loss_scale: Tensor | None) -> None:
    """Apply a method to tensors of one of the ``_TINY_TYPES``, of no more than ``TINY_NUMEL`` elements."""
    at_once = _VECTOR_NUMEL // TINY_NUMEL
    for start in range(0, len(tensors), at_once):
        _transform_concatenated_(tensors[start : start + at_once], method, loss_scale)


def _transform_concatenated_(tensors: list[Tensor], method: AffineMethod, loss_scale: Tensor | None) -> None:
    flats = [tensor if tensor.ndim == 1 else tensor.view(-1) for tensor in tensors]
    sizes = [flat.numel() for flat in flats]
    lengths, count, indices = _lengths(tuple(sizes))
    vector = torch.cat(flats).double()
    mean = _segment_sums(vector, lengths) / count
    vector.sub_(mean.index_select(0, indices))
    m2 = _segment_sums(vector.square(), lengths).float() if method.needs_std else None
    offset, scale = offset_and_scale(Statistics(count, mean.float(), m2), method, loss_scale)
    if offset is not None:
        vector.add_(offset.index_select(0, indices))
    if scale is not None:
        vector.mul_(scale.index_select(0, indices))
    torch.split_with_sizes_copy(vector.to(flats[0].dtype), sizes, out=flats)


def _segment_sums(vector: Tensor, lengths: Tensor) -> Tensor:
    return torch.segment_reduce(vector, "sum", lengths=lengths, unsafe=True)


@lru_cache(maxsize=64)
@torch.inference_mode(False)  # the next caller may need a normal tensor
def _counts(sizes: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    return torch.tensor(sizes, dtype=dtype, device="cpu")


@lru_cache(maxsize=32)  # of half a MiB at most each
@torch.inference_mode(False)  # the next caller may need normal tensors
def _lengths(sizes: tuple[int, ...]) -> tuple[Tensor, Tensor, Tensor]:
    """Return the lengths of segments, the same as floating-point numbers, and for each element its segment's index."""
    lengths = torch.tensor(sizes, device="cpu")
    return lengths, lengths.float(), torch.arange(len(sizes), device="cpu").repeat_interleave(lengths)
