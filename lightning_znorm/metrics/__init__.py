"""Scores of predicted masks: torchmetrics with one policy for empty masks and states of constant size."""

from lightning_znorm.metrics.hausdorff import HausdorffDistance
from lightning_znorm.metrics.overlap import DiceScore, TverskyIndex

__all__ = ["DiceScore", "HausdorffDistance", "TverskyIndex"]
