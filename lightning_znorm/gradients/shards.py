"""The part of a sharded gradient that a process holds, and the process groups that hold the other parts."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lightning_znorm.gradients.exceptions import UnsupportedGradientError
from lightning_znorm.gradients.methods import AffineMethod, Over, rows_share_std

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class Segment(NamedTuple):
    """Memory that a kernel reads, with one set of statistics (count, mean, M2), or with one for each row."""

    tensor: Tensor
    """Dense and not empty, of any shape and strides."""
    by_row: bool = False
    """Whether each index of the first dimension has its own statistics."""
    start: int = 0
    """Index of its first statistics, where several segments contribute to common ones."""

    @property
    def num_stats(self) -> int:
        """Number of sets of statistics."""
        return len(self.tensor) if self.by_row else 1


def unsharded_segments(grads: Iterable[Tensor], method: AffineMethod) -> list[Segment]:
    """Return the segments that a method transforms, without those of a single element, or with rows of one.

    Where rows have the deviation of their tensor, a tensor without rows of several elements is one segment.
    """
    if method.over == "row" and not rows_share_std(method):
        return [Segment(grad, True) for grad in grads if grad.ndim > 1 and grad.numel() > grad.shape[0]]
    by_row = method.over == "row"
    return [Segment(grad, by_row and _has_deviation(grad.shape, "row")) for grad in grads if grad.numel() > 1]


def _has_deviation(shape: torch.Size, over: Over) -> bool:
    """Return whether a tensor, or its rows, have several elements. All processes agree: they know the whole shape."""
    return len(shape) > 1 and shape[1:].numel() > 1 if over == "row" else shape.numel() > 1


@dataclass(frozen=True, eq=False, kw_only=True)
class Shard(ABC):
    """This process' part of one gradient, of which process groups hold the other parts.

    All their ranks make shards of the same gradients in the same order, whatever they hold of them.

    Attributes:
        local: Memory to rewrite in place; ``None`` if this process holds nothing of the gradient.
        shape: Shape of the unsharded gradient.
        device: Where the gradient's parts are, on this and on other ranks.
        is_complex: Whether its elements are complex.
    """

    local: Tensor | None
    shape: torch.Size
    device: torch.device
    is_complex: bool = False

    def reduce_groups(self, over: Over, include_single: bool = False) -> tuple["ProcessGroup", ...]:
        """Return the process groups over whose ranks statistics are summed, one after the other.

        Args:
            over: What statistics are taken over.
            include_single: Whether to take statistics of tensors or rows of a single element too.

        Returns:
            The groups; none if this process has all that the statistics need.

        Raises:
            UnsupportedGradientError: If the shard does not tell the rows that statistics are taken over.
        """
        return self._reduce_groups(over) if include_single or _has_deviation(self.shape, over) else ()

    @property
    def has_rows(self) -> bool:
        """Whether the unsharded gradient has rows of several elements."""
        return _has_deviation(self.shape, "row")

    @property
    def holders(self) -> tuple["ProcessGroup", ...]:
        """Process groups over whose ranks the gradient is sharded, however few elements it has."""
        return self._reduce_groups("tensor")

    def num_stats(self, over: Over) -> int:
        """Return the number of sets of statistics that the ranks of :meth:`reduce_groups` share."""
        return self._num_rows if over == "row" else 1

    def count(self, over: Over) -> int:
        """Return the number of elements of the tensor, or of each row, on all processes together."""
        return self.shape[1:].numel() if over == "row" else self.shape.numel()

    def segments(self, over: Over, start: int = 0, include_single: bool = False) -> list[Segment]:
        """Return the local memory, with the statistics that it contributes to.

        Args:
            over: What statistics are taken over.
            start: Index of the shard's first statistics.
            include_single: Whether to take statistics of tensors or rows of a single element too.
        """
        if self.local is None or self.local.numel() == 0 or not (include_single or _has_deviation(self.shape, over)):
            return []
        return self._segments(self.local, over, start)

    @property
    @abstractmethod
    def _num_rows(self) -> int: ...

    @abstractmethod
    def _reduce_groups(self, over: Over) -> tuple["ProcessGroup", ...]: ...

    @abstractmethod
    def _segments(self, local: Tensor, over: Over, start: int) -> list[Segment]: ...


@dataclass(frozen=True, eq=False, kw_only=True)
class BoxShard(Shard):
    """A box of the gradient, cut along dimensions (DTensor).

    Attributes:
        rows: Number of local rows.
        cuts: For each process group, the dimension that is cut over its ranks.
    """

    rows: int
    cuts: Mapping["ProcessGroup", int]

    @property
    def _num_rows(self) -> int:
        return self.rows

    def _reduce_groups(self, over: Over) -> tuple["ProcessGroup", ...]:
        # The ranks of a group that cuts the first dimension hold different rows, each of them complete.
        return tuple(group for group, dim in self.cuts.items() if over == "tensor" or dim > 0)

    def _segments(self, local: Tensor, over: Over, start: int) -> list[Segment]:
        return [Segment(local, over == "row", start)]


def as_shard(grad: Tensor) -> Shard:
    """Return an unsharded gradient as a shard that holds all of it."""
    rows = grad.shape[0] if grad.ndim else 1
    return BoxShard(local=grad, shape=grad.shape, device=grad.device, is_complex=grad.is_complex(), rows=rows, cuts={})


@dataclass(frozen=True, eq=False, kw_only=True)
class FlatShard(Shard):
    """An interval of the flattened gradient, which may begin and end in mid-row (FSDP1, DeepSpeed).

    Attributes:
        offset: Index, in the flattened gradient, of the first local element.
        group: The process group that holds the gradient; ``None`` if this process holds all of it.
        in_rows: Whether it is flattened row by row.
    """

    offset: int
    group: "ProcessGroup | None"
    in_rows: bool = True

    @property
    def _num_rows(self) -> int:
        return self.shape[0]

    def _reduce_groups(self, over: Over) -> tuple["ProcessGroup", ...]:
        if over == "row" and not self.in_rows:
            raise UnsupportedGradientError(
                f"a gradient of shape {tuple(self.shape)} is flattened in an order that mixes its rows, because the "
                "parameter is not contiguous: make it contiguous before it is sharded"
            )
        return () if self.group is None else (self.group,)

    def _segments(self, local: Tensor, over: Over, start: int) -> list[Segment]:
        flat = local.view(-1)
        if over == "tensor":
            return [Segment(flat, start=start)]
        length = self.shape[1:].numel()
        head = min(-self.offset % length, len(flat))  # the end of a row that begins on another rank
        num_complete, tail = divmod(len(flat) - head, length)
        rows = flat[head : len(flat) - tail].view(num_complete, length)
        first = start + self.offset // length
        after_head = first + (head > 0)
        segments = [
            Segment(flat[:head], start=first),
            Segment(rows, by_row=True, start=after_head),
            Segment(flat[len(flat) - tail :], start=after_head + num_complete),
        ]
        return [segment for segment in segments if segment.tensor.numel() > 0]
