"""Lightning callbacks that transform or show gradients, draw, score or write masks, and keep the last checkpoint."""

from lightning_znorm.callbacks.last_checkpoint import LastCheckpoint
from lightning_znorm.callbacks.mask_overlay import MaskOverlay
from lightning_znorm.callbacks.masks import MaskWriter
from lightning_znorm.callbacks.methods import GradientCentralizationCallback, SINGCallback, ZNormCallback
from lightning_znorm.callbacks.monitor import GradientMonitor
from lightning_znorm.callbacks.scores import ScoreWriter
from lightning_znorm.callbacks.transform import GradientTransform

__all__ = [
    "GradientCentralizationCallback",
    "GradientMonitor",
    "GradientTransform",
    "LastCheckpoint",
    "MaskOverlay",
    "MaskWriter",
    "SINGCallback",
    "ScoreWriter",
    "ZNormCallback",
]
