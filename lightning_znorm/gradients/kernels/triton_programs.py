# mypy: ignore-errors
"""Triton programs that measure and rewrite memory behind a table of addresses; imported where a device runs them.

A *segment* is contiguous memory of one or more *runs* of ``length`` elements, each with its own statistics: a whole
tensor, or its rows. *Long* runs are cut into a limited number of *chunks*, with a program for each, and the means and
squared deviations of the chunks are merged when all are there. A *short* run is read by one program, which can take
several *narrow* ones, and which can rewrite them in the first pass. How a run is cut depends on nothing but its length
and its address modulo 16, and all sums have a fixed order: the result is the same to the bit whenever it is computed,
whatever else is in the tables.

The tables, which :mod:`lightning_znorm.gradients.kernels.triton` makes:

- ``addresses``: where each segment begins.
- ``segments``: for each segment the length of its runs, their number, the tiles in a chunk, the chunks in a run, and
  the indices of its first run and of its first chunk.
- ``items``: for each program the index of its segment, times 2^32, plus the number of the chunk, run or tile of rows in
  it.
- ``partials``: mean and squared deviation of each chunk.

The programs are written for the limit of memory bandwidth: between loads there is no more than one division of
integers, and one or two sums over a tile that is in registers. Loads and stores are 16 bytes wide in whole tiles, which
begin at the first multiple of 16 bytes in their chunk, because gradients in a bucket may begin anywhere. The elements
before and after whole tiles go in masked parts. Parts are smaller than tiles, because their 64-bit pointers take more
registers than the values. Offsets in memory are 64-bit.
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
    segments,
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
    """Measure chunks into ``partials``, and short runs into ``means`` and ``m2s``; or rewrite short runs at once."""
    item = tl.load(items + tl.program_id(0))
    segment = segments + 6 * (item >> 32)
    number = item & 0xFFFFFFFF
    address = tl.load(addresses + (item >> 32))
    length = tl.load(segment)
    if length > LONG:
        chunk_length = tl.load(segment + 2) * TILE
        chunks = tl.load(segment + 3)
        begin = number % chunks * chunk_length
        count = tl.minimum(chunk_length, length - begin)
        run = address + (number // chunks * length + begin) * SIZE
        mean, m2 = _measure(run, count, NEEDS_STD, DTYPE, SIZE, WIDE, TILE)
        partial = tl.load(segment + 5) + number
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
            run_index = tl.load(segment + 4) + number
            tl.store(means + run_index, mean)
            if NEEDS_STD:
                tl.store(m2s + run_index, m2)
    else:
        num_runs = tl.load(segment + 1)
        first = tl.load(segment + 4)
        for step in tl.static_range(STEPS):
            if _is_of_step(length, step):
                _measure_rows(
                    address, number, num_runs, length, first, means, m2s, loss_scale,
                    EPS, ROUNDING, FINISH, NEEDS_STD, DTYPE, SIZE, WIDE, step,
                )  # fmt: skip


@triton.jit
def merge(
    segments,
    runs,
    partials,
    means,
    m2s,
    NEEDS_STD: tl.constexpr,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
):
    """Merge the chunks of long runs, which ``runs`` names as ``items`` does, into ``means`` and ``m2s``."""
    item = tl.load(runs + tl.program_id(0))
    segment = segments + 6 * (item >> 32)
    number = item & 0xFFFFFFFF
    mean, m2 = _merge_chunks(segment, number, partials, NEEDS_STD, WIDE, TILE, MAX_CHUNKS)
    run_index = tl.load(segment + 4) + number
    tl.store(means + run_index, mean)
    if NEEDS_STD:
        tl.store(m2s + run_index, m2)


@triton.jit
def second_pass(
    addresses,
    segments,
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
    MAX_CHUNKS: tl.constexpr,
):
    """Rewrite all runs with their ``shifts`` and ``scales``, either of which may be ``None``.

    With ``FINISH``, merge ``partials`` and rewrite chunks, which are then the only items.
    """
    # Backwards, because what the first pass has read last is still in the second-level cache.
    item = tl.load(items + (tl.num_programs(0) - 1 - tl.program_id(0)))
    segment = segments + 6 * (item >> 32)
    number = item & 0xFFFFFFFF
    address = tl.load(addresses + (item >> 32))
    length = tl.load(segment)
    if FINISH:
        chunk_length = tl.load(segment + 2) * TILE
        chunks = tl.load(segment + 3)
        begin = number % chunks * chunk_length
        count = tl.minimum(chunk_length, length - begin)
        run_index = number // chunks
        shift, m2 = _merge_chunks(segment, run_index, partials, NEEDS_STD, WIDE, TILE, MAX_CHUNKS)
        scale = _zscore_scale(shift, m2, length, loss_scale, EPS, ROUNDING, WIDE) if NEEDS_STD else m2
        run = address + (run_index * length + begin) * SIZE
        _rewrite(run, count, shift, scale, True, NEEDS_STD, DTYPE, SIZE, WIDE, TILE)
    else:
        first = tl.load(segment + 4)
        if not BY_ROW or length > NARROW:
            # A short run is a single chunk.
            chunks = tl.load(segment + 3)
            chunk_length = tl.load(segment + 2) * TILE
            begin = number % chunks * chunk_length
            count = tl.minimum(chunk_length, length - begin)
            run_index = number // chunks
            shift = tl.load(shifts + first + run_index) if shifts is not None else 0.0
            scale = tl.load(scales + first + run_index) if scales is not None else 1.0
            has_shift: tl.constexpr = shifts is not None
            has_scale: tl.constexpr = scales is not None
            run = address + (run_index * length + begin) * SIZE
            _rewrite(run, count, shift, scale, has_shift, has_scale, DTYPE, SIZE, WIDE, TILE)
        else:
            num_runs = tl.load(segment + 1)
            for step in tl.static_range(STEPS):
                if _is_of_step(length, step):
                    _rewrite_rows(address, number, num_runs, length, first, shifts, scales, DTYPE, SIZE, WIDE, step)


@triton.jit
def _is_of_step(length, step: tl.constexpr):
    """Return whether rows are narrow enough for this step and too wide for the next, which takes four times as many."""
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
    """Return mean and squared deviation of ``count`` elements from the address ``run``."""
    lanes = tl.arange(0, TILE)
    head, tail = _whole_tiles(run, count, SIZE, TILE)
    merged = tl.zeros((), WIDE)
    mean = tl.zeros((), WIDE)
    m2 = tl.zeros((), WIDE)
    start = head * 0
    while start < head:
        part_mean, part_m2 = _measure_part(run + start * SIZE, head - start, NEEDS_STD, DTYPE, WIDE)
        merged, mean, m2 = _merge_part(
            merged, mean, m2, tl.minimum(head - start, PART), part_mean, part_m2, NEEDS_STD, WIDE
        )
        start += PART
    start = head
    while start < tail:
        values = tl.load(_aligned(run + start * SIZE, DTYPE) + lanes).to(WIDE)
        part_mean = tl.sum(values, 0) / TILE
        part_m2 = tl.zeros((), WIDE)
        if NEEDS_STD:
            difference = values - part_mean
            part_m2 = tl.sum(difference * difference, 0)
        merged, mean, m2 = _merge_part(merged, mean, m2, TILE, part_mean, part_m2, NEEDS_STD, WIDE)
        start += TILE
    start = tail
    while start < count:
        part_mean, part_m2 = _measure_part(run + start * SIZE, count - start, NEEDS_STD, DTYPE, WIDE)
        merged, mean, m2 = _merge_part(
            merged, mean, m2, tl.minimum(count - start, PART), part_mean, part_m2, NEEDS_STD, WIDE
        )
        start += PART
    return mean, m2


@triton.jit
def _whole_tiles(run, count, SIZE: tl.constexpr, TILE: tl.constexpr):
    """Return where whole tiles at multiples of 16 bytes begin and end in consecutive elements."""
    head = tl.minimum((16 - run % 16) % 16 // SIZE, count)
    return head, head + (count - head) // TILE * TILE


@triton.jit
def _aligned(address, DTYPE: tl.constexpr):
    # The hint is not given for a sum with a pointer: Triton 3.2 merges such sums and forgets it.
    return tl.multiple_of(address.to(tl.pointer_type(DTYPE)), 16)


@triton.jit
def _measure_part(part, remaining, NEEDS_STD: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    lanes = tl.arange(0, PART)
    pointers = part.to(tl.pointer_type(DTYPE)) + lanes
    inside = lanes < remaining
    values = tl.load(pointers, mask=inside, other=0.0).to(WIDE)
    mean = tl.sum(values, 0) / tl.minimum(remaining, PART).to(WIDE)
    m2 = tl.zeros((), WIDE)
    if NEEDS_STD:
        difference = tl.where(inside, values - mean, 0.0)
        m2 = tl.sum(difference * difference, 0)
    return mean, m2


@triton.jit
def _merge_part(merged, mean, m2, count, part_mean, part_m2, NEEDS_STD: tl.constexpr, WIDE: tl.constexpr):
    """Merge by Chan, Golub and LeVeque's update, in an order that overflows no sooner than the deviation does."""
    count = tl.cast(count, WIDE)
    delta = part_mean - mean
    weight = count / (merged + count)
    if NEEDS_STD:
        m2 += part_m2 + delta * (delta * (merged * weight))
    return merged + count, mean + delta * weight, m2


@triton.jit
def _merge_chunks(
    segment,
    run_index,
    partials,
    NEEDS_STD: tl.constexpr,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
):
    """Return mean and squared deviation of a long run from those of its chunks."""
    length = tl.load(segment)
    chunk_length = tl.load(segment + 2) * TILE
    chunks = tl.load(segment + 3)
    partial = partials + 2 * (tl.load(segment + 5) + run_index * chunks)
    lanes = tl.arange(0, MAX_CHUNKS)
    inside = lanes < chunks
    counts = tl.minimum(length - lanes * chunk_length, chunk_length).to(WIDE)
    # Offsets are taken from the first mean, so that a constant loses no digits.
    pivot = tl.load(partial)
    offsets = tl.load(partial + 2 * lanes, mask=inside, other=0.0) - pivot
    offset = tl.sum(tl.where(inside, offsets * (counts / length.to(WIDE)), 0.0), 0)
    m2 = tl.zeros((), WIDE)
    if NEEDS_STD:
        m2s = tl.load(partial + 2 * lanes + 1, mask=inside, other=0.0)
        difference = offsets - offset
        m2 = tl.sum(tl.where(inside, m2s + counts * (difference * difference), 0.0), 0)
    return pivot + offset, m2


@triton.jit
def _zscore_scale(mean, m2, count, loss_scale, EPS: tl.constexpr, ROUNDING: tl.constexpr, WIDE: tl.constexpr):
    """Return the scale of ``ZScore``, in float64: its root is exact, and for so few numbers it costs nothing."""
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
    """Replace ``count`` elements ``g`` from the address ``run`` by ``(g - shift) * scale``."""
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
    remaining,
    shift,
    scale,
    HAS_SHIFT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
):
    lanes = tl.arange(0, PART)
    pointers = part.to(tl.pointer_type(DTYPE)) + lanes
    inside = lanes < remaining
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
    num_runs,
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
    """Measure, or rewrite at once, a tile of narrow rows."""
    HEIGHT: tl.constexpr = 2 * 4**step
    rows = number * HEIGHT + tl.arange(0, HEIGHT)
    pointers, inside = _tile_of_rows(address, number, num_runs, length, DTYPE, SIZE, step)
    values = tl.load(pointers, mask=inside, other=0.0).to(WIDE)
    mean = tl.sum(values, 1) / length.to(WIDE)
    difference = tl.where(inside, values - mean[:, None], 0.0)
    if FINISH:
        if NEEDS_STD:
            m2 = tl.sum(difference * difference, 1)
            difference *= _zscore_scale(mean, m2, length, loss_scale, EPS, ROUNDING, WIDE)[:, None]
        tl.store(pointers, difference.to(DTYPE), mask=inside)
    else:
        tl.store(means + first + rows, mean, mask=rows < num_runs)
        if NEEDS_STD:
            tl.store(m2s + first + rows, tl.sum(difference * difference, 1), mask=rows < num_runs)


@triton.jit
def _rewrite_rows(
    address,
    number,
    num_runs,
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
    pointers, inside = _tile_of_rows(address, number, num_runs, length, DTYPE, SIZE, step)
    values = tl.load(pointers, mask=inside, other=0.0).to(WIDE)
    if shifts is not None:
        values -= tl.load(shifts + first + rows, mask=rows < num_runs, other=0.0)[:, None]
    if scales is not None:
        values *= tl.load(scales + first + rows, mask=rows < num_runs, other=0.0)[:, None]
    tl.store(pointers, values.to(DTYPE), mask=inside)


@triton.jit
def _tile_of_rows(address, number, num_runs, length, DTYPE: tl.constexpr, SIZE: tl.constexpr, step: tl.constexpr):
    HEIGHT: tl.constexpr = 2 * 4**step
    WIDTH: tl.constexpr = NARROW // 4**step
    rows = tl.arange(0, HEIGHT)
    columns = tl.arange(0, WIDTH)
    inside = (rows < num_runs - number * HEIGHT)[:, None] & (columns < length)[None, :]
    offsets = rows[:, None] * length.to(tl.int32) + columns[None, :]
    tile = address + number * HEIGHT * length * SIZE
    return tile.to(tl.pointer_type(DTYPE)) + offsets, inside
