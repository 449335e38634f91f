"""The affine kernel in Triton: all tensors of a type in one launch per pass, through a table of their addresses.

Two passes read every gradient twice and write it once; or once and once, where one program sees all that statistics are
taken of. Beyond the gradients this takes a few numbers for each tensor or row, and for each of at most 512 segments of
a large one. Nothing waits for the device but the first step with tensors of some sizes, whose tables go there.

Launches are what costs in small models. The gradients of ResNet-56 (3.4 MB, which stay in the second-level cache) are
2.4 us of an H200's memory traffic (a copy moves about 4.3 TB/s), in two launches of some 2 us there and 10 us or more
of a CPU. A single launch, with a barrier across the device between the passes, would save one of each, of a training
step of more than 10 ms, and needs all programs to be resident at once: it is not worth its dangers.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
import triton.language as tl
from torch import Tensor

from lightning_znorm.gradients.kernels import programs
from lightning_znorm.gradients.kernels.layout import in_memory_order
from lightning_znorm.gradients.kernels.maps import affine_map
from lightning_znorm.gradients.methods import AffineMethod, Centralization, ZScore
from lightning_znorm.gradients.pieces import Piece
from lightning_znorm.gradients.statistics import ROUNDING_UNITS, Statistics

_TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}

# 16 KiB in the registers of 128 threads. At 56 registers a thread, 9 such tiles are under way on each multiprocessor of
# an A100 or H200: several times the bytes that hide the latency of their memory.
_TILE = {torch.float32: 4096, torch.float64: 2048}
_WARPS = 4
# A row of up to so many tiles is one program's, which reads it once from memory: there are many rows.
_TILES_OF_ROW = 8
# Segments of a long run: so few that every program can merge them all, and enough to keep a large device busy.
_MAX_SEGMENTS = 512
# Tiles of a segment, where there are many: they share the cost of a program's start.
_TILES_OF_SEGMENT = 4

# Arithmetic as it is written, also where a compiler would fuse a product with a sum.
_OPTIONS = {"num_warps": _WARPS, "enable_fp_fusion": False}


def alike(pieces: Iterable[Piece]) -> tuple[list[list[Piece]], list[Piece]]:
    """Sorts pieces into groups that a :class:`Table` can be made of, and those that fit in none."""
    groups: dict[tuple[int, torch.dtype, bool], list[Piece]] = {}
    rest = []
    for piece in pieces:
        tensor, by_row, _ = piece
        dtype = tensor.dtype
        if dtype in _TYPES and (tensor.is_contiguous() or _is_dense(tensor, by_row)) and not tensor.is_neg():
            key = (tensor.get_device(), dtype, by_row)
            group = groups.get(key)
            if group is None:
                groups[key] = [piece]
            else:
                group.append(piece)
        else:
            rest.append(piece)
    return list(groups.values()), rest


def _is_dense(tensor: Tensor, by_row: bool) -> bool:
    """Whether a tensor fills an interval of memory, row by row if need be."""
    memory_format = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.ndim)
    if memory_format is not None and tensor.is_contiguous(memory_format=memory_format):
        return True
    return in_memory_order(tensor, outermost=1 if by_row else 0).is_contiguous()


class Table:
    """Gradients of one type on one device, to measure and rewrite in place.

    Attributes:
        pieces: Their memory, contiguous but for the order of dimensions; either all of it by row or none. The entries
            of statistics are those of the pieces in this order.
    """

    def __init__(self, pieces: Sequence[Piece]) -> None:
        self.pieces = pieces
        tensor, by_row, _ = pieces[0]
        sizes = tuple([piece.tensor.shape if by_row else piece.tensor.numel() for piece in pieces])
        self._layout = _layout(sizes, tensor.dtype, tensor.device)
        self._addresses = _addresses(tuple([piece.tensor.data_ptr() for piece in pieces]), tensor.device)
        if _is_capturing(tensor.device):
            _captured.add(self._layout)

    def transform_(self, method: AffineMethod, loss_scale: Tensor | None = None) -> None:
        """Applies a method, as :func:`~lightning_znorm.gradients.kernels.blockwise.affine_` does."""
        if type(method) is ZScore:
            if loss_scale is not None:
                loss_scale = loss_scale.to(self._layout.device, non_blocking=True)
            self._finish_(method.eps, loss_scale)
        elif type(method) is Centralization:
            self._finish_(None, None)
        else:
            self.rewrite_(*affine_map(self.measure(method.needs_std), method, loss_scale))

    def measure(self, needs_std: bool = True) -> Statistics:
        """Statistics of the entries, without the squared deviations if they are not needed."""
        layout = self._layout
        partials, means = layout.empty(2 * layout.segments), layout.empty(layout.entries)
        m2s = layout.empty(layout.entries) if needs_std else None
        with _current(layout.device):
            self._first_pass(partials, means, m2s, None, 0.0, FINISH=False, NEEDS_STD=needs_std)
            if layout.runs is not None:
                constants = {"MAX_SEGMENTS": _MAX_SEGMENTS, "NEEDS_STD": needs_std, **_OPTIONS}
                constants |= {name: layout.constants[name] for name in ("WIDE", "TILE")}
                programs.merge[(len(layout.runs),)](layout.pieces, layout.runs, partials, means, m2s, **constants)
        return Statistics(layout.counts(), means, m2s)

    def rewrite_(self, shift: Tensor | None, scale: Tensor | None) -> None:
        """Replaces each entry ``g`` by ``(g - shift) * scale``, where ``None`` is no shift and no scale."""
        shift, scale = (None if part is None else part.to(self._layout.wide).contiguous() for part in (shift, scale))
        with _current(self._layout.device):
            self._second_pass(self._layout.items, None, shift, scale, None, 0.0, FINISH=False, NEEDS_STD=True)

    def _finish_(self, eps: float | None, loss_scale: Tensor | None) -> None:
        """Applies ``ZScore`` or, without an ``eps``, ``Centralization``: the programs know how."""
        layout, needs_std, eps = self._layout, eps is not None, eps or 0.0
        partials = layout.empty(2 * layout.segments)
        with _current(layout.device):
            self._first_pass(partials, None, None, loss_scale, eps, FINISH=True, NEEDS_STD=needs_std)
            if layout.segments:
                items = layout.items[: layout.segments]
                self._second_pass(items, partials, None, None, loss_scale, eps, FINISH=True, NEEDS_STD=needs_std)

    def _first_pass(self, *arguments: object, **constants: bool) -> None:
        layout = self._layout
        tables = (self._addresses, layout.pieces, layout.items)
        programs.first_pass[(len(layout.items),)](
            *tables, *arguments, LONG=layout.long, **constants, **layout.constants
        )

    def _second_pass(self, items: Tensor, *arguments: object, **constants: bool) -> None:
        layout = self._layout
        tables = (self._addresses, layout.pieces, items)
        programs.second_pass[(len(items),)](
            *tables, *arguments, MAX_SEGMENTS=_MAX_SEGMENTS, **constants, **layout.constants
        )


class _Layout:
    """How pieces of some sizes are dealt out to programs: see :mod:`lightning_znorm.gradients.kernels.programs`.

    Attributes:
        device: Where the tables are.
        wide: Type of the statistics.
        long: Longer runs are cut into segments.
        constants: What the programs of both passes are compiled for.
        entries: Number of entries.
        segments: Number of segments.
        pieces: The table of this name.
        items: The table of this name; segments come first.
        runs: The table of this name, ``None`` if it is empty.
    """

    def __init__(self, sizes: Sequence[torch.Size | int], dtype: torch.dtype, device: torch.device) -> None:
        by_row = not isinstance(sizes[0], int)
        self.device = device
        self.wide = torch.float64 if dtype == torch.float64 else torch.float32
        tile = _TILE[self.wide]
        self.long = tile * (_TILES_OF_ROW if by_row else 1)
        self.constants = {
            "ROUNDING": ROUNDING_UNITS * torch.finfo(self.wide).eps,
            "BY_ROW": by_row,
            "DTYPE": _TYPES[dtype],
            "SIZE": dtype.itemsize,
            "WIDE": _TYPES[self.wide],
            "TILE": tile,
            **_OPTIONS,
        }
        self.entries = self.segments = 0
        table: list[tuple[int, ...]] = []
        long_items: list[Tensor] = []
        short_items: list[Tensor] = []
        runs: list[Tensor] = []
        for piece, size in enumerate(sizes):
            entries, length = (1, size) if isinstance(size, int) else (size[0], size[1:].numel())
            tiles_of_segment, segments = _cut(length, tile) if length > self.long else (-(-length // tile), 1)
            table.append((length, entries, tiles_of_segment, segments, self.entries, self.segments))
            if length > self.long:
                long_items.append(_numbered(piece, entries * segments))
                runs.append(_numbered(piece, entries))
                self.segments += entries * segments
            else:
                rows = _rows_of_program(length) if by_row else 1
                short_items.append(_numbered(piece, -(-entries // rows)))
            self.entries += entries
        self._lengths = [row[:2] for row in table]
        self.pieces = torch.tensor(table, dtype=torch.int64, device="cpu").to(device)
        self.items = torch.cat(long_items + short_items).to(device)
        self.runs = torch.cat(runs).to(device) if runs else None
        self._counts: Tensor | None = None

    def counts(self) -> Tensor:
        """Elements behind each entry."""
        if self._counts is None:
            lengths, entries = torch.tensor(self._lengths, dtype=torch.int64, device="cpu").unbind(1)
            self._counts = lengths.to(self.wide).repeat_interleave(entries).to(self.device)
        return self._counts

    def empty(self, numel: int) -> Tensor:
        """Memory for statistics."""
        return torch.empty(numel, dtype=self.wide, device=self.device)


def _cut(length: int, tile: int) -> tuple[int, int]:
    """Tiles in each segment of a long run, and segments."""
    tiles = -(-length // tile)
    tiles_of_segment = max(-(-tiles // _MAX_SEGMENTS), min(_TILES_OF_SEGMENT, -(-tiles // 64)))
    return tiles_of_segment, -(-tiles // tiles_of_segment)


def _rows_of_program(length: int) -> int:
    """How many rows of a length a program takes."""
    narrow, steps = int(programs.NARROW.value), int(programs.STEPS.value)
    if length > narrow:
        return 1
    return max(2 << 2 * step for step in range(steps) if length <= narrow >> 2 * step)


def _numbered(piece: int, programs: int) -> Tensor:
    """The items of a piece."""
    return torch.arange(programs, dtype=torch.int64, device="cpu") + (piece << 32)


# Tables that a captured CUDA graph reads: as long as the graph may be replayed, that is, for good.
_captured: set[_Layout] = set()

_layout = lru_cache(maxsize=64)(_Layout)


def _addresses(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """A table of addresses on a device, which nothing waits for."""
    if not _is_capturing(device):
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        return _uploaded(addresses, device, stream)
    # A copy from host memory would be repeated by each replay of the graph, from memory that is long in other use. So
    # the addresses travel as arguments of kernels, a hundred at a time.
    table = torch.zeros(len(addresses), dtype=torch.int64, device=device)
    torch._foreach_add_(list(table.unbind()), list(addresses))
    return table


# Gradients mostly come back to the same few addresses. On another stream, a copy might not have arrived.
@lru_cache(maxsize=64)
def _uploaded(addresses: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    on_host = torch.tensor(addresses, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
    return on_host.to(device, non_blocking=True)


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Makes a device the one that Triton launches on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()
