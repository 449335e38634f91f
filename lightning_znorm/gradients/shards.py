"""What a process holds of a gradient that is spread over several, and how it belongs to the statistics of the whole."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_znorm.gradients.errors import UnsupportedGradientError
from lightning_znorm.gradients.methods import Over
from lightning_znorm.gradients.pieces import Piece

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def whole_pieces(grads: Iterable[Tensor], over: Over) -> list[Piece]:
    """Whole gradients as memory to transform, but for those that are empty, or whose rows are single elements."""
    if over == "row":
        return [Piece(grad, True) for grad in grads if grad.ndim > 1 and grad.numel() > grad.shape[0]]
    return [Piece(grad) for grad in grads if grad.numel() > 1]


def _has_deviation(shape: torch.Size, over: Over) -> bool:
    """Whether a tensor, or its rows, have several elements; all processes agree, because they know the whole shape."""
    return len(shape) > 1 and shape[1:].numel() > 1 if over == "row" else shape.numel() > 1


@dataclass(frozen=True, eq=False, kw_only=True)
class Shard(ABC):
    """This process' part of one gradient, of which process groups hold the rest.

    All their ranks make shards of the same gradients in the same order, whatever they hold of them.

    Attributes:
        local: Memory to rewrite in place; ``None`` if nothing of the gradient is here.
        shape: Of the whole gradient.
        device: Where the gradient's parts are, on this and on other ranks.
        is_complex: Whether its elements are.
    """

    local: Tensor | None
    shape: torch.Size
    device: torch.device
    is_complex: bool = False

    def groups(self, over: Over, single: bool = False) -> tuple["ProcessGroup", ...]:
        """Process groups over whose ranks statistics are summed, one after the other; none if what is here suffices.

        Args:
            over: What statistics are taken of.
            single: Whether those of single elements are of interest too.
        """
        return self._groups(over) if single or _has_deviation(self.shape, over) else ()

    @property
    def has_rows(self) -> bool:
        """Whether the whole gradient has rows of several elements."""
        return _has_deviation(self.shape, "row")

    @property
    def holders(self) -> tuple["ProcessGroup", ...]:
        """Process groups over whose ranks the gradient is spread, however few elements it has."""
        return self._groups("tensor")

    def entries(self, over: Over) -> int:
        """Number of statistics that the ranks of :meth:`groups` share."""
        return self._rows if over == "row" else 1

    def count(self, over: Over) -> int:
        """Number of elements behind each entry, on all processes together."""
        return self.shape[1:].numel() if over == "row" else self.shape.numel()

    def pieces(self, over: Over, start: int = 0, single: bool = False) -> list[Piece]:
        """The memory here, with the entries that it contributes to.

        Args:
            over: What statistics are taken of.
            start: Number of the shard's first entry.
            single: Whether those of single elements are of interest too.
        """
        if self.local is None or self.local.numel() == 0 or not (single or _has_deviation(self.shape, over)):
            return []
        return self._pieces(self.local, over, start)

    @property
    @abstractmethod
    def _rows(self) -> int: ...

    @abstractmethod
    def _groups(self, over: Over) -> tuple["ProcessGroup", ...]: ...

    @abstractmethod
    def _pieces(self, local: Tensor, over: Over, start: int) -> list[Piece]: ...


@dataclass(frozen=True, eq=False, kw_only=True)
class BoxShard(Shard):
    """A box of the whole gradient, cut along dimensions (DTensor).

    Attributes:
        rows: Number of rows here.
        cuts: For each process group, the dimension that is cut over its ranks.
    """

    rows: int
    cuts: Mapping["ProcessGroup", int]

    @property
    def _rows(self) -> int:
        return self.rows

    def _groups(self, over: Over) -> tuple["ProcessGroup", ...]:
        # The ranks of a group that cuts the first dimension hold different rows, each of them whole.
        return tuple(group for group, dim in self.cuts.items() if over == "tensor" or dim > 0)

    def _pieces(self, local: Tensor, over: Over, start: int) -> list[Piece]:
        return [Piece(local, over == "row", start)]


def whole_shard(grad: Tensor) -> Shard:
    """A gradient of which everything is here."""
    rows = grad.shape[0] if grad.ndim else 1
    return BoxShard(local=grad, shape=grad.shape, device=grad.device, is_complex=grad.is_complex(), rows=rows, cuts={})


@dataclass(frozen=True, eq=False, kw_only=True)
class FlatShard(Shard):
    """An interval of the flattened gradient, which may begin and end in mid-row (FSDP1, DeepSpeed).

    Attributes:
        offset: Index, in the flattened gradient, of the first element here.
        group: The process group that holds the whole; ``None`` if all of it is here.
        in_rows: Whether it is flattened row by row.
    """

    offset: int
    group: "ProcessGroup | None"
    in_rows: bool = True

    @property
    def _rows(self) -> int:
        return self.shape[0]

    def _groups(self, over: Over) -> tuple["ProcessGroup", ...]:
        if over == "row" and not self.in_rows:
            raise UnsupportedGradientError(
                f"a gradient of shape {tuple(self.shape)} is flattened in an order that mixes its rows, because the "
                "parameter is not contiguous: make it contiguous before it is sharded"
            )
        return () if self.group is None else (self.group,)

    def _pieces(self, local: Tensor, over: Over, start: int) -> list[Piece]:
        flat = local.view(-1)
        if over == "tensor":
            return [Piece(flat, start=start)]
        length = self.shape[1:].numel()
        head = min(-self.offset % length, len(flat))  # the rest of a row that begins on another rank
        whole, tail = divmod(len(flat) - head, length)
        rows = flat[head : len(flat) - tail].view(whole, length)
        first = start + self.offset // length
        after_head = first + (head > 0)
        pieces = [
            Piece(flat[:head], start=first),
            Piece(rows, by_row=True, start=after_head),
            Piece(flat[len(flat) - tail :], start=after_head + whole),
        ]
        return [piece for piece in pieces if piece.tensor.numel() > 0]
