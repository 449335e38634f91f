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
    """Call :func:`transform_slots_`. This is its former name, which version 0.2 removes."""
    warnings.warn(
        "lightning_znorm.gradients.transform_places_ is now called transform_slots_: version 0.2 removes the old name",
        FutureWarning,
        stacklevel=2,
    )
    return transform_slots_(places, method, loss_scale)
