"""A method's map, for gradients as they are and for those whose mean has been subtracted."""

from typing import Any

from torch import Tensor

from lightning_znorm.errors import ZNormTypeError
from lightning_znorm.gradients.arguments import shown
from lightning_znorm.gradients.methods import AffineMethod
from lightning_znorm.gradients.statistics import Statistics


def affine_map(
    stats: Statistics, method: AffineMethod, loss_scale: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """A method's shift and scale for gradients as they are: the shift is ``stats.mean`` itself where it is the mean.

    Args:
        stats: Of the gradients.
        method: Gives shift and scale.
        loss_scale: As for :func:`affine_`.
    """
    true = stats
    if loss_scale is not None:
        loss_scale = loss_scale.to(stats.mean.device, non_blocking=True)
        # Twice, and not by the square, which overflows beyond 2^64.
        m2 = None if stats.m2 is None else stats.m2 / loss_scale / loss_scale
        true = Statistics(stats.count, stats.mean / loss_scale, m2)
    shift, scale = _checked(method.affine(true), method, stats.mean)
    if shift is true.mean:
        return stats.mean, scale
    return shift if shift is None or loss_scale is None else shift * loss_scale, scale


def _checked(made: Any, method: AffineMethod, like: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """What a method has returned, if it is a shift and a scale for entries like some."""
    if isinstance(made, (tuple, list)) and len(made) == 2 and all(_fits(part, like) for part in made):
        return made[0], made[1]
    raise ZNormTypeError(
        f"{type(method).__name__}.affine must return a shift and a scale, each None or a "
        f"{'' if like.is_complex() else 'real '}tensor of shape {tuple(like.shape)} on {like.device} like the "
        f"statistics, and returned {shown(made)}"
    )


def _fits(part: Any, like: Tensor) -> bool:
    """Whether a shift or a scale has an entry for each of the statistics, where and of the kind that they are."""
    if part is None:
        return True
    fits_in = isinstance(part, Tensor) and part.shape == like.shape and part.device == like.device
    return fits_in and (like.is_complex() or not part.is_complex())


def residual_map(
    stats: Statistics, method: AffineMethod, loss_scale: Tensor | None = None
) -> tuple[Tensor | None, Tensor | None]:
    """What is left to add to, and to multiply with, gradients whose mean has been subtracted.

    Args:
        stats: Of the gradients as they were.
        method: Gives shift and scale.
        loss_scale: As for :func:`affine_`.
    """
    shift, scale = affine_map(stats, method, loss_scale)
    if shift is stats.mean:
        return None, scale
    return stats.mean if shift is None else stats.mean - shift, scale
