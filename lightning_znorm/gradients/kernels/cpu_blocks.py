"""The kernel for gradients on a CPU that ``cpu.py`` does not serve, in blocks that stay in cache.

It works on *buffers*: contiguous memory in the type of the statistics, wherever possible that of the gradients. A
buffer is a flat tensor, which is one segment, or a matrix, whose rows are segments or the rows of one segment.
"""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache

import torch
from torch import Tensor

from lightning_znorm.gradients.kernels.affine import offset_and_scale
from lightning_znorm.gradients.kernels.memory import UPCAST, in_memory_order
from lightning_znorm.gradients.methods import AffineMethod, Statistics
from lightning_znorm.gradients.shards import Segment

# Elements whose deviation is taken while they are in cache, and that keep a dot product exact: the longer a float32 dot
# product, the less exact. Of normally distributed elements it was off by 2 units of rounding at 2^17, by 4 at 2^18, by
# 23 at 2^20, by 173 at 2^22.
CPU_BLOCK = 2**17

# Up to this many elements each, tensors of equal shape are transformed as the rows of one matrix: to copy them there
# and back costs less than the calls it saves (a network has dozens of biases and scales of one length).
_MAX_STACKED_NUMEL = 2**14
# No more elements than these are copied at a time, unless it is a single tensor.
_COPIED_NUMEL = 2**20

# `torch._foreach_*` below: torch has no public functions that work on lists of tensors. Its optimizers and
# `clip_grad_norm_` use these.


@torch.no_grad()
def transform_any_segments_(
    segments: Iterable[Segment], method: AffineMethod, loss_scale: Tensor | None = None
) -> None:
    """Replace each tensor or row ``g`` of the segments by ``(g - shift) * scale``, in place.

    It takes two passes: the mean is subtracted in place and the squared deviation taken of what remains, so that a
    large mean costs no digits.

    Args:
        segments: Memory of unsharded tensors or rows on a CPU, of floating-point or complex types.
        method: Returns shift and scale from the statistics of each tensor or row.
        loss_scale: Factor by which the gradients are larger than the true ones because the optimizer will divide by it,
            a scalar tensor. The method sees the true gradients, and its result is multiplied by the factor.
    """
    for _, buffers in contiguous_buffers(segments):
        transform_buffers_(buffers, method, loss_scale)


def transform_buffers_(buffers: list[Tensor], method: AffineMethod, loss_scale: Tensor | None = None) -> None:
    """Apply a method to flat tensors, and to each row of matrices, all on one device and of one type."""
    sums, m2s = zip(*(_subtract_mean_(buffer, method.needs_std) for buffer in buffers), strict=True)
    count = _counts(tuple(buffer.shape for buffer in buffers), sums[0].real.dtype, sums[0].device)
    if len({total.ndim for total in sums}) > 1:
        sums = tuple(total.view(-1) for total in sums)
    mean = torch.cat(sums).view(-1) / count
    stats = Statistics(count, mean, torch.cat(m2s).real if method.needs_std else None)
    add_and_multiply_(buffers, *offset_and_scale(stats, method, loss_scale))


def _subtract_mean_(buffer: Tensor, needs_std: bool) -> tuple[Tensor, Tensor]:
    """Subtract the mean of a flat tensor, or of each row of a matrix.

    Returns:
        The former sums, of shape ``(1,)`` or ``(S, 1)``, and, if needed, the squared deviations, ``(1,)`` or ``(S,)``.
    """
    numel = buffer.shape[-1]
    total = buffer.sum(-1, keepdim=True)
    if buffer.ndim > 1:
        buffer.sub_(total, alpha=1 / numel)
        return total, torch.linalg.vector_norm(buffer, dim=1).square_() if needs_std else total
    # Not vector_norm, which takes three times as long and loses digits.
    dot = torch.vdot if buffer.is_complex() else torch.dot
    m2s = []
    # Backwards, because the end of the tensor is still in cache after the sum.
    for part in (buffer,) if numel <= CPU_BLOCK else reversed(torch.split(buffer, CPU_BLOCK)):
        part.sub_(total, alpha=1 / numel)
        if needs_std:
            m2s.append(dot(part, part))  # while the part is in cache
    if len(m2s) > 1:
        return total, torch.stack(m2s).sum(0, keepdim=True)
    return total, m2s[0].view(1) if needs_std else total


def add_and_multiply_(buffers: list[Tensor], offset: Tensor | None, scale: Tensor | None) -> None:
    """Add an offset to each flat tensor and row of a matrix, and then multiply it by a scale."""
    if offset is not None:
        torch._foreach_add_(buffers, _broadcastable(offset, buffers))
    if scale is not None:
        torch._foreach_mul_(buffers, _broadcastable(scale, buffers))


def _broadcastable(numbers: Tensor, buffers: list[Tensor]) -> list[Tensor]:
    """Return one of the numbers for each flat tensor, and a column of them for each matrix."""
    if all(buffer.ndim == 1 for buffer in buffers):
        return list(numbers.unbind())
    parts = split_by_buffer(numbers, buffers)
    return [part if buffer.ndim == 1 else part.unsqueeze(1) for buffer, part in zip(buffers, parts, strict=True)]


def split_by_buffer(numbers: Tensor, buffers: list[Tensor]) -> tuple[Tensor, ...]:
    """Split a number for each flat tensor and row of a matrix into the parts of the buffers."""
    return torch.split(numbers, [1 if buffer.ndim == 1 else len(buffer) for buffer in buffers])


@lru_cache(maxsize=1024)
@torch.inference_mode(False)  # the next caller may need a normal tensor
def _counts(shapes: tuple[torch.Size, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return the number of elements of each flat tensor and row."""
    counts = [shape[-1] for shape in shapes for _ in range(shape[0] if len(shape) > 1 else 1)]
    return torch.tensor(counts, dtype=dtype, device=device)


# From memory of any layout to buffers, and back.


def contiguous_buffers(
    segments: Iterable[Segment], read_only: bool = False
) -> Iterator[tuple[list[Segment], list[Tensor]]]:
    """Yield buffers to transform together in place, and write them back when the next ones are asked for.

    Most buffers are the memory of the segments. Others are copies (small tensors in a matrix, half precision in
    float32), of one tensor at a time, or of small ones that take 4 MiB together. As many tensors as that allows come at
    once, because the dozen small operations on their statistics are then done once. The same segments come in the same
    buffers each time.

    Args:
        segments: The memory.
        read_only: Whether the buffers are only read, so that nothing has to be written back.

    Yields:
        Segments, in the order of their statistics, and their buffers.
    """
    by_kind = defaultdict(list)
    for segment in segments:
        by_kind[segment.tensor.device, segment.tensor.dtype].append(segment)
    for same_kind in by_kind.values():
        for stacks in _copied_together(_stacks(same_kind)):
            pairs = [_buffer(stack) for stack in stacks]
            yield [segment for stack in stacks for segment in stack], [buffer for buffer, _ in pairs]
            for _, write_back_ in pairs:
                if write_back_ is not None and not read_only:
                    write_back_()


def _stacks(segments: Iterable[Segment]) -> Iterator[list[Segment]]:
    """Yield the segments of each buffer: a single one, or small ones of equal shape, the rows of a matrix."""
    by_shape = defaultdict(list)
    for segment in segments:
        tensor = segment.tensor
        # Lazily conjugated and negated tensors, which complex autograd makes, cannot be written to by _foreach_copy_.
        if segment.by_row or tensor.numel() > _MAX_STACKED_NUMEL or tensor.is_complex() or tensor.is_neg():
            yield [segment]
        else:
            by_shape[tensor.shape].append(segment)
    for shape, same_shape in by_shape.items():
        rows = _COPIED_NUMEL // shape.numel()
        for start in range(0, len(same_shape), rows):
            yield same_shape[start : start + rows]


def _copied_together(stacks: Iterable[list[Segment]]) -> Iterator[list[list[Segment]]]:
    """Yield as many stacks at a time as may be copied at a time; all, if their buffers are no copies."""
    together: list[list[Segment]] = []
    copied = 0
    for stack in stacks:
        first = stack[0].tensor
        is_copy = len(stack) > 1 or first.dtype in UPCAST or not first.is_contiguous()
        numel = len(stack) * first.numel() if is_copy else 0
        if copied and copied + numel > _COPIED_NUMEL:
            yield together
            together, copied = [], 0
        together.append(stack)
        copied += numel
    if together:
        yield together


def _buffer(stack: list[Segment]) -> tuple[Tensor, Callable[[], object] | None]:
    """Return a buffer for one segment, or for several of equal shape.

    Returns:
        The buffer, and a function that writes it back; ``None`` if the buffer is the segment's own memory.
    """
    tensors = [segment.tensor for segment in stack]
    wide = UPCAST.get(tensors[0].dtype, tensors[0].dtype)
    if len(tensors) > 1:
        matrix = torch.stack(tensors).reshape(len(tensors), -1).to(wide)
        return matrix, lambda: torch._foreach_copy_(tensors, matrix.view(len(tensors), *tensors[0].shape).unbind())
    (tensor,), by_row = tensors, stack[0].by_row
    if wide is tensor.dtype and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg():
        return tensor.view(tensor.shape[0], -1) if by_row else tensor.view(-1), None
    aligned = tensor if tensor.is_contiguous() else in_memory_order(tensor, outermost=1 if by_row else 0)
    buffer = aligned.resolve_conj().resolve_neg().to(wide).contiguous()
    write_back_ = None if buffer is aligned else lambda: aligned.copy_(buffer)
    return buffer.view(len(tensor), -1) if by_row else buffer.view(-1), write_back_
