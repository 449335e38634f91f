"""Where gradients live, and the methods and kernels that rewrite them. Needs torch alone."""

from lightning_znorm.gradients.errors import NonFiniteGradientError, UnsupportedGradientError
from lightning_znorm.gradients.methods import SING, AffineMethod, Centralization, GradientMethod, ZScore
from lightning_znorm.gradients.statistics import Statistics
from lightning_znorm.gradients.transform import transform_places_

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
]
