"""Scores of predicted masks, as torchmetrics: one policy for empty masks, and states that hold no pixels.

To add a score, write one new file with a subclass of `lightning_znorm.metrics.mask_metric.MaskMetric`, whose methods
``scores`` and ``worst`` define it. Name it here.
"""

from typing import TYPE_CHECKING

from lightning_znorm.lazy import lazy_names

if TYPE_CHECKING:
    from lightning_znorm.metrics.counts import MaskCount
    from lightning_znorm.metrics.dice import DiceScore, TverskyIndex
    from lightning_znorm.metrics.hausdorff import HausdorffDistance
    from lightning_znorm.metrics.patients import PatientCount, PatientDiceScore
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "counts": ["MaskCount"],
            "dice": ["DiceScore", "TverskyIndex"],
            "hausdorff": ["HausdorffDistance"],
            "patients": ["PatientCount", "PatientDiceScore"],
        },
    )

__all__ = ["DiceScore", "HausdorffDistance", "MaskCount", "PatientCount", "PatientDiceScore", "TverskyIndex"]
