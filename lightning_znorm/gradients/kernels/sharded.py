"""The kernel for gradients that are sharded over processes: at most two collectives per process group."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_znorm.gradients.kernels.dispatch import pointer_tables, transform_segments_
from lightning_znorm.gradients.kernels.torch_ops import (
    add_and_multiply_,
    block_numel,
    contiguous_buffers,
    offset_and_scale,
    shift_and_scale,
    split_by_buffer,
)
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
        batches = _batches_by_row_and_tensor(shards)
    else:
        local_segments: list[Segment] = []
        by_groups: defaultdict[tuple[ProcessGroup, ...], list[Shard]] = defaultdict(list)
        for shard in shards:
            if groups := shard.reduce_groups(method.over):
                by_groups[groups].append(shard)
            else:
                local_segments += shard.segments(method.over)
        transform_segments_(local_segments, method, loss_scale)
        batches = [
            ShardBatch(members, method.over, groups, needs_std=method.needs_std)
            for groups, members in by_groups.items()
        ]
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
        ShardBatch(members, "tensor", groups, needs_std=True, read_only=True) for groups, members in by_groups.items()
    ]
    _reduce_(batches, needs_std=True)
    device = batches[0].m2.device
    return (
        [shard for members in by_groups.values() for shard in members],
        torch.cat([batch.mean.to(device) for batch in batches]),
        torch.cat([batch.m2.to(device) for batch in batches]),
    )


def _batches_by_row_and_tensor(shards: Iterable[Shard]) -> list["ShardBatch"]:
    """Return batches with a mean for each row, and a squared deviation for each tensor.

    Only sums are reduced between the ranks that share rows, and after them only one number for each tensor.
    """
    by_groups: defaultdict[tuple[tuple[ProcessGroup, ...], tuple[ProcessGroup, ...], bool], list[Shard]]
    by_groups = defaultdict(list)
    for shard in shards:
        if shard.shape.numel() > 1:
            sum_groups = shard.reduce_groups("row") if shard.has_rows else ()
            by_groups[sum_groups, shard.reduce_groups("tensor"), shard.has_rows].append(shard)
    return [
        ShardBatch(members, "row" if has_rows else "tensor", sum_groups, m2_groups, needs_std=True)
        for (sum_groups, m2_groups, has_rows), members in by_groups.items()
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

    Statistics are in float64, whose sums neither overflow nor lose a digit of float32 ones.

    Args:
        shards: This process' parts of the gradients.
        over: What the means are taken over.
        sum_groups: The process groups over which the sums are reduced.
        m2_groups: The process groups over which squared deviations are reduced, if they are taken over whole tensors,
            whatever ``over`` is. Means of tensors without rows are then zero.
        needs_std: Whether the squared deviations are needed.
        read_only: Whether to leave the gradients as they are, and to measure single elements too.

    Attributes:
        sum_groups: The process groups over which the sums are reduced.
        m2_groups: The process groups over which the squared deviations are reduced.
        sums: Sums of all elements, shape ``(S,)``; complex if any of the gradients is.
        m2: Squared deviations of all elements from their mean, shape ``(S,)``, or one for each tensor.
    """

    def __init__(
        self,
        shards: Sequence[Shard],
        over: Over,
        sum_groups: tuple["ProcessGroup", ...],
        m2_groups: tuple["ProcessGroup", ...] | None = None,
        *,
        needs_std: bool,
        read_only: bool = False,
    ) -> None:
        self.sum_groups = sum_groups
        self.m2_groups = sum_groups if m2_groups is None else m2_groups
        self._needs_std, self._read_only = needs_std, read_only
        device = reachable_device(shards[0].device, self.m2_groups)
        sizes = tuple((shard.count(over), shard.num_stats(over)) for shard in shards)
        self._count = _counts(sizes, device)
        wide = self._count.dtype
        dtype = wide.to_complex() if any(shard.is_complex for shard in shards) else wide
        self.sums = torch.zeros(len(self._count), dtype=dtype, device=device)
        self.m2 = torch.zeros(len(self._count), dtype=wide, device=device)
        segments: list[Segment] = []
        start = 0
        for shard, (_, num_stats) in zip(shards, sizes, strict=True):
            segments += shard.segments(over, start, include_single=read_only)
            start += num_stats
        tables, self._segments = pointer_tables(segments)
        # A table takes all statistics in one pass.
        self._measured = [(_indices_of(table.segments, device), table, table.measure(needs_std)) for table in tables]
        for indices, _, stats in self._measured:
            self.sums.index_copy_(0, indices, (stats.count.double() * stats.mean.double()).to(device, dtype))
        for indices, _, buffers in self._buffers():
            sums = torch.cat([buffer.sum(-1).view(-1) for buffer in buffers])
            self.sums.index_copy_(0, indices, sums.to(device, dtype))
        # For each mean, the index of its tensor, if all rows of a tensor share a squared deviation.
        self._tensor_of: Tensor | None = None
        if m2_groups is not None:
            self._tensor_of = _tensor_indices(tuple(num_stats for _, num_stats in sizes), device)
            self._numel = _counts(tuple((shard.shape.numel(), 1) for shard in shards), device)
            if over == "tensor":
                self.sums.zero_()

    @property
    def mean(self) -> Tensor:
        """Means of all elements, shape ``(S,)``."""
        return self.sums / self._count

    def fill_m2_(self) -> None:
        """Take the squared deviations of the local elements from the common means, which are subtracted."""
        mean = self.mean
        for indices, _, stats in self._measured:
            assert stats.m2 is not None
            offset = stats.mean.double() - mean[indices].real.to(stats.mean.device)
            deviation = stats.m2.double() + stats.count.double() * offset.square()
            self.m2.index_copy_(0, indices, deviation.to(self.m2.device))
        for indices, is_exact, buffers in self._buffers():
            keep = self._read_only or not is_exact
            m2 = _subtract_(buffers, _like(mean[indices], buffers[0]), needs_std=True, keep=keep)
            assert m2 is not None
            self.m2.index_copy_(0, indices, m2.to(self.m2.device, self.m2.dtype))
        if self._tensor_of is not None:
            self.m2 = torch.zeros_like(self._numel).index_add_(0, self._tensor_of, self.m2)

    def transform_(self, method: AffineMethod, loss_scale: Tensor | None) -> None:
        """Apply a method to the local elements."""
        for indices, table, local in self._measured:
            table.rewrite_(*shift_and_scale(self._stats(indices, local.mean), method, loss_scale))
        for indices, is_exact, buffers in self._buffers():
            stats = self._stats(indices, buffers[0])
            if not (self._needs_std and is_exact):
                _subtract_(buffers, stats.mean, needs_std=False)
            add_and_multiply_(buffers, *offset_and_scale(stats, method, loss_scale))

    def _stats(self, indices: Tensor, like: Tensor) -> Statistics:
        """Return some of the statistics, in the type of a tensor and on its device."""
        count, m2, std_indices = self._count, self.m2, indices
        if self._tensor_of is not None:
            count, std_indices = self._numel, self._tensor_of[indices]
        return Statistics(
            _like(count[std_indices], like.real),
            _like(self.sums[indices] / self._count[indices], like),
            _like(m2[std_indices], like.real) if self._needs_std else None,
        )

    def _buffers(self) -> Iterator[tuple[Tensor, bool, list[Tensor]]]:
        """Yield the indices of statistics, whether gradients hold differences exactly, and the buffers.

        In half precision they do not: a difference may have more digits than the type, or be too large for it. So it is
        not kept until the next pass.
        """
        for segments, buffers in contiguous_buffers(self._segments, self._read_only):
            is_exact = segments[0].tensor.dtype == buffers[0].dtype
            yield _indices_of(segments, self.sums.device), is_exact, buffers


def _subtract_(buffers: list[Tensor], mean: Tensor, needs_std: bool, keep: bool = False) -> Tensor | None:
    """Subtract means, one for each flat tensor and row of a matrix, and return squared deviations if needed.

    With ``keep``, the buffers stay as they are, and differences take extra memory, a block of them at a time.
    """
    subtract = Tensor.sub if keep else Tensor.sub_
    m2s = []
    for buffer, buffer_mean in zip(buffers, split_by_buffer(mean, buffers), strict=True):
        if buffer.ndim > 1:
            difference = subtract(buffer, buffer_mean.unsqueeze(1))
            if needs_std:
                m2s.append(torch.linalg.vector_norm(difference, dim=1).square_())
            continue
        dot = torch.vdot if buffer.is_complex() else torch.dot
        blocks = []
        for block in torch.split(buffer, block_numel(buffer.device)):
            difference = subtract(block, buffer_mean)
            if needs_std:
                blocks.append(dot(difference, difference).real)  # while the block is in cache
        if needs_std:
            m2s.append(torch.stack(blocks).sum(0, keepdim=True))
    return torch.cat(m2s) if needs_std else None


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


def _indices_of(segments: Iterable[Segment], device: torch.device) -> Tensor:
    """Return the indices of the statistics that segments contribute to."""
    return _indices(tuple([(segment.start, segment.num_stats) for segment in segments]), device)


# All are cached because a copy to a device waits for it.
@lru_cache(maxsize=1024)
def _counts(sizes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Return the count of each of the statistics, in the widest type of the device.

    Args:
        sizes: For each gradient, the count and the number of its statistics.
        device: Where the result is to be.
    """
    counts, numbers = zip(*sizes, strict=True)
    wide = torch.float32 if device.type == "mps" else torch.float64
    return torch.tensor(counts, dtype=wide).repeat_interleave(torch.tensor(numbers)).to(device)


@lru_cache(maxsize=1024)
def _tensor_indices(numbers: tuple[int, ...], device: torch.device) -> Tensor:
    """Return for each of the statistics the index of its gradient, from the number of statistics of each gradient."""
    return torch.arange(len(numbers)).repeat_interleave(torch.tensor(numbers)).to(device)


@lru_cache(maxsize=1024)
def _indices(ranges: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Return the indices of several ranges, from the start and the length of each."""
    return torch.cat([torch.arange(start, start + length) for start, length in ranges]).to(device)
