"""The choice of the Triton kernel, which compares itself with PyTorch's before it changes a gradient of a kind."""

import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from itertools import product

import torch
from torch import Tensor

from lightning_znorm.arguments import shown
from lightning_znorm.errors import ZNormError, ZNormImportError, ZNormRuntimeError, ZNormValueError
from lightning_znorm.gradients.kernels import device as pytorch
from lightning_znorm.gradients.kernels.caches import is_capturing
from lightning_znorm.gradients.kernels.memory import UPCAST
from lightning_znorm.gradients.kernels.table import Table
from lightning_znorm.gradients.methods import AffineMethod, Centralization, Statistics, ZScore
from lightning_znorm.gradients.shards import Segment

VARIABLE = "LIGHTNING_ZNORM_KERNEL"
_WAY_OUT = f"No gradient of this kind has been changed. Unset {VARIABLE} to use PyTorch's kernel"

# Units of rounding, in the type of the statistics and of the largest value, by which results may differ: either kernel
# sums in an order of its own. On a CPU, up to 1 was seen in float32, and 30 in float64, whose sums are longest there.
# A thousand elements of which one is left out differ by more. Results are then rounded once to the gradient's type,
# and may fall to either side: by the unit of rounding of the result itself, which is what half precision mostly shows.
_UNITS = 128
# The value between the gradients that are compared, where nothing may change.
_OUTSIDE = 7.0


def is_chosen() -> bool:
    """Return whether the user has chosen the Triton kernel.

    Raises:
        ValueError: If the user has chosen a kernel that does not exist.
    """
    value = os.environ.get(VARIABLE, "")
    if value not in ("", "triton"):
        raise ZNormValueError(
            f"the environment variable {VARIABLE} must be 'triton', or unset or empty for PyTorch's kernel, got "
            f"{shown(value)}"
        )
    return value == "triton"


def pointer_tables(segments: Iterable[Segment]) -> tuple[list[Table], list[Segment]]:
    """Return tables of the Triton kernel, and the segments that it does not support.

    Raises:
        ImportError: If there is no Triton.
        RuntimeError: As :func:`check_kind` does, before any of these segments is changed.
    """
    try:
        from lightning_znorm.gradients.kernels import triton
    except ImportError as error:
        raise ZNormImportError(
            f"{VARIABLE} is 'triton', and Triton cannot be imported ({error}): install the release of it that your "
            f"PyTorch {torch.__version__} needs. {_WAY_OUT}"
        ) from error
    groups, unsupported = triton.group_by_table(segments)
    for (tensor, by_row, _), *_ in groups:
        check_kind(tensor.device, tensor.dtype, by_row)
    return [triton.PointerTable(group) for group in groups], unsupported


class _Unfused(ZScore):
    """Measured and rewritten in two calls, as shards and users' methods are."""


class _Shifted(Centralization):
    """Measured without the deviation, and rewritten without a scale, in two calls."""


class _Scaled(ZScore):
    """Divided by the root mean square, without a shift."""

    def affine(self, stats: Statistics) -> tuple[Tensor | None, Tensor | None]:
        return None, torch.hypot(stats.std, stats.mean).reciprocal_()


@cache
@torch.no_grad()
def check_kind(device: torch.device, dtype: torch.dtype, by_row: bool) -> None:
    """Compare the Triton kernel with PyTorch's on gradients of a kind, once for each kind and process.

    Raises:
        RuntimeError: If results differ by more than rounding, if the Triton kernel cannot run, or if a CUDA graph is
            being captured, in which nothing can be compared.
    """
    from lightning_znorm.gradients.kernels import triton

    kind = f"{dtype} gradients on {device}{' by row' if by_row else ''}"
    if is_capturing(device):
        raise ZNormRuntimeError(
            f"{VARIABLE} is 'triton', and its kernel must be compared with PyTorch's before it changes {kind}, which "
            f"cannot be done while a CUDA graph is captured: take a step before. {_WAY_OUT}"
        )
    memory, cases = _cases(triton.shapes_of_all_routes(dtype, by_row), device, dtype)
    fused: list[tuple[AffineMethod, float]] = [(ZScore(), 1.0), (ZScore(1e-3), 1024.0)]
    if by_row:
        fused = [(Centralization(), 1.0)]
    # True gradients have deviations of about 1 / 1024, so that the eps counts as much as they do.
    for method, factor in [*fused, (_Unfused(1e-3), 1024.0), (_Shifted(), 1.0), (_Scaled(), 1.0)]:
        loss_scale = None if factor == 1 else torch.tensor(factor, device=device)
        want, got = memory.clone(), memory.clone()
        for table in pytorch.tables_of([Segment(view, by_row) for view in _views(want, cases)]):
            table.transform_(method, loss_scale)
        try:
            triton.PointerTable([Segment(view, by_row) for view in _views(got, cases)]).transform_(method, loss_scale)
            _compare(got, want, memory, cases, factor, f"{method!r} of {kind}")
        except ZNormError:
            raise
        except Exception as error:  # of Triton, its compilers and the device's driver
            raise ZNormRuntimeError(
                f"{VARIABLE} is 'triton', and its kernel cannot run {method!r} of {kind} "
                f"({type(error).__name__}: {shown(str(error))}). {_WAY_OUT}"
            ) from error


def _cases(
    shapes: Iterable[tuple[int, ...]], device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, list[tuple[int, torch.Size]]]:
    """Return gradients in one memory, and where each begins, with gaps between them.

    Of each shape there is one with a large mean, one that begins at a multiple of 16 bytes, and a constant one; of the
    last shape, which is the longest, the first alone. Values alternate about the mean, so that every row has a
    deviation, and drift, so that tiles have means of their own; nothing random is drawn.
    """
    aligned = 16 // dtype.itemsize
    large = min(1000.0, 0.06 / torch.finfo(dtype).eps)  # at which half precision still tells values of deviation 1
    variants = [(large, 1, 3), (0.0, 1, 0), (large / 11, 0, 1)]  # sums of the last one are not exact
    *shorter, longest = map(torch.Size, shapes)
    cases, values = [], []
    start = 0
    for shape, (mean, deviation, offset) in [*product(shorter, variants), (longest, variants[0])]:
        number = torch.arange(shape.numel(), dtype=torch.float64, device="cpu")
        wave = (1 - 2 * (number % 2)) * (0.5 + number * 0.618034 % 1) + 2 * number / len(number) - 1
        gap = -start % aligned + aligned + offset
        values += [torch.full((gap,), _OUTSIDE, dtype=torch.float64, device="cpu"), mean + deviation * wave]
        cases.append((start + gap, shape))
        start += gap + shape.numel()
    return torch.cat([*values, values[0]]).to(dtype).to(device), cases


def _views(memory: Tensor, cases: Iterable[tuple[int, torch.Size]]) -> Iterator[Tensor]:
    for start, shape in cases:
        yield memory[start : start + shape.numel()].view(shape)


def _compare(
    got: Tensor, want: Tensor, gradients: Tensor, cases: Sequence[tuple[int, torch.Size]], factor: float, what: str
) -> None:
    """Raise if results differ by more than rounding, or if memory between them has changed."""
    wide = UPCAST.get(got.dtype, got.dtype)
    of_result, of_statistics = torch.finfo(got.dtype).eps, _UNITS * factor * torch.finfo(wide).eps
    for result, expected, gradient in zip(*(_views(memory, cases) for memory in (got, want, gradients)), strict=True):
        difference = (result.to(wide) - expected.to(wide)).abs().flatten()
        rounding = (of_result * expected.to(wide).abs() + of_statistics * gradient.abs().max().to(wide)).flatten()
        if not (difference <= rounding).all():
            worst = (difference - rounding).argmax()
            raise ZNormRuntimeError(
                f"{VARIABLE} is 'triton', and its results are not PyTorch's: {what}, of shape {tuple(gradient.shape)} "
                f"and values up to {gradient.abs().max():.3g}, differ by {difference[worst]:.2g}, of which rounding "
                f"explains {rounding[worst]:.2g}. {_WAY_OUT}"
            )
        result.fill_(_OUTSIDE)
    if not (got == _OUTSIDE).all():
        raise ZNormRuntimeError(f"{VARIABLE} is 'triton', and its {what} writes outside the gradients. {_WAY_OUT}")
