"""Where gradients live, and the methods and kernels that rewrite them. Needs torch alone."""

from lightning_znorm.gradients.collect import UnsupportedGradientError
from lightning_znorm.gradients.methods import AffineMethod, Centralization, GradientMethod, ZScore
from lightning_znorm.gradients.statistics import Statistics
from lightning_znorm.gradients.transform import transform_named_grads_

__all__ = [
    "AffineMethod",
    "Centralization",
    "GradientMethod",
    "Statistics",
    "UnsupportedGradientError",
    "ZScore",
    "transform_named_grads_",
]
