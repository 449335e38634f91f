"""What is trained: LightningModules."""

from lightning_znorm.tasks.classification import ClassificationTask

__all__ = ["ClassificationTask"]
