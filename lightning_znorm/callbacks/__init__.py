"""Lightning callbacks that transform or show gradients, draw, score or write masks, and keep the last checkpoint."""

from typing import TYPE_CHECKING

from lightning_znorm.lazy import lazy_names

if TYPE_CHECKING:
    from lightning_znorm.callbacks.last_checkpoint import LastCheckpoint
    from lightning_znorm.callbacks.mask_overlay import MaskOverlay
    from lightning_znorm.callbacks.masks import MaskWriter
    from lightning_znorm.callbacks.methods import GradientCentralizationCallback, SINGCallback, ZNormCallback
    from lightning_znorm.callbacks.monitor import GradientMonitor
    from lightning_znorm.callbacks.scores import ScoreWriter
    from lightning_znorm.callbacks.transform import GradientTransform
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "last_checkpoint": ["LastCheckpoint"],
            "mask_overlay": ["MaskOverlay"],
            "masks": ["MaskWriter"],
            "methods": ["GradientCentralizationCallback", "SINGCallback", "ZNormCallback"],
            "monitor": ["GradientMonitor"],
            "scores": ["ScoreWriter"],
            "transform": ["GradientTransform"],
        },
    )

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
