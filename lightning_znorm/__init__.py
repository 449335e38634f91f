"""Z-score gradient normalization (ZNorm) for PyTorch Lightning."""

from typing import TYPE_CHECKING

from lightning_znorm.lazy import lazy_names

if TYPE_CHECKING:
    from lightning_znorm.callbacks import (
        GradientCentralizationCallback,
        GradientMonitor,
        GradientTransform,
        LastCheckpoint,
        MaskOverlay,
        MaskWriter,
        ScoreWriter,
        SINGCallback,
        ZNormCallback,
    )
else:
    # Not imported yet, so that `lightning_znorm.functional` works in a program that never loads Lightning.
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "callbacks": [
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
        },
        ["callbacks", "compare", "data", "errors", "functional", "gradients", "metrics", "models", "tasks"],
    )

__version__ = "0.1.0"

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
