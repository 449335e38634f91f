# mypy: ignore-errors
"""Triton programs that measure and rewrite memory behind a table of addresses; imported where a device runs them.

A *piece* is contiguous memory of ``entries`` runs of ``length`` elements, each with its own statistics: a whole tensor,
or its rows. *Long* runs are cut into a limited number of *segments*, a program each, whose means and squared deviations
are merged when all are there. Of a *short* run one program sees all, or of several *narrow* ones, and can finish them
in the first pass. How a run is cut depends on its length and its address modulo 16 alone, and all sums have a fixed
order: its result is the same to the bit whenever it is computed, whatever else is in the tables.

The tables, which :mod:`lightning_znorm.gradients.kernels.pointer_table` makes:

- ``addresses``: where each piece begins.
- ``pieces``: of each piece its length, entries, tiles in a segment, segments in an entry, and the numbers of its first
  entry and of its first segment.
- ``items``: of each program the number of its piece, times 2^32, plus that of the segment or tile of rows in it.
- ``partials``: mean and squared deviation of each segment.

Written for the memory's limit: nothing but one division of integers, and one or two sums over a tile that is in
registers, stands between loads. Loads and stores are 16 bytes wide in whole tiles, which begin at the first multiple of
16 bytes in their segment: gradients in a bucket may begin anywhere. What is before and after them goes in masked parts,
whose 64-bit pointers take more registers than a tile of values, so that they are smaller. Offsets in memory are 64-bit.
"""

import triton
import triton.language as tl

# Rows of up to NARROW elements are narrow: a program takes two of them, or 8, 32 or 128, the narrower the more.
NARROW = tl.constexpr(1024)
STEPS = tl.constexpr(4)
# Elements of a masked part.
PART = tl.constexpr(1024)


@triton.jit
def first_pass(
    addresses,
    pieces,
    items,
    partials,
    means,
    m2s,
    loss_scale,
    EPS: tl.constexpr,
    ROUNDING: tl.constexpr,
    FINISH: tl.constexpr,
    NEEDS_STD: tl.constexpr,
    BY_ROW: tl.constexpr,
    DTYPE: tl.constexpr,
    SIZE: tl.constexpr,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,
    LONG: tl.constexpr,
):
    """Measures segments into ``partials``, and short runs into ``means`` and ``m2s``; or finishes these at once."""
    item = tl.load(items + tl.program_id(0))
    piece = pieces + 6 * (item >> 32)
    number = item & 0xFFFFFFFF
    address = tl.load(addresses + (item >> 32))
    length = tl.load(piece)
    if length > LONG:
        segment_length = tl.load(piece + 2) * TILE
        segments = tl.load(piece + 3)
        begin = number % segments * segment_length
        count = tl.minimum(segment_length, length - begin)
        run = address + (number // segments * length + begin) * SIZE
        mean, m2 = _measure(run, count, NEEDS_STD, DTYPE, SIZE, WIDE, TILE)
        partial = tl.load(piece + 5) + number
        tl.store(partials + 2 * partial, mean)
        tl.store(partials + 2 * partial + 1, m2)
    elif not BY_ROW or length > NARROW:
        run = address + number * length * SIZE
        mean, m2 = _measure(run, length, NEEDS_STD, DTYPE, SIZE, WIDE, TILE)
        if FINISH:
            # What has just been read is in cache.
            scale = _zscore_scale(mean, m2, length, loss_scale, EPS, ROUNDING, WIDE) if NEEDS_STD else mean
            _rewrite(run, length, mean, scale, True, NEEDS_STD, DTYPE, SIZE, WIDE, TILE)
        else:
            entry = tl.load(piece + 4) + number
            tl.store(means + entry, mean)
            if NEEDS_STD:
                tl.store(m2s + entry, m2)
    else:
        entries = tl.load(piece + 1)
        first = tl.load(piece + 4)
        for step in tl.static_range(STEPS):
            if _is_of_step(length, step):
                _measure_rows(
                    address, number, entries, length, first, means, m2s, loss_scale,
                    EPS, ROUNDING, FINISH, NEEDS_STD, DTYPE, SIZE, WIDE, step,
                )  # fmt: skip


@triton.jit
def merge(
    pieces,
    runs,
    partials,
    means,
    m2s,
    NEEDS_STD: tl.constexpr,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,
    MAX_SEGMENTS: tl.constexpr,
):
    """Merges the segments of long runs, which ``runs`` names as ``items`` does, into ``means`` and ``m2s``."""
    item = tl.load(runs + tl.program_id(0))
    piece = pieces + 6 * (item >> 32)
    number = item & 0xFFFFFFFF
    mean, m2 = _merged(piece, number, partials, NEEDS_STD, WIDE, TILE, MAX_SEGMENTS)
    entry = tl.load(piece + 4) + number
    tl.store(means + entry, mean)
    if NEEDS_STD:
        tl.store(m2s + entry, m2)


@triton.jit
def second_pass(
    addresses,
    pieces,
    items,
    partials,
    shifts,
    scales,
    loss_scale,
    EPS: tl.constexpr,
    ROUNDING: tl.constexpr,
    FINISH: tl.constexpr,
    NEEDS_STD: tl.constexpr,
    BY_ROW: tl.constexpr,
    DTYPE: tl.constexpr,
    SIZE: tl.constexpr,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,
    MAX_SEGMENTS: tl.constexpr,
):
    """Rewrites all with the ``shifts`` and ``scales`` of the entries; or finishes segments, which are all it is given.

    Either of ``shifts`` and ``scales`` may be ``None``.
    """
    # Backwards, because what the first pass has read last is still in the second-level cache.
    item = tl.load(items + (tl.num_programs(0) - 1 - tl.program_id(0)))
    piece = pieces + 6 * (item >> 32)
    number = item & 0xFFFFFFFF
    address = tl.load(addresses + (item >> 32))
    length = tl.load(piece)
    if FINISH:
        segment_length = tl.load(piece + 2) * TILE
        segments = tl.load(piece + 3)
        begin = number % segments * segment_length
        count = tl.minimum(segment_length, length - begin)
        entry = number // segments
        shift, m2 = _merged(piece, entry, partials, NEEDS_STD, WIDE, TILE, MAX_SEGMENTS)
        scale = _zscore_scale(shift, m2, length, loss_scale, EPS, ROUNDING, WIDE) if NEEDS_STD else m2
        run = address + (entry * length + begin) * SIZE
        _rewrite(run, count, shift, scale, True, NEEDS_STD, DTYPE, SIZE, WIDE, TILE)
    else:
        first = tl.load(piece + 4)
        if not BY_ROW or length > NARROW:
            # A short run is a single segment.
            segments = tl.load(piece + 3)
            segment_length = tl.load(piece + 2) * TILE
            begin = number % segments * segment_length
            count = tl.minimum(segment_length, length - begin)
            entry = number // segments
            shift = tl.load(shifts + first + entry) if shifts is not None else 0.0
            scale = tl.load(scales + first + entry) if scales is not None else 1.0
            has_shift: tl.constexpr = shifts is not None
            has_scale: tl.constexpr = scales is not None
            run = address + (entry * length + begin) * SIZE
            _rewrite(run, count, shift, scale, has_shift, has_scale, DTYPE, SIZE, WIDE, TILE)
        else:
            entries = tl.load(piece + 1)
            for step in tl.static_range(STEPS):
                if _is_of_step(length, step):
                    _rewrite_rows(address, number, entries, length, first, shifts, scales, DTYPE, SIZE, WIDE, step)


@triton.jit
def _is_of_step(length, step: tl.constexpr):
    """Whether rows are as narrow as this step takes them, and too wide for the next, which takes four times as many."""
    WIDTH: tl.constexpr = NARROW // 4**step
    NEXT: tl.constexpr = WIDTH // 4 if step + 1 < STEPS else 0
    return (length <= WIDTH) & (length > NEXT)


@triton.jit
def _measure(
    run,
    count,
    NEEDS_STD: tl.constexpr,
    DTYPE: tl.constexpr,
    SIZE: tl.constexpr,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,
):
    """Mean and squared deviation of ``count`` elements from the address ``run``."""
    lanes = tl.arange(0, TILE)
    head, tail = _whole_tiles(run, count, SIZE, TILE)
    before = tl.zeros((), WIDE)
    mean = tl.zeros((), WIDE)
    m2 = tl.zeros((), WIDE)
    start = head * 0
    while start < head:
        own_mean, own_m2 = _measure_part(run + start * SIZE, head - start, NEEDS_STD, DTYPE, WIDE)
        before, mean, m2 = _joined(before, mean, m2, tl.minimum(head - start, PART), own_mean, own_m2, NEEDS_STD, WIDE)
        start += PART
    start = head
    while start < tail:
        values = tl.load(_aligned(run + start * SIZE, DTYPE) + lanes).to(WIDE)
        own_mean = tl.sum(values, 0) / TILE
        own_m2 = tl.zeros((), WIDE)
        if NEEDS_STD:
            rest = values - own_mean
            own_m2 = tl.sum(rest * rest, 0)
        before, mean, m2 = _joined(before, mean, m2, TILE, own_mean, own_m2, NEEDS_STD, WIDE)
        start += TILE
    start = tail
    while start < count:
        own_mean, own_m2 = _measure_part(run + start * SIZE, count - start, NEEDS_STD, DTYPE, WIDE)
        before, mean, m2 = _joined(before, mean, m2, tl.minimum(count - start, PART), own_mean, own_m2, NEEDS_STD, WIDE)
        start += PART
    return mean, m2


@triton.jit
def _whole_tiles(run, count, SIZE: tl.constexpr, TILE: tl.constexpr):
    """Where whole tiles at multiples of 16 bytes begin and end in consecutive elements."""
    head = tl.minimum((16 - run % 16) % 16 // SIZE, count)
    return head, head + (count - head) // TILE * TILE


@triton.jit
def _aligned(address, DTYPE: tl.constexpr):
    # Not of a sum with a pointer: Triton 3.2 merges such sums and forgets the hint.
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def _measure_part(part, left, NEEDS_STD: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    lanes = tl.arange(0, PART)
    pointers = part.to(tl.pointer_type(DTYPE)) + lanes
    inside = lanes < left
    values = tl.load(pointers, mask=inside, other=0.0).to(WIDE)
    mean = tl.sum(values, 0) / tl.minimum(left, PART).to(WIDE)
    m2 = tl.zeros((), WIDE)
    if NEEDS_STD:
        rest = tl.where(inside, values - mean, 0.0)
        m2 = tl.sum(rest * rest, 0)
    return mean, m2


@triton.jit
def _joined(before, mean, m2, count, own_mean, own_m2, NEEDS_STD: tl.constexpr, WIDE: tl.constexpr):
    """Chan, Golub and LeVeque's update, in an order that overflows no sooner than the deviation does."""
    count = tl.cast(count, WIDE)
    delta = own_mean - mean
    weight = count / (before + count)
    if NEEDS_STD:
        m2 += own_m2 + delta * (delta * (before * weight))
    return before + count, mean + delta * weight, m2


@triton.jit
def _merged(
    piece,
    entry,
    partials,
    NEEDS_STD: tl.constexpr,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,
    MAX_SEGMENTS: tl.constexpr,
):
    """Mean and squared deviation of a long run from those of its segments."""
    length = tl.load(piece)
    segment_length = tl.load(piece + 2) * TILE
    segments = tl.load(piece + 3)
    partial = partials + 2 * (tl.load(piece + 5) + entry * segments)
    lanes = tl.arange(0, MAX_SEGMENTS)
    inside = lanes < segments
    counts = tl.minimum(length - lanes * segment_length, segment_length).to(WIDE)
    # Taken from the first mean, which costs a constant no digits.
    pivot = tl.load(partial)
    offsets = tl.load(partial + 2 * lanes, mask=inside, other=0.0) - pivot
    offset = tl.sum(tl.where(inside, offsets * (counts / length.to(WIDE)), 0.0), 0)
    m2 = tl.zeros((), WIDE)
    if NEEDS_STD:
        m2s = tl.load(partial + 2 * lanes + 1, mask=inside, other=0.0)
        rest = offsets - offset
        m2 = tl.sum(tl.where(inside, m2s + counts * (rest * rest), 0.0), 0)
    return pivot + offset, m2


@triton.jit
def _zscore_scale(mean, m2, count, loss_scale, EPS: tl.constexpr, ROUNDING: tl.constexpr, WIDE: tl.constexpr):
    """The scale of ``ZScore`` from single statistics: in float64, whose root is exact and which costs nothing here."""
    mean = mean.to(tl.float64)
    variance = m2.to(tl.float64) / count.to(tl.float64)
    if loss_scale is not None:
        factor = tl.load(loss_scale).to(tl.float64)
        mean /= factor
        variance = variance / factor / factor
    std = tl.sqrt(variance)
    std = tl.where(std <= ROUNDING * tl.abs(mean), 0.0, std)
    std = tl.where(std == float("inf"), float("nan"), std)
    return tl.where(std == 0.0, 0.0, 1.0 / (std + EPS)).to(WIDE)


@triton.jit
def _rewrite(
    run,
    count,
    shift,
    scale,
    HAS_SHIFT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    DTYPE: tl.constexpr,
    SIZE: tl.constexpr,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,
):
    """``(g - shift) * scale`` of ``count`` elements from the address ``run``."""
    lanes = tl.arange(0, TILE)
    head, tail = _whole_tiles(run, count, SIZE, TILE)
    start = head * 0
    while start < head:
        _rewrite_part(run + start * SIZE, head - start, shift, scale, HAS_SHIFT, HAS_SCALE, DTYPE, WIDE)
        start += PART
    start = head
    while start < tail:
        pointers = _aligned(run + start * SIZE, DTYPE) + lanes
        values = tl.load(pointers).to(WIDE)
        if HAS_SHIFT:
            values -= shift
        if HAS_SCALE:
            values *= scale
        tl.store(pointers, values.to(DTYPE))
        start += TILE
    start = tail
    while start < count:
        _rewrite_part(run + start * SIZE, count - start, shift, scale, HAS_SHIFT, HAS_SCALE, DTYPE, WIDE)
        start += PART


@triton.jit
def _rewrite_part(
    part,
    left,
    shift,
    scale,
    HAS_SHIFT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
):
    lanes = tl.arange(0, PART)
    pointers = part.to(tl.pointer_type(DTYPE)) + lanes
    inside = lanes < left
    values = tl.load(pointers, mask=inside, other=0.0).to(WIDE)
    if HAS_SHIFT:
        values -= shift
    if HAS_SCALE:
        values *= scale
    tl.store(pointers, values.to(DTYPE), mask=inside)


@triton.jit
def _measure_rows(
    address,
    number,
    entries,
    length,
    first,
    means,
    m2s,
    loss_scale,
    EPS: tl.constexpr,
    ROUNDING: tl.constexpr,
    FINISH: tl.constexpr,
    NEEDS_STD: tl.constexpr,
    DTYPE: tl.constexpr,
    SIZE: tl.constexpr,
    WIDE: tl.constexpr,
    step: tl.constexpr,
):
    """Measures, or finishes, a tile of narrow rows."""
    HEIGHT: tl.constexpr = 2 * 4**step
    rows = number * HEIGHT + tl.arange(0, HEIGHT)
    pointers, inside = _tile_of_rows(address, number, entries, length, DTYPE, SIZE, step)
    values = tl.load(pointers, mask=inside, other=0.0).to(WIDE)
    mean = tl.sum(values, 1) / length.to(WIDE)
    rest = tl.where(inside, values - mean[:, None], 0.0)
    if FINISH:
        if NEEDS_STD:
            m2 = tl.sum(rest * rest, 1)
            rest *= _zscore_scale(mean, m2, length, loss_scale, EPS, ROUNDING, WIDE)[:, None]
        tl.store(pointers, rest.to(DTYPE), mask=inside)
    else:
        tl.store(means + first + rows, mean, mask=rows < entries)
        if NEEDS_STD:
            tl.store(m2s + first + rows, tl.sum(rest * rest, 1), mask=rows < entries)


@triton.jit
def _rewrite_rows(
    address,
    number,
    entries,
    length,
    first,
    shifts,
    scales,
    DTYPE: tl.constexpr,
    SIZE: tl.constexpr,
    WIDE: tl.constexpr,
    step: tl.constexpr,
):
    HEIGHT: tl.constexpr = 2 * 4**step
    rows = number * HEIGHT + tl.arange(0, HEIGHT)
    pointers, inside = _tile_of_rows(address, number, entries, length, DTYPE, SIZE, step)
    values = tl.load(pointers, mask=inside, other=0.0).to(WIDE)
    if shifts is not None:
        values -= tl.load(shifts + first + rows, mask=rows < entries, other=0.0)[:, None]
    if scales is not None:
        values *= tl.load(scales + first + rows, mask=rows < entries, other=0.0)[:, None]
    tl.store(pointers, values.to(DTYPE), mask=inside)


@triton.jit
def _tile_of_rows(address, number, entries, length, DTYPE: tl.constexpr, SIZE: tl.constexpr, step: tl.constexpr):
    HEIGHT: tl.constexpr = 2 * 4**step
    WIDTH: tl.constexpr = NARROW // 4**step
    rows = tl.arange(0, HEIGHT)
    columns = tl.arange(0, WIDTH)
    inside = (rows < entries - number * HEIGHT)[:, None] & (columns < length)[None, :]
    offsets = rows[:, None] * length.to(tl.int32) + columns[None, :]
    tile = address + number * HEIGHT * length * SIZE
    return tile.to(tl.pointer_type(DTYPE)) + offsets, inside
