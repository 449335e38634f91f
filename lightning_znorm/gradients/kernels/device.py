"""The kernel for all devices but the CPU. It takes few launches: for small gradients, these cost more than the work.

A large gradient takes two launches: one reads it for mean and deviation, and one rewrites it. Half precision takes a
third one, because a deviation taken in its own type has no digits, or is NaN. Small gradients are copied into one
buffer, transformed together and copied back: some 30 launches for all that fit into the buffer, and one for every 30 to
45 gradients, which are copied by lists. Methods by row take two more for each length of rows. The arithmetic on the
statistics is done once for all gradients. Small gradients with gaps in their memory, and lazily conjugated ones, are
treated like large ones.

It waits for the device only where gradients of some sizes come for the first time, whose tables are copied to it. So a
CUDA graph can only be captured of sizes that have been seen before, as in its warm-up.

It has been tried on tensors of a CPU, and launches were counted without a device (``benchmarks/launches.py``). It has
not run on a GPU yet, nor on devices of other makers.
"""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from itertools import groupby
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_znorm.gradients.kernels.caches import kept_on_device
from lightning_znorm.gradients.kernels.memory import UPCAST, in_memory_order
from lightning_znorm.gradients.kernels.parts import PART, Parts, num_parts, parts_of
from lightning_znorm.gradients.kernels.table import Table
from lightning_znorm.gradients.methods import Statistics
from lightning_znorm.gradients.shards import Segment

# To copy gradients of up to this many elements there and back costs less than the launches that it saves.
SMALL_NUMEL = 2**14
# Copies hold at most this many numbers at a time, or as many as the largest gradient.
COPIED_NUMEL = 2**22


class _Gradient(NamedTuple):
    """A segment, and its memory in a shape that is fast to work on."""

    segment: Segment
    memory: Tensor
    """A vector, or a matrix if by row; of the segment's own shape, if there are gaps in it."""
    is_small: bool
    """Whether to copy it: not with gaps, nor lazily conjugated or negated, as complex autograd makes them."""


def tables_of(segments: Iterable[Segment]) -> list["DeviceTable"]:
    """Return tables of segments: one for each type, or more if there are so many small ones that copies grow large."""
    by_kind: defaultdict[tuple[torch.device, torch.dtype], list[_Gradient]] = defaultdict(list)
    for segment in segments:
        by_kind[segment.tensor.device, segment.tensor.dtype].append(_gradient(segment))
    tables = []
    for same_kind in by_kind.values():
        single = [gradient for gradient in same_kind if not gradient.is_small]
        small = [gradient for gradient in same_kind if gradient.is_small]
        by_row = sorted((gradient for gradient in small if gradient.segment.by_row), key=_row_length)
        whole = sorted((gradient for gradient in small if not gradient.segment.by_row), key=_numel)
        limit = max(COPIED_NUMEL, *map(_numel, same_kind))
        for batch in _copied_together(by_row + whole[::-1], limit):
            tables.append(DeviceTable(single, batch))
            single = []
        if single:
            tables.append(DeviceTable(single, []))
    return tables


def _gradient(segment: Segment) -> _Gradient:
    tensor, by_row, _ = segment
    memory = tensor
    if not memory.is_contiguous():
        memory = in_memory_order(tensor, outermost=1 if by_row else 0)
        if not memory.is_contiguous():
            return _Gradient(segment, tensor, is_small=False)
    is_small = tensor.numel() <= SMALL_NUMEL and not tensor.is_conj() and not tensor.is_neg()
    if by_row and not is_small:
        return _Gradient(segment, memory.view(tensor.shape[0], -1), is_small)
    return _Gradient(segment, memory if memory.ndim == 1 else memory.view(-1), is_small)


def _numel(gradient: _Gradient) -> int:
    return gradient.memory.numel()


def _row_length(gradient: _Gradient) -> int:
    return gradient.segment.tensor.shape[1:].numel()


def _copied_together(gradients: Iterable[_Gradient], limit: int) -> Iterator[list[_Gradient]]:
    """Yield as many small gradients as may be copied at a time: first all by row, then others, the large ones first."""
    batch: list[_Gradient] = []
    copied = columns = 0
    for gradient in gradients:
        numel = _numbers_for_copies(gradient, columns)
        if batch and copied + numel > limit:
            yield batch
            batch, copied, columns = [], 0, 0
            numel = _numbers_for_copies(gradient, columns)
        if not gradient.segment.by_row:
            columns = columns or num_parts(_numel(gradient))
        batch.append(gradient)
        copied += numel
    if batch:
        yield batch


def _numbers_for_copies(gradient: _Gradient, columns: int) -> int:
    """Return how many float32 numbers the copies of a gradient take, in a table of parts with so many columns."""
    numel = _numel(gradient)
    if gradient.segment.by_row:
        return numel + numel // 2  # half precision is concatenated before it is copied to float32
    parts = num_parts(numel)
    # The differences from the mean are a second copy.
    return 2 * (PART + 1) * parts + 2 * (columns or parts)


class DeviceTable(Table):
    """Gradients of one type on one device, of which the small ones are copied.

    Args:
        single: Gradients to measure and rewrite where they are, one by one.
        copied: Small gradients, first those by row, in the order of the lengths of their rows.
    """

    def __init__(self, single: Sequence[_Gradient], copied: Sequence[_Gradient]) -> None:
        self.segments = [gradient.segment for gradient in (*single, *copied)]
        tensor = self.segments[0].tensor
        self._wide = UPCAST.get(tensor.dtype, tensor.dtype)
        self._single = single
        self._small = [gradient.memory for gradient in copied]
        by_row = [gradient for gradient in copied if gradient.segment.by_row]
        # Rows of one length are one matrix, whatever gradients they are of.
        self._matrices = [
            (sum(gradient.segment.num_stats for gradient in same_length), length)
            for length, same_length in groupby(by_row, _row_length)
        ]
        self._parts: Parts | None = None
        if whole := self._small[len(by_row) :]:
            self._parts = parts_of(tuple([memory.numel() for memory in whole]), tensor.dtype, tensor.device)
        self._copy: Tensor | None = None
        self._num_stats = [segment.num_stats for segment in self.segments[: len(single)]]
        self._num_stats += [rows for rows, _ in self._matrices] + ([len(whole)] if whole else [])
        counts = tuple([(segment.tensor.numel() // segment.num_stats, segment.num_stats) for segment in self.segments])
        self._count, self._m2_of_measured, self._zero_offset = _counts(
            counts, len(whole), self._wide.to_real(), tensor.device
        )

    def measure(self, needs_std: bool = True, from_zero: bool = False) -> Statistics:  # noqa: D102
        def measured(memory: Tensor, by_row: bool) -> tuple[Tensor, Tensor | None]:
            if from_zero and not by_row:
                return _zero_and_mean_square(memory, self._count.dtype)
            return _mean_and_variance(memory, by_row, self._count.dtype, needs_std)

        results = [measured(memory, segment.by_row) for segment, memory, _ in self._single]
        if self._small:
            self._copy = self._copied()
            matrices, parts = self._shaped(self._copy)
            results += [measured(matrix, by_row=True) for matrix in matrices]
            if self._parts is not None:
                results.append(self._parts.measure(parts, needs_std, from_zero))
        means, squares = zip(*results, strict=True)
        numbers = torch.cat(means + squares if needs_std else means)
        mean, square = numbers[: len(self._count)], numbers[len(self._count) :]
        if self._wide.is_complex:
            mean, square = torch.view_as_complex(mean), square.sum(1)
        return Statistics(self._count, mean, square * self._m2_of_measured if needs_std else None)

    def forget_copies(self) -> None:  # noqa: D102
        self._copy = None  # rewriting makes them again

    def rewrite_(self, shift: Tensor | None, scale: Tensor | None) -> None:  # noqa: D102
        if shift is not None and scale is not None:
            shift = torch.addcmul(self._zero_offset, shift, scale, value=-1)
        split = [
            [None] * len(self._num_stats) if part is None else torch.split(part, self._num_stats)
            for part in (shift, scale)
        ]
        numbers = iter(zip(*split, strict=True))
        for _, memory, _ in self._single:
            plain = memory.resolve_conj().resolve_neg()
            _rewrite_(plain, *next(numbers))
            if plain is not memory:
                memory.copy_(plain)
        if self._small:
            copy = self._copied() if self._copy is None else self._copy
            matrices, parts = self._shaped(copy)
            for matrix in matrices:
                _rewrite_(matrix, *next(numbers))
            if self._parts is not None:
                _rewrite_(parts[:-1], *map(self._parts.of_gradients, next(numbers)))
            values = copy.to(self._small[0].dtype)
            pieces = self._small if self._parts is None else self._parts.padded(self._small)
            copies = list(torch.split(values, [piece.numel() for piece in pieces]))
            if self._parts is not None:
                copies = self._parts.without_padding(copies)
            torch._foreach_copy_(self._small, copies)  # torch has no public function that copies lists
            self._copy = None

    def _copied(self) -> Tensor:
        """Return the small gradients in one vector, in the type of the statistics."""
        pieces = self._small if self._parts is None else self._parts.padded(self._small)
        return torch.cat(pieces).to(self._wide)

    def _shaped(self, copy: Tensor) -> tuple[list[Tensor], Tensor]:
        """Return the matrices whose rows have statistics, and one of the parts of all other gradients."""
        matrices, start = [], 0
        for rows, length in self._matrices:
            matrices.append(copy[start : start + rows * length].view(rows, length))
            start += rows * length
        return matrices, copy[start:].view(-1, PART) if self._parts is not None else copy[start:]


def _mean_and_variance(
    memory: Tensor, by_row: bool, dtype: torch.dtype, needs_std: bool
) -> tuple[Tensor, Tensor | None]:
    """Return mean and variance of all elements or of each row, of shape ``(S,)``, or ``(S, 2)`` of complex ones.

    It takes one launch, and one more in half precision.
    """
    values, dims, shape = _as_real(memory, by_row)
    keepdim = values.ndim == 1  # so that the result is a vector
    variance = None
    if needs_std:
        variance, mean = torch.var_mean(values.to(dtype), dims, correction=0, keepdim=keepdim)
        variance = variance if variance.ndim == len(shape) else variance.view(shape)
    else:
        mean = values.mean(dims, keepdim=keepdim, dtype=dtype)
    return mean if mean.ndim == len(shape) else mean.view(shape), variance


def _zero_and_mean_square(memory: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return zero and the mean square of all elements, as :func:`_mean_and_variance` does."""
    values, dims, shape = _as_real(memory, by_row=False)
    norm = torch.linalg.vector_norm(values, 2, dims, dtype=dtype).view(shape)
    return torch.zeros_like(norm), norm.square() / memory.numel()


def _as_real(memory: Tensor, by_row: bool) -> tuple[Tensor, tuple[int, ...], tuple[int, ...]]:
    """Return real numbers, the dimensions to reduce, and the shape of the result."""
    dims = tuple(range(int(by_row), memory.ndim))
    if memory.is_complex():
        return torch.view_as_real(memory.resolve_conj()), dims, (-1, 2)
    return memory, dims, (-1,)


def _rewrite_(gradient: Tensor, shift: Tensor | None, scale: Tensor | None) -> None:
    """Rewrite a gradient, or each of its rows, in one launch.

    Args:
        gradient: The gradient.
        shift: What to subtract; with a scale, what to add to the product.
        scale: What to multiply by.
    """
    if gradient.ndim > 1:
        dims = (-1,) + (1,) * (gradient.ndim - 1)
        shift, scale = (None if numbers is None else numbers.view(dims) for numbers in (shift, scale))
    # Half precision is computed in the type of shift and scale, and rounded once.
    if shift is None and scale is not None:
        torch.mul(gradient, scale, out=gradient)
    elif scale is None and shift is not None:
        torch.sub(gradient, shift, out=gradient)
    elif scale is not None and shift is not None:
        torch.addcmul(shift, gradient, scale, out=gradient)


@kept_on_device(maxsize=64)
def _counts(
    sizes: tuple[tuple[int, int], ...], num_squares: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the count of each of the statistics, what makes squared deviations of what is measured, and a zero.

    Args:
        sizes: For each segment the count and the number of its statistics.
        num_squares: For how many, at the end, squared deviations are measured. For all others it is a variance.
        dtype: Real type of the statistics.
        device: Where the results are to be.
    """
    counts, numbers = zip(*sizes, strict=True)
    count = torch.tensor(counts, dtype=dtype).repeat_interleave(torch.tensor(numbers), output_size=sum(numbers))
    of_variance = count.clone()
    of_variance[len(count) - num_squares :] = 1
    return count.to(device), of_variance.to(device), torch.zeros(1, dtype=dtype).to(device)
