"""Gradients, wherever a strategy keeps them, and the methods and kernels that rewrite them. Needs torch alone."""

import warnings
from collections.abc import Iterable

from torch import Tensor

from lightning_znorm.gradients.apply import transform_slots_
from lightning_znorm.gradients.exceptions import NonFiniteGradientError, UnsupportedGradientError
from lightning_znorm.gradients.methods import SING, AffineMethod, Centralization, GradientMethod, Statistics, ZScore
from lightning_znorm.gradients.shards import Shard
from lightning_znorm.gradients.slots import GradientSlot

__all__ = [
    "SING",
    "AffineMethod",
    "Centralization",
    "GradientMethod",
    "NonFiniteGradientError",
    "Statistics",
    "UnsupportedGradientError",
    "ZScore",
    "transform_places_",
    "transform_slots_",
]


def transform_places_(
    places: Iterable[GradientSlot], method: GradientMethod, loss_scale: Tensor | None = None
) -> list[Tensor | Shard | None]:
    """Call :func:`transform_slots_`. This is its former name, which version 0.2 removes.

    Args:
        places: The slots.
        method: An affine method, or a function from a gradient to its replacement.
        loss_scale: As for :func:`transform_slots_`.

    Returns:
        What :func:`transform_slots_` returns.

    Example:
        >>> import torch
        >>> from lightning_znorm.gradients import ZScore, transform_places_
        >>> from lightning_znorm.gradients.slots import ParameterSlot
        >>> weight = torch.nn.Parameter(torch.zeros(2))
        >>> weight.grad = torch.tensor([1.0, 3.0])
        >>> with warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")
        ...     _ = transform_places_([ParameterSlot(("weight",), weight)], ZScore())
        >>> weight.grad
        tensor([-1.,  1.])
    """
    warnings.warn(
        "lightning_znorm.gradients.transform_places_ is now called transform_slots_: version 0.2 removes the old name",
        FutureWarning,
        stacklevel=2,
    )
    return transform_slots_(places, method, loss_scale)
