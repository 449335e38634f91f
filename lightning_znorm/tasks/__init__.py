"""LightningModules for image classification and segmentation."""

from lightning_znorm.tasks.classification import ClassificationTask
from lightning_znorm.tasks.segmentation import SegmentationTask

__all__ = ["ClassificationTask", "SegmentationTask"]
