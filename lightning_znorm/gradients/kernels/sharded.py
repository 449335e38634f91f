"""The kernel for gradients that are sharded over processes: at most two collectives per process group."""

import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import cached_property
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_znorm.gradients.kernels.affine import offset_and_scale, shift_and_scale
from lightning_znorm.gradients.kernels.caches import kept_on_device
from lightning_znorm.gradients.kernels.cpu_blocks import (
    CPU_BLOCK,
    add_and_multiply_,
    contiguous_buffers,
    split_by_buffer,
)
from lightning_znorm.gradients.kernels.dispatch import tables_of, transform_segments_
from lightning_znorm.gradients.kernels.parts import sums_of_pieces
from lightning_znorm.gradients.kernels.table import Table
from lightning_znorm.gradients.methods import AffineMethod, Over, Statistics, rows_share_std
from lightning_znorm.gradients.shards import Segment, Shard

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@torch.no_grad()
def transform_shards_(shards: Iterable[Shard], method: AffineMethod, loss_scale: Tensor | None = None) -> None:
    """Replace this process' shards of gradients by the method's, in place, with statistics of the unsharded gradients.

    Sums of what each process holds are reduced first, and then the squared deviations from the common mean: two
    collectives for each process group, or one if the method needs no deviation, however many gradients there are.
    Nothing but the common mean is subtracted: an outlier in a small shard would take the digits of its neighbours.

    Args:
        shards: The same gradients in the same order on all processes, whatever each holds of them.
        method: Returns shift and scale from the statistics of each tensor or row.
        loss_scale: Factor by which the gradients are larger than the true ones because the optimizer will divide by it,
            a scalar tensor. The method sees the true gradients, and its result is multiplied by the factor.
    """
    if rows_share_std(method):
        batches = _batches_that_share_std(shards)
    else:
        local_segments: list[Segment] = []
        by_groups: defaultdict[tuple[ProcessGroup, ...], list[Shard]] = defaultdict(list)
        for shard in shards:
            if groups := shard.reduce_groups(method.over):
                by_groups[groups].append(shard)
            else:
                local_segments += shard.segments(method.over)
        # The kernels of batches may refuse gradients, so this comes before any is changed.
        only = len(by_groups) == 1 and not local_segments
        batches = [
            ShardBatch(members, [method.over] * len(members), groups, needs_std=method.needs_std, keep_copies=only)
            for groups, members in by_groups.items()
        ]
        transform_segments_(local_segments, method, loss_scale)
    _reduce_(batches, method.needs_std)
    for batch in batches:
        batch.transform_(method, loss_scale)


@torch.no_grad()
def measure_shards(shards: Iterable[Shard]) -> tuple[list[Shard], Tensor, Tensor]:
    """Take statistics of unsharded gradients without changing them, in as many collectives as a method would take.

    Args:
        shards: The same gradients in the same order on all processes, whatever each holds of them; none is empty.

    Returns:
        The shards in the order of the statistics, the means, and the squared deviations of all elements, both of shape
        ``(S,)``, in float64 (float32 on devices without it) on one of the gradients' devices; the means are complex if
        any gradient is.
    """
    by_groups: defaultdict[tuple[ProcessGroup, ...], list[Shard]] = defaultdict(list)
    for shard in shards:
        by_groups[shard.reduce_groups("tensor", include_single=True)].append(shard)
    batches = [
        ShardBatch(members, ["tensor"] * len(members), groups, needs_std=True, read_only=True)
        for groups, members in by_groups.items()
    ]
    _reduce_(batches, needs_std=True)
    device = batches[0].m2.device
    return (
        [shard for members in by_groups.values() for shard in members],
        torch.cat([batch.mean.to(device) for batch in batches]),
        torch.cat([batch.m2.to(device) for batch in batches]),
    )


def _batches_that_share_std(shards: Iterable[Shard]) -> list["ShardBatch"]:
    """Return batches with a mean for each row, and a squared deviation for each tensor.

    Only sums are reduced between the ranks that share rows, and after them only one number for each tensor.
    """
    by_groups: defaultdict[tuple[tuple[ProcessGroup, ...], tuple[ProcessGroup, ...]], list[Shard]]
    by_groups = defaultdict(list)
    for shard in shards:
        if shard.shape.numel() > 1:
            sum_groups = shard.reduce_groups("row") if shard.has_rows else ()
            by_groups[sum_groups, shard.reduce_groups("tensor")].append(shard)
    return [
        ShardBatch(
            members,
            ["row" if shard.has_rows else "tensor" for shard in members],
            sum_groups,
            m2_groups,
            needs_std=True,
            keep_copies=len(by_groups) == 1,
        )
        for (sum_groups, m2_groups), members in by_groups.items()
    ]


def _reduce_(batches: list["ShardBatch"], needs_std: bool) -> None:
    """Add to the statistics of batches what other ranks hold."""
    _all_reduce_([(batch.sum_groups, batch.sums) for batch in batches])
    if needs_std:
        for batch in batches:
            batch.fill_m2_()
        _all_reduce_([(batch.m2_groups, batch.m2) for batch in batches])


class ShardBatch:
    """Shards over the same process groups, with the statistics of each tensor or row.

    Sums over ranks are in float64 (float32 on MPS), where they neither overflow nor lose a digit of float32 ones. On
    devices, each rank's own means are in the type of the kernel's statistics.

    Args:
        shards: This process' parts of the gradients.
        over: For each shard, what its means are taken over.
        sum_groups: The process groups over which the sums are reduced.
        m2_groups: The process groups over which squared deviations are reduced, if they are taken over whole tensors,
            whatever ``over`` is. The mean of a tensor without rows is then zero.
        needs_std: Whether the squared deviations are needed.
        read_only: Whether to leave the gradients as they are, and to measure single elements too.
        keep_copies: Whether the copies of small gradients may stay until they are rewritten: those of one table.

    Attributes:
        sum_groups: The process groups over which the sums are reduced.
        m2_groups: The process groups over which the squared deviations are reduced.
        sums: Sums of all elements, shape ``(S,)``; complex if any of the gradients is.
        m2: Squared deviations of all elements from their mean, shape ``(S,)``, or one for each tensor.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        over: Sequence[Over],
        sum_groups: tuple["ProcessGroup", ...],
        m2_groups: tuple["ProcessGroup", ...] | None = None,
        *,
        needs_std: bool,
        read_only: bool = False,
        keep_copies: bool = False,
    ) -> None:
        self.sum_groups = sum_groups
        self.m2_groups = sum_groups if m2_groups is None else m2_groups
        self._needs_std, self._read_only = needs_std, read_only
        device = reachable_device(shards[0].device, self.m2_groups)
        counts: list[float] = [shard.count(its_over) for shard, its_over in zip(shards, over, strict=True)]
        nums_stats = [shard.num_stats(its_over) for shard, its_over in zip(shards, over, strict=True)]
        self._shares_std = m2_groups is not None
        std_counts = [shard.shape.numel() for shard in shards] if self._shares_std else counts
        self._sizes = tuple(zip(std_counts, nums_stats, strict=True))
        if self._shares_std:
            # Where the mean is given as zero: finite sums are divided by infinity.
            counts = [count if its_over == "row" else math.inf for count, its_over in zip(counts, over, strict=True)]
        self._divisor = _repeated(tuple(zip(counts, nums_stats, strict=True)), device)
        wide = self._divisor.dtype
        dtype = wide.to_complex() if any(shard.is_complex for shard in shards) else wide
        self.sums = torch.zeros(len(self._divisor), dtype=dtype, device=device)
        self.m2 = torch.zeros(len(self._divisor), dtype=wide, device=device)
        segments: list[Segment] = []
        start = 0
        for shard, its_over, num_stats in zip(shards, over, nums_stats, strict=True):
            segments += shard.segments(its_over, start, include_single=read_only)
            start += num_stats
        tables, self._segments = tables_of(segments)
        self._measured = []
        for table in tables:
            self._measured.append(_MeasuredTable(table, needs_std, device))
            if not keep_copies or len(tables) > 1:  # one copy at a time
                table.forget_copies()
        for measured in self._measured:
            self.sums.index_copy_(0, measured.indices, measured.sums().to(device, dtype))
        for segments, _, buffers in self._buffers():
            sums = torch.cat([buffer.sum(-1).view(-1) for buffer in buffers])
            self.sums.index_copy_(0, _indices_of(segments, device), sums.to(device, dtype))

    @cached_property
    def mean(self) -> Tensor:
        """Means of all elements, shape ``(S,)``, once the sums have been reduced."""
        return self.sums / self._divisor

    def fill_m2_(self) -> None:
        """Add up the squared deviations of the local elements from the common means."""
        for measured in self._measured:
            m2 = measured.m2_from(self.mean[measured.indices])
            self.m2.index_copy_(0, measured.indices, m2.to(self.m2.device, self.m2.dtype))
        for segments, is_exact, buffers in self._buffers():
            indices = _indices_of(segments, self.m2.device)
            keep = self._read_only or not is_exact
            m2 = _subtract_(buffers, _like(self.mean[indices], buffers[0]), keep)
            self.m2.index_copy_(0, indices, m2.to(self.m2.device, self.m2.dtype))
        if self._shares_std:
            self.m2 = sums_of_pieces(self.m2, tuple([number for _, number in self._sizes]))

    def transform_(self, method: AffineMethod, loss_scale: Tensor | None) -> None:
        """Apply a method to the local elements."""
        for measured in self._measured:
            stats = self._stats(measured.table.segments, measured.local.mean)
            measured.table.rewrite_(*shift_and_scale(stats, method, loss_scale))
        for segments, is_exact, buffers in self._buffers():
            stats = self._stats(segments, buffers[0])
            if not (self._needs_std and is_exact):
                for buffer, mean in zip(buffers, split_by_buffer(stats.mean, buffers), strict=True):
                    buffer.sub_(mean.unsqueeze(1) if buffer.ndim > 1 else mean)
            add_and_multiply_(buffers, *offset_and_scale(stats, method, loss_scale))

    def _stats(self, segments: Iterable[Segment], like: Tensor) -> Statistics:
        """Return the statistics of some segments, in the type of a tensor and on its device."""
        ranges, device = _ranges(segments), self.sums.device
        indices = std_indices = _indices(ranges, device)
        if self._shares_std:
            std_indices = _std_indices(tuple([number for _, number in self._sizes]), ranges, device)
        return Statistics(
            _counts(self._sizes, ranges, like.real.dtype, like.device),
            _like(self.mean[indices], like),
            _like(self.m2[std_indices], like.real) if self._needs_std else None,
        )

    def _buffers(self) -> Iterator[tuple[list[Segment], bool, list[Tensor]]]:
        """Yield segments, whether gradients hold differences exactly, and the buffers.

        In half precision they do not: a difference may have more digits than the type, or be too large for it. So it is
        not kept until the next pass.
        """
        for segments, buffers in contiguous_buffers(self._segments, self._read_only):
            yield segments, segments[0].tensor.dtype == buffers[0].dtype, buffers


class _MeasuredTable:
    """A table with the statistics of its local elements, and their indices in a batch."""

    def __init__(self, table: Table, needs_std: bool, device: torch.device) -> None:
        self.table = table
        self.local = table.measure(needs_std)
        self.indices = _indices_of(table.segments, device)
        sizes = tuple([(segment.tensor.numel() // segment.num_stats, segment.num_stats) for segment in table.segments])
        self._count = _repeated(sizes, self.local.mean.device)

    def sums(self) -> Tensor:
        """Return the sums of the local elements."""
        return self.local.mean * self._count

    def m2_from(self, mean: Tensor) -> Tensor:
        """Return the squared deviations of the local elements from other means than their own."""
        assert self.local.m2 is not None
        offset = self.local.mean - mean.to(self.local.mean.device)
        square = offset.abs().square() if offset.is_complex() else offset.square()
        return torch.addcmul(self.local.m2, self._count, square)


def _subtract_(buffers: list[Tensor], mean: Tensor, keep: bool) -> Tensor:
    """Subtract means, one for each flat tensor and row of a matrix, and return squared deviations.

    With ``keep``, the buffers stay as they are, and differences take extra memory, a block of them at a time.
    """
    subtract = Tensor.sub if keep else Tensor.sub_
    m2s = []
    for buffer, buffer_mean in zip(buffers, split_by_buffer(mean, buffers), strict=True):
        if buffer.ndim > 1:
            m2s.append(torch.linalg.vector_norm(subtract(buffer, buffer_mean.unsqueeze(1)), dim=1).square_())
            continue
        dot = torch.vdot if buffer.is_complex() else torch.dot
        blocks = []
        for block in torch.split(buffer, CPU_BLOCK):
            difference = subtract(block, buffer_mean)
            blocks.append(dot(difference, difference).real)  # while the block is in cache
        m2s.append(torch.stack(blocks).sum(0, keepdim=True))
    return torch.cat(m2s)


def _like(numbers: Tensor, like: Tensor) -> Tensor:
    """Return numbers in the type, and on the device, of another tensor."""
    return (numbers if like.is_complex() else numbers.real).to(like.device, like.dtype)


def _all_reduce_(vectors: Sequence[tuple[tuple["ProcessGroup", ...], Tensor]]) -> None:
    """Sum each vector over the ranks of its groups, group after group; all vectors of a group at once.

    All processes take the groups in the same order, in which their gradients name them.
    """
    for group in dict.fromkeys(group for groups, _ in vectors for group in groups):
        members = [
            torch.view_as_real(vector).view(-1) if vector.is_complex() else vector
            for groups, vector in vectors
            if group in groups
        ]
        together = members[0] if len(members) == 1 else torch.cat([member.to(members[0].device) for member in members])
        torch.distributed.all_reduce(together, group=group)
        if len(members) > 1:
            reduced = torch.split(together, [len(member) for member in members])
            for member, reduced_member in zip(members, reduced, strict=True):
                member.copy_(reduced_member)


def reachable_device(device: torch.device, groups: tuple["ProcessGroup", ...]) -> torch.device:
    """Return the device, or another if the groups' backends cannot communicate from there (NCCL cannot from a CPU)."""
    for group in groups:
        types = [reachable.type for reachable in group._device_types]  # torch has no public name for it
        if device.type not in types:
            return torch.device(types[0])
    return device


def _ranges(segments: Iterable[Segment]) -> tuple[tuple[int, int], ...]:
    """Return the first of the statistics of each segment, and their number."""
    return tuple([(segment.start, segment.num_stats) for segment in segments])


def _indices_of(segments: Iterable[Segment], device: torch.device) -> Tensor:
    """Return the indices of the statistics that segments contribute to."""
    return _indices(_ranges(segments), device)


@kept_on_device(maxsize=1024)
def _indices(ranges: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Return the indices of several ranges, from the start and the length of each."""
    return torch.cat([torch.arange(start, start + length) for start, length in ranges]).to(device)


@kept_on_device(maxsize=1024)
def _repeated(sizes: tuple[tuple[float, int], ...], device: torch.device) -> Tensor:
    """Return each number, in the widest type of the device, as often as the second one of its pair says."""
    numbers, times = zip(*sizes, strict=True)
    wide = torch.float32 if device.type == "mps" else torch.float64
    return torch.tensor(numbers, dtype=wide).repeat_interleave(torch.tensor(times), output_size=sum(times)).to(device)


@kept_on_device(maxsize=1024)
def _counts(
    sizes: tuple[tuple[float, int], ...],
    ranges: tuple[tuple[int, int], ...],
    dtype: torch.dtype,
    device: torch.device,
) -> Tensor:
    """Return the count of the statistics of several ranges.

    Args:
        sizes: For each gradient, the count and the number of its statistics.
        ranges: The start and the length of each range.
        dtype: Type of the result.
        device: Where the result is to be.
    """
    cpu = torch.device("cpu")
    return _repeated(sizes, cpu)[_indices(ranges, cpu)].to(device, dtype)


@kept_on_device(maxsize=1024)
def _std_indices(numbers: tuple[int, ...], ranges: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Return for the statistics of several ranges the index of their gradient.

    Args:
        numbers: For each gradient, the number of its statistics.
        ranges: The start and the length of each range.
        device: Where the result is to be.
    """
    gradients = torch.arange(len(numbers)).repeat_interleave(torch.tensor(numbers), output_size=sum(numbers))
    return gradients[_indices(ranges, torch.device("cpu"))].to(device)
