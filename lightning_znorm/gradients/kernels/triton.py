"""The kernel in Triton: all tensors of a type in one launch per pass, through a table of pointers to them.

Two passes read every gradient twice and write it once. Where one program sees all elements that statistics are taken
over, it reads them once from memory. Beyond the gradients this takes a few numbers for each tensor or row, and for each
of at most 512 chunks of a large one. Only the first step with tensors of some sizes waits for the device, to which the
tables of these sizes are copied.

In small models, launches are the cost. A single launch, with a barrier across the device between the passes, would save
one of two. But it needs all programs to be resident at once, and deadlocks if they are not.
"""

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache

import torch
import triton.language as tl
from torch import Tensor

from lightning_znorm.gradients.kernels import triton_programs as programs
from lightning_znorm.gradients.kernels.caches import is_capturing, kept_on_device
from lightning_znorm.gradients.kernels.memory import UPCAST, in_memory_order
from lightning_znorm.gradients.kernels.table import Table
from lightning_znorm.gradients.methods import ROUNDING_UNITS, AffineMethod, Centralization, Statistics, ZScore
from lightning_znorm.gradients.shards import Segment

_TYPES = {
    torch.float16: tl.float16,
    torch.bfloat16: tl.bfloat16,
    torch.float32: tl.float32,
    torch.float64: tl.float64,
}

# 16 KiB in the registers of 128 threads, so that several tiles are under way on each multiprocessor. It was chosen from
# the sizes of its registers, and not measured.
_TILE = {torch.float32: 4096, torch.float64: 2048}
_WARPS = 4
# A row of up to so many tiles belongs to one program, which reads it once from memory: there are many rows.
_TILES_OF_ROW = 8
# Chunks of a long run: so few that every program can merge them all, and enough to keep a large device busy.
_MAX_CHUNKS = 512
# Tiles of a chunk, where there are many: they share the cost of a program's start.
_TILES_OF_CHUNK = 4

# Arithmetic as it is written, also where a compiler would fuse a product with a sum.
_OPTIONS = {"num_warps": _WARPS, "enable_fp_fusion": False}


def group_by_table(segments: Iterable[Segment]) -> tuple[list[list[Segment]], list[Segment]]:
    """Return groups of segments that a :class:`PointerTable` can be made of, and the unsupported segments."""
    groups: dict[tuple[int, torch.dtype, bool], list[Segment]] = {}
    unsupported = []
    for segment in segments:
        tensor, by_row, _ = segment
        dtype = tensor.dtype
        if dtype in _TYPES and (tensor.is_contiguous() or _is_dense(tensor, by_row)) and not tensor.is_neg():
            key = (tensor.get_device(), dtype, by_row)
            group = groups.get(key)
            if group is None:
                groups[key] = [segment]
            else:
                group.append(segment)
        else:
            unsupported.append(segment)
    return list(groups.values()), unsupported


def _is_dense(tensor: Tensor, by_row: bool) -> bool:
    """Return whether a tensor fills an interval of memory, row by row if need be."""
    memory_format = {4: torch.channels_last, 5: torch.channels_last_3d}.get(tensor.ndim)
    if memory_format is not None and tensor.is_contiguous(memory_format=memory_format):
        return True
    return in_memory_order(tensor, outermost=1 if by_row else 0).is_contiguous()


class PointerTable(Table):
    """Gradients of one type on one device, to measure and rewrite in place.

    Args:
        segments: Their memory, dense, with dimensions in any order; either all of it by row or none.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        self.segments = segments
        tensor, by_row, _ = segments[0]
        sizes = tuple([segment.tensor.shape if by_row else segment.tensor.numel() for segment in segments])
        self._plan = _launch_plan(sizes, tensor.dtype, tensor.device)
        self._addresses = _addresses(tuple([segment.tensor.data_ptr() for segment in segments]), tensor.device)

    def transform_(self, method: AffineMethod, loss_scale: Tensor | None = None) -> None:  # noqa: D102
        if type(method) is ZScore and method.centering == "full":
            if loss_scale is not None:
                loss_scale = loss_scale.to(self._plan.device, non_blocking=True)
            self._finish_(method.eps, loss_scale)
        elif type(method) is Centralization:
            self._finish_(None, None)
        else:
            super().transform_(method, loss_scale)

    def measure(self, needs_std: bool = True, from_zero: bool = False) -> Statistics:  # noqa: D102
        plan, by_row = self._plan, self.segments[0].by_row
        partials, means = plan.empty(2 * plan.chunks), plan.empty(plan.num_stats)
        m2s = plan.empty(plan.num_stats) if needs_std else None
        with _current(plan.device):
            self._first_pass(partials, means, m2s, None, 0.0, FINISH=False, NEEDS_STD=needs_std)
            if plan.runs is not None:
                constants = {"MAX_CHUNKS": _MAX_CHUNKS, "NEEDS_STD": needs_std, **_OPTIONS}
                constants |= {name: plan.constants[name] for name in ("WIDE", "TILE")}
                programs.merge[(len(plan.runs),)](plan.segments, plan.runs, partials, means, m2s, **constants)
        if from_zero and m2s is not None and not by_row:
            m2s = torch.addcmul(m2s.double(), means.double().square(), plan.counts).to(plan.wide)
            means = torch.zeros_like(means)
        return Statistics(plan.counts, means, m2s)

    def rewrite_(self, shift: Tensor | None, scale: Tensor | None) -> None:  # noqa: D102
        shift, scale = (None if part is None else part.to(self._plan.wide).contiguous() for part in (shift, scale))
        with _current(self._plan.device):
            self._second_pass(self._plan.items, None, shift, scale, None, 0.0, FINISH=False, NEEDS_STD=True)

    def _finish_(self, eps: float | None, loss_scale: Tensor | None) -> None:
        """Apply ``ZScore`` or, without an ``eps``, ``Centralization``, which the programs know themselves."""
        plan, needs_std, eps = self._plan, eps is not None, eps or 0.0
        partials = plan.empty(2 * plan.chunks)
        with _current(plan.device):
            self._first_pass(partials, None, None, loss_scale, eps, FINISH=True, NEEDS_STD=needs_std)
            if plan.chunks:
                items = plan.items[: plan.chunks]
                self._second_pass(items, partials, None, None, loss_scale, eps, FINISH=True, NEEDS_STD=needs_std)

    def _first_pass(self, *arguments: object, **constants: bool) -> None:
        plan = self._plan
        tables = (self._addresses, plan.segments, plan.items)
        programs.first_pass[(len(plan.items),)](*tables, *arguments, LONG=plan.long, **constants, **plan.constants)

    def _second_pass(self, items: Tensor, *arguments: object, **constants: bool) -> None:
        plan = self._plan
        tables = (self._addresses, plan.segments, items)
        programs.second_pass[(len(items),)](*tables, *arguments, MAX_CHUNKS=_MAX_CHUNKS, **constants, **plan.constants)


class _LaunchPlan:
    """How segments of some sizes are distributed over programs: :mod:`~.triton_programs` describes the tables.

    Attributes:
        device: Where the tables are.
        wide: Type of the statistics.
        long: Longer runs are cut into chunks.
        constants: What the programs of both passes are compiled for.
        num_stats: Number of sets of statistics, one for each run.
        chunks: Number of chunks.
        segments: The table of this name.
        counts: Number of elements of each run.
        items: The table of this name; chunks come first.
        runs: The table of this name, ``None`` if it is empty.
    """

    def __init__(self, sizes: Sequence[torch.Size | int], dtype: torch.dtype, device: torch.device) -> None:
        by_row = not isinstance(sizes[0], int)
        self.device = device
        self.wide = _wide(dtype)
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
        self.num_stats = self.chunks = 0
        table: list[tuple[int, ...]] = []
        long_items: list[Tensor] = []
        short_items: list[Tensor] = []
        runs: list[Tensor] = []
        for segment, size in enumerate(sizes):
            num_runs, length = (1, size) if isinstance(size, int) else (size[0], size[1:].numel())
            tiles_of_chunk, chunks = _cut(length, tile) if length > self.long else (-(-length // tile), 1)
            table.append((length, num_runs, tiles_of_chunk, chunks, self.num_stats, self.chunks))
            if length > self.long:
                long_items.append(_items_of(segment, num_runs * chunks))
                runs.append(_items_of(segment, num_runs))
                self.chunks += num_runs * chunks
            else:
                rows = _rows_of_program(length) if by_row else 1
                short_items.append(_items_of(segment, -(-num_runs // rows)))
            self.num_stats += num_runs
        on_host = torch.tensor(table, dtype=torch.int64, device="cpu")
        counts = on_host[:, 0].to(self.wide).repeat_interleave(on_host[:, 1], output_size=self.num_stats)
        self.counts = counts.to(device)
        self.segments = on_host.to(device)
        self.items = torch.cat(long_items + short_items).to(device)
        self.runs = torch.cat(runs).to(device) if runs else None

    def empty(self, numel: int) -> Tensor:
        """Return memory for statistics."""
        return torch.empty(numel, dtype=self.wide, device=self.device)


def _wide(dtype: torch.dtype) -> torch.dtype:
    """Return the type of the statistics."""
    return UPCAST.get(dtype, dtype)


def _cut(length: int, tile: int) -> tuple[int, int]:
    """Return the number of tiles in each chunk of a long run, and the number of chunks."""
    tiles = -(-length // tile)
    tiles_of_chunk = max(-(-tiles // _MAX_CHUNKS), min(_TILES_OF_CHUNK, -(-tiles // 64)))
    return tiles_of_chunk, -(-tiles // tiles_of_chunk)


def _rows_of_program(length: int) -> int:
    """Return how many rows of a length a program takes."""
    narrow, steps = int(programs.NARROW.value), int(programs.STEPS.value)
    if length > narrow:
        return 1
    return max(2 << 2 * step for step in range(steps) if length <= narrow >> 2 * step)


def shapes_of_all_routes(dtype: torch.dtype, by_row: bool) -> list[tuple[int, ...]]:
    """Return shapes that together take all routes through the programs, on both sides of limits between two.

    The last one is the longest.
    """
    tile, part, narrow = _TILE[_wide(dtype)], int(programs.PART.value), int(programs.NARROW.value)
    if not by_row:
        # Less than a part, parts, a tile, two chunks, chunks of one tile, chunks of two tiles.
        return [(length,) for length in (2, part + 1, tile, tile + 1, 3 * tile + 5, 64 * tile + part + 3)]
    shapes: list[tuple[int, ...]] = []
    for length in (2, *(narrow >> 2 * step for step in range(int(programs.STEPS.value)))):
        shapes += [(_rows_of_program(length) + 1, length), (_rows_of_program(length + 1) + 1, length + 1)]
    return [*shapes, *((2, length) for length in (tile, tile + 3, _TILES_OF_ROW * tile, _TILES_OF_ROW * tile + 3))]


def _items_of(segment: int, num_programs: int) -> Tensor:
    """Return the rows of the table ``items`` for the programs of a segment."""
    return torch.arange(num_programs, dtype=torch.int64, device="cpu") + (segment << 32)


_launch_plan = kept_on_device(maxsize=64)(_LaunchPlan)


def _addresses(addresses: tuple[int, ...], device: torch.device) -> Tensor:
    """Return a table of addresses on a device, without waiting for it."""
    if not is_capturing(device):
        stream = torch.cuda.current_stream(device).cuda_stream if device.type == "cuda" else 0
        return _uploaded(addresses, device, stream)
    # Each replay of the graph would repeat a copy from host memory, which has long been put to other use. So the
    # addresses travel as arguments of kernels, a hundred at a time, which only this private function of torch does.
    table = torch.zeros(len(addresses), dtype=torch.int64, device=device)
    torch._foreach_add_(list(table.unbind()), list(addresses))
    return table


# Gradients mostly come back to the same few addresses. On another stream, a copy might not have arrived.
@lru_cache(maxsize=64)
def _uploaded(addresses: tuple[int, ...], device: torch.device, stream: int) -> Tensor:
    on_host = torch.tensor(addresses, dtype=torch.int64, device="cpu", pin_memory=device.type == "cuda")
    return on_host.to(device, non_blocking=True)


def _current(device: torch.device) -> AbstractContextManager[object]:
    """Make a device the one that Triton launches on."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()
