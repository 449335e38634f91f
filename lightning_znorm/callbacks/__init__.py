"""Lightning callbacks that transform or show gradients, show masks, and keep the last checkpoint."""

from lightning_znorm.callbacks.gradient_centralization import GradientCentralizationCallback
from lightning_znorm.callbacks.gradient_monitor import GradientMonitor
from lightning_znorm.callbacks.gradient_transform import GradientTransform
from lightning_znorm.callbacks.last_checkpoint import LastCheckpoint
from lightning_znorm.callbacks.masks import MaskOverlay, MaskWriter
from lightning_znorm.callbacks.sing import SINGCallback
from lightning_znorm.callbacks.znorm import ZNormCallback

__all__ = [
    "GradientCentralizationCallback",
    "GradientMonitor",
    "GradientTransform",
    "LastCheckpoint",
    "MaskOverlay",
    "MaskWriter",
    "SINGCallback",
    "ZNormCallback",
]
