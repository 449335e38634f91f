"""Programs that are wrong in a way that only some gradients show, in place of those of the Triton kernel."""

import triton
import triton.language as tl

from lightning_znorm.gradients.kernels.triton_programs import PART, _tile_of_rows


@triton.jit
def part_without_its_last_element(part, remaining, NEEDS_STD: tl.constexpr, DTYPE: tl.constexpr, WIDE: tl.constexpr):
    """For ``_measure_part``: of parts that are not the last, one element is missing."""
    lanes = tl.arange(0, PART)
    inside = (lanes < remaining) & ((lanes < PART - 1) | (remaining <= PART))
    values = tl.load(part.to(tl.pointer_type(DTYPE)) + lanes, mask=inside, other=0.0).to(WIDE)
    mean = tl.sum(values, 0) / tl.minimum(remaining, PART).to(WIDE)
    difference = tl.where(inside, values - mean, 0.0)
    return mean, tl.sum(difference * difference, 0)


@triton.jit
def mean_of_the_first_chunk(
    segment,
    run_index,
    partials,
    NEEDS_STD: tl.constexpr,
    WIDE: tl.constexpr,
    TILE: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
):
    """For ``_merge_chunks``: right of tensors of a single chunk."""
    partial = partials + 2 * (tl.load(segment + 5) + run_index * tl.load(segment + 3))
    return tl.load(partial), tl.load(partial + 1) * tl.load(segment + 3)


@triton.jit
def wide_rows_without_a_shift(
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
    """For ``_rewrite_rows``: right of rows of up to 256 elements, and where there is no shift."""
    HEIGHT: tl.constexpr = 2 * 4**step
    rows = number * HEIGHT + tl.arange(0, HEIGHT)
    pointers, inside = _tile_of_rows(address, number, num_runs, length, DTYPE, SIZE, step)
    values = tl.load(pointers, mask=inside, other=0.0).to(WIDE)
    if shifts is not None and step > 0:
        values -= tl.load(shifts + first + rows, mask=rows < num_runs, other=0.0)[:, None]
    if scales is not None:
        values *= tl.load(scales + first + rows, mask=rows < num_runs, other=0.0)[:, None]
    tl.store(pointers, values.to(DTYPE), mask=inside)


@triton.jit
def bfloat16_without_a_shift(
    part,
    remaining,
    shift,
    scale,
    HAS_SHIFT: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    DTYPE: tl.constexpr,
    WIDE: tl.constexpr,
):
    """For ``_rewrite_part``: right in all other types."""
    lanes = tl.arange(0, PART)
    pointers = part.to(tl.pointer_type(DTYPE)) + lanes
    inside = lanes < remaining
    values = tl.load(pointers, mask=inside, other=0.0).to(WIDE)
    if HAS_SHIFT and tl.bfloat16 != DTYPE:
        values -= shift
    if HAS_SCALE:
        values *= scale
    tl.store(pointers, values.to(DTYPE), mask=inside)


@triton.jit
def rows_and_what_is_before_them(
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
    """For ``_rewrite_rows``: the rows are right, and the element before the first one is changed too."""
    rows = number * (2 * 4**step) + tl.arange(0, 2 * 4**step)
    pointers, inside = _tile_of_rows(address, number, num_runs, length, DTYPE, SIZE, step)
    values = tl.load(pointers, mask=inside, other=0.0).to(WIDE)
    if shifts is not None:
        values -= tl.load(shifts + first + rows, mask=rows < num_runs, other=0.0)[:, None]
    if scales is not None:
        values *= tl.load(scales + first + rows, mask=rows < num_runs, other=0.0)[:, None]
    tl.store(pointers, values.to(DTYPE), mask=inside)
    if number == 0:
        tl.store((address - SIZE).to(tl.pointer_type(DTYPE)), 0.0)


@triton.jit
def scale_of_a_constant(mean, m2, count, loss_scale, EPS: tl.constexpr, ROUNDING: tl.constexpr, WIDE: tl.constexpr):
    """For ``_zscore_scale``: a deviation that is rounding is taken for one."""
    variance = m2.to(tl.float64) / count.to(tl.float64)
    if loss_scale is not None:
        factor = tl.load(loss_scale).to(tl.float64)
        variance = variance / factor / factor
    std = tl.sqrt(variance)
    return tl.where(std == 0.0, 0.0, 1.0 / (std + EPS)).to(WIDE)


@triton.jit
def scale_without_the_loss_scale(
    mean, m2, count, loss_scale, EPS: tl.constexpr, ROUNDING: tl.constexpr, WIDE: tl.constexpr
):
    """For ``_zscore_scale``: right where gradients are not scaled."""
    mean = mean.to(tl.float64)
    std = tl.sqrt(m2.to(tl.float64) / count.to(tl.float64))
    std = tl.where(std <= ROUNDING * tl.abs(mean), 0.0, std)
    return tl.where(std == 0.0, 0.0, 1.0 / (std + EPS)).to(WIDE)
