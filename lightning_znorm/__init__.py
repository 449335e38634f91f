"""Z-score gradient normalization (ZNorm) for PyTorch Lightning."""

import importlib
from typing import TYPE_CHECKING, Any

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


_MODULES = ["callbacks", "compare", "data", "errors", "functional", "gradients", "metrics", "models", "tasks"]


# Resolved on first use, so that `lightning_znorm.functional` works in a program that never loads Lightning.
def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(importlib.import_module("lightning_znorm.callbacks"), name)
    if name in _MODULES:
        return importlib.import_module(f"lightning_znorm.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_MODULES})
