"""LightningModules for image classification and segmentation."""

from typing import TYPE_CHECKING

from lightning_znorm.lazy import lazy_names

if TYPE_CHECKING:
    from lightning_znorm.tasks.classification import ClassificationTask
    from lightning_znorm.tasks.segmentation import SegmentationTask
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "classification": ["ClassificationTask"],
            "segmentation": ["SegmentationTask"],
        },
    )

__all__ = ["ClassificationTask", "SegmentationTask"]
