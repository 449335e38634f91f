"""The affine kernel where gradients are spread over processes: at most two collectives per process group."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_znorm.gradients.kernels.blockwise import (
    _CPU_BLOCK,
    _DEVICE_BLOCK,
    rewrite_,
)
from lightning_znorm.gradients.kernels.dispatch import affine_, tables_of
from lightning_znorm.gradients.kernels.layout import workspaces
from lightning_znorm.gradients.kernels.maps import affine_map, residual_map
from lightning_znorm.gradients.methods import AffineMethod, Over
from lightning_znorm.gradients.pieces import Piece
from lightning_znorm.gradients.shards import Shard
from lightning_znorm.gradients.statistics import Statistics

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@torch.no_grad()
def affine_shards_(shards: Iterable[Shard], method: AffineMethod, loss_scale: Tensor | None = None) -> None:
    """Replaces this process' shards of gradients by the method's, in place, with the statistics of the whole gradients.

    Sums of what each process holds travel first, and squared deviations from the common mean after them: two
    collectives for each process group, or one if the method needs no deviation, however many gradients. Nothing is
    subtracted but the common mean: an outlier in a small shard would take the digits of its neighbours.

    Args:
        shards: The same gradients in the same order on all processes, whatever each holds of them.
        method: Gives shift and scale from the statistics of each tensor or row.
        loss_scale: As for :func:`~lightning_znorm.gradients.kernels.blockwise.affine_`.
    """
    if method.pooled:
        tables = _pooled_tables(shards)
        _share_(tables, needs_std=True)
        for table in tables:
            table.rewrite_(method, loss_scale)
        return
    here: list[Piece] = []
    spread: defaultdict[tuple[ProcessGroup, ...], list[Shard]] = defaultdict(list)
    for shard in shards:
        if groups := shard.groups(method.over):
            spread[groups].append(shard)
        else:
            here += shard.pieces(method.over)
    affine_(here, method, loss_scale)
    tables = [_Table(groups, members, method.over, method.needs_std) for groups, members in spread.items()]
    _share_(tables, method.needs_std)
    for table in tables:
        table.rewrite_(method, loss_scale)


@torch.no_grad()
def measure_shards(shards: Iterable[Shard]) -> tuple[list[Shard], Tensor, Tensor]:
    """Statistics of whole gradients, in as many collectives as normalizing them would take, without changing them.

    Args:
        shards: The same gradients in the same order on all processes, whatever each holds of them; none is empty.

    Returns:
        The shards in the order of the statistics, the means, and the squared deviations of all elements, both of shape
        ``(S,)``, in float64 (float32 where there is none) on a device of the gradients'; the means are complex if any
        gradient is.
    """
    spread: defaultdict[tuple[ProcessGroup, ...], list[Shard]] = defaultdict(list)
    for shard in shards:
        spread[shard.groups("tensor", single=True)].append(shard)
    tables = [_Table(groups, members, "tensor", True, read_only=True) for groups, members in spread.items()]
    _share_(tables, needs_std=True)
    device = tables[0].m2.device
    return (
        [shard for members in spread.values() for shard in members],
        torch.cat([table.mean.to(device) for table in tables]),
        torch.cat([table.m2.to(device) for table in tables]),
    )


def _pooled_tables(shards: Iterable[Shard]) -> list["_Table"]:
    """Tables with a mean for each row, and a squared deviation for each tensor: see :attr:`AffineMethod.pooled`.

    Only means travel between the ranks that share rows, and only one number for each tensor after them.
    """
    spread: defaultdict[tuple[tuple[ProcessGroup, ...], tuple[ProcessGroup, ...], bool], list[Shard]]
    spread = defaultdict(list)
    for shard in shards:
        if shard.shape.numel() > 1:
            of_means = shard.groups("row") if shard.has_rows else ()
            spread[of_means, shard.groups("tensor"), shard.has_rows].append(shard)
    return [
        _Table(of_means, members, "row" if rows else "tensor", True, pooled_over=of_all)
        for (of_means, of_all, rows), members in spread.items()
    ]


def _share_(tables: list["_Table"], needs_std: bool) -> None:
    """Completes tables by what other ranks hold."""
    _all_reduce_([(table.groups, table.sums) for table in tables])
    if needs_std:
        for table in tables:
            table.fill_m2_()
        _all_reduce_([(table.m2_groups, table.m2) for table in tables])


class _Table:
    """Statistics of gradients that are spread over the same process groups: an entry for each tensor or row of them.

    In float64, whose sums neither overflow nor lose a digit of float32 ones.

    Args:
        groups: The process groups.
        shards: What is here of the gradients.
        over: Whether an entry is of a tensor or of a row.
        needs_std: Whether the squared deviations are needed.
        read_only: Leaves the gradients as they are, and measures single elements too.
        pooled_over: Process groups that hold the rest of each tensor, if squared deviations are to be those of whole
            tensors; means of tensors without rows are then zero.

    Attributes:
        groups: The process groups.
        m2_groups: Those over which the squared deviations are summed.
        sums: Of all elements, shape ``(S,)``; complex if any of the gradients is.
        m2: Squared deviations of all elements from their mean, shape ``(S,)``; if pooled, one for each tensor.
    """

    def __init__(
        self,
        groups: tuple["ProcessGroup", ...],
        shards: Sequence[Shard],
        over: Over,
        needs_std: bool,
        read_only: bool = False,
        pooled_over: tuple["ProcessGroup", ...] | None = None,
    ) -> None:
        self.groups = groups
        self.m2_groups = groups if pooled_over is None else pooled_over
        self._needs_std, self._read_only = needs_std, read_only
        device = reachable_device(shards[0].device, self.m2_groups)
        sizes = tuple((shard.count(over), shard.entries(over)) for shard in shards)
        self._count = _counts(sizes, device)
        wide = self._count.dtype
        dtype = wide.to_complex() if any(shard.is_complex for shard in shards) else wide
        self.sums = torch.zeros(len(self._count), dtype=dtype, device=device)
        self.m2 = torch.zeros(len(self._count), dtype=wide, device=device)
        pieces: list[Piece] = []
        start = 0
        for shard, (_, entries) in zip(shards, sizes, strict=True):
            pieces += shard.pieces(over, start, single=read_only)
            start += entries
        pointer_tables, self._pieces = tables_of(pieces)
        # One pass for all that is to be known of them.
        self._measured = [
            (_index_of(table.pieces, device), table, table.measure(needs_std)) for table in pointer_tables
        ]
        for index, _, stats in self._measured:
            self.sums.index_copy_(0, index, (stats.count.double() * stats.mean.double()).to(device, dtype))
        for index, _, works in self._chunks():
            sums = torch.cat([work.sum(-1).view(-1) for work in works])
            self.sums.index_copy_(0, index, sums.to(device, dtype))
        self._tensors: Tensor | None = None
        if pooled_over is not None:
            self._tensors = _numbers(tuple(entries for _, entries in sizes), device)
            self._numel = _counts(tuple((shard.shape.numel(), 1) for shard in shards), device)
            if over == "tensor":
                self.sums.zero_()

    @property
    def mean(self) -> Tensor:
        """Of all elements, shape ``(S,)``."""
        return self.sums / self._count

    def fill_m2_(self) -> None:
        """Fills in the squared deviations of the elements here from the common means, which are subtracted."""
        mean = self.mean
        for index, _, stats in self._measured:
            assert stats.m2 is not None
            offset = stats.mean.double() - mean[index].real.to(stats.mean.device)
            deviation = stats.m2.double() + stats.count.double() * offset.square()
            self.m2.index_copy_(0, index, deviation.to(self.m2.device))
        for index, lasting, works in self._chunks():
            keep = self._read_only or not lasting
            m2 = _center_(works, _like(mean[index], works[0]), needs_std=True, keep=keep)
            assert m2 is not None
            self.m2.index_copy_(0, index, m2.to(self.m2.device, self.m2.dtype))
        if self._tensors is not None:
            self.m2 = torch.zeros_like(self._numel).index_add_(0, self._tensors, self.m2)

    def rewrite_(self, method: AffineMethod, loss_scale: Tensor | None) -> None:
        """Applies the method."""
        for index, table, local in self._measured:
            table.rewrite_(*affine_map(self._stats(index, local.mean), method, loss_scale))
        for index, lasting, works in self._chunks():
            stats = self._stats(index, works[0])
            if not (self._needs_std and lasting):
                _center_(works, stats.mean, needs_std=False)
            rewrite_(works, *residual_map(stats, method, loss_scale))

    def _stats(self, index: Tensor, like: Tensor) -> Statistics:
        """Statistics of some entries, in the type of a tensor and on its device."""
        count, m2, own = self._count, self.m2, index
        if self._tensors is not None:
            count, own = self._numel, self._tensors[index]
        return Statistics(
            _like(count[own], like.real),
            _like(self.sums[index] / self._count[index], like),
            _like(m2[own], like.real) if self._needs_std else None,
        )

    def _chunks(self) -> Iterator[tuple[Tensor, bool, list[Tensor]]]:
        """Yields workspaces with the numbers of their entries, and whether what is left in them lasts to the next time.

        In half precision it does not: the rest of a subtraction may have more digits than there are, or be too large.
        """
        for pieces, works in workspaces(self._pieces, self._read_only):
            yield _index_of(pieces, self.sums.device), pieces[0].tensor.dtype == works[0].dtype, works


def _center_(works: list[Tensor], mean: Tensor, needs_std: bool, keep: bool = False) -> Tensor | None:
    """Subtracts means, one for each flat tensor and each row of a matrix, and returns squared deviations if needed.

    To ``keep`` what is there, differences go to memory of their own, a block of them at a time.
    """
    subtract = Tensor.sub if keep else Tensor.sub_
    own_means = torch.split(mean, [1 if work.ndim == 1 else len(work) for work in works])
    m2s = []
    for work, own in zip(works, own_means, strict=True):
        if work.ndim > 1:
            rest = subtract(work, own.unsqueeze(1))
            if needs_std:
                m2s.append(torch.linalg.vector_norm(rest, dim=1).square_())
            continue
        dot = torch.vdot if work.is_complex() else torch.dot
        parts = []
        for part in torch.split(work, _CPU_BLOCK if work.device.type == "cpu" else _DEVICE_BLOCK):
            rest = subtract(part, own)
            if needs_std:
                parts.append(dot(rest, rest).real)  # while the part is in cache
        if needs_std:
            m2s.append(torch.stack(parts).sum(0, keepdim=True))
    return torch.cat(m2s) if needs_std else None


def _like(entries: Tensor, work: Tensor) -> Tensor:
    """Entries in the type, and on the device, of a workspace."""
    return (entries if work.is_complex() else entries.real).to(work.device, work.dtype)


def _all_reduce_(vectors: Sequence[tuple[tuple["ProcessGroup", ...], Tensor]]) -> None:
    """Sums each vector over the ranks of its groups, group after group; all vectors of a group at once.

    All processes take the groups in the same order, that in which their gradients name them.
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
            for member, reduced in zip(
                members, torch.split(together, [len(member) for member in members]), strict=True
            ):
                member.copy_(reduced)


def reachable_device(device: torch.device, groups: tuple["ProcessGroup", ...]) -> torch.device:
    """The device, or another if the groups' backends cannot communicate from there (NCCL cannot from the CPU)."""
    for group in groups:
        types = [reachable.type for reachable in group._device_types]
        if device.type not in types:
            return torch.device(types[0])
    return device


def _index_of(pieces: Iterable[Piece], device: torch.device) -> Tensor:
    """The numbers of the entries that pieces contribute to."""
    return _indices(tuple([(piece.start, piece.entries) for piece in pieces]), device)


# Both are cached because a copy to a device waits for it.
@lru_cache(maxsize=1024)
def _counts(sizes: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """Elements behind each entry, from elements and entries of each gradient; of the widest type of the device."""
    counts, entries = zip(*sizes, strict=True)
    wide = torch.float32 if device.type == "mps" else torch.float64
    return torch.tensor(counts, dtype=wide).repeat_interleave(torch.tensor(entries)).to(device)


@lru_cache(maxsize=1024)
def _numbers(entries: tuple[int, ...], device: torch.device) -> Tensor:
    """The number of its gradient for each entry, from the entries of each."""
    return torch.arange(len(entries)).repeat_interleave(torch.tensor(entries)).to(device)


@lru_cache(maxsize=1024)
def _indices(ranges: tuple[tuple[int, int], ...], device: torch.device) -> Tensor:
    """The numbers of the entries, from where each range of them begins and its length."""
    return torch.cat([torch.arange(start, start + length) for start, length in ranges]).to(device)
