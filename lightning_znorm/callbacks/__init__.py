"""Lightning callbacks that transform gradients."""

from lightning_znorm.callbacks.gradient_centralization import GradientCentralizationCallback
from lightning_znorm.callbacks.gradient_transform import GradientTransform
from lightning_znorm.callbacks.mask_overlay import MaskOverlay
from lightning_znorm.callbacks.mask_writer import MaskWriter
from lightning_znorm.callbacks.znorm import ZNormCallback

__all__ = ["GradientCentralizationCallback", "GradientTransform", "MaskOverlay", "MaskWriter", "ZNormCallback"]
