"""What is trained on: LightningDataModules."""

from lightning_znorm.data.cifar10 import CIFAR10DataModule
from lightning_znorm.data.digits import DigitsDataModule

__all__ = ["CIFAR10DataModule", "DigitsDataModule"]
