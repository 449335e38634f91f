"""A method's map, for gradients as they are and for those whose mean has been subtracted."""

from torch import Tensor

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
    shift, scale = method.affine(true)
    for part in (shift, scale):
        if part is not None and (not isinstance(part, Tensor) or part.shape != stats.mean.shape):
            raise TypeError(
                f"{method}.affine must return a shift and a scale that are None or tensors of shape "
                f"{tuple(stats.mean.shape)}, like the statistics, and returned {part!r}"
            )
    if shift is true.mean:
        return stats.mean, scale
    return shift if shift is None or loss_scale is None else shift * loss_scale, scale


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
