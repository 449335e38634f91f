"""A method's shift and scale, for gradients as they are and for those whose mean has been subtracted."""

from typing import Any

from torch import Tensor

from lightning_znorm.arguments import shown
from lightning_znorm.errors import ZNormTypeError
from lightning_znorm.gradients.methods import SING, AffineMethod, Centralization, Statistics, ZScore

_OURS = (ZScore.affine, Centralization.affine, SING.affine)


def shift_and_scale(
    stats: Statistics, method: AffineMethod, loss_scale: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """Return a method's shift and scale for gradients as they are. If the shift is the mean, it is ``stats.mean``.

    Args:
        stats: Statistics of the gradients.
        method: Returns shift and scale from the statistics of the true gradients.
        loss_scale: Factor by which the gradients are larger than the true ones, a scalar tensor.

    Raises:
        TypeError: If the method returns anything else.
    """
    # Kernels keep the counts between steps, and a method of a user's own may change what it is given.
    count = stats.count if type(method).affine in _OURS else stats.count.clone()
    true = Statistics(count, stats.mean, stats.m2)
    if loss_scale is not None:
        loss_scale = loss_scale.to(stats.mean.device, non_blocking=True)
        # Twice, and not by the square, which overflows beyond 2^64.
        m2 = None if stats.m2 is None else stats.m2 / loss_scale / loss_scale
        true = Statistics(count, stats.mean / loss_scale, m2)
    shift, scale = _checked(method.affine(true), method, stats.mean)
    if shift is true.mean:
        return stats.mean, scale
    return shift if shift is None or loss_scale is None else shift * loss_scale, scale


def offset_and_scale(
    stats: Statistics, method: AffineMethod, loss_scale: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """Return what to add to gradients whose mean has been subtracted, and what to multiply the sum by.

    Args:
        stats: Statistics of the gradients as they were.
        method: Returns shift and scale from the statistics of the true gradients.
        loss_scale: Factor by which the gradients are larger than the true ones, a scalar tensor.

    Raises:
        TypeError: If the method returns anything else.
    """
    shift, scale = shift_and_scale(stats, method, loss_scale)
    if shift is stats.mean:
        return None, scale
    return stats.mean if shift is None else stats.mean - shift, scale


def _checked(returned: Any, method: AffineMethod, mean: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Return what a method has returned, if it is a shift and a scale for statistics with such means."""
    if isinstance(returned, (tuple, list)) and len(returned) == 2 and all(_fits(part, mean) for part in returned):
        return returned[0], returned[1]
    raise ZNormTypeError(
        f"{type(method).__name__}.affine must return a shift and a scale, each None or a "
        f"{'' if mean.is_complex() else 'real '}tensor of shape {tuple(mean.shape)} on {mean.device} like the "
        f"statistics, and returned {shown(returned)}"
    )


def _fits(part: Any, mean: Tensor) -> bool:
    """Return whether a shift or a scale is of the shape, device and kind of the statistics."""
    if part is None:
        return True
    fits_in = isinstance(part, Tensor) and part.shape == mean.shape and part.device == mean.device
    return fits_in and (mean.is_complex() or not part.is_complex())
