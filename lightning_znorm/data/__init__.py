"""What is trained on: LightningDataModules."""

from lightning_znorm.data.cifar10 import CIFAR10DataModule
from lightning_znorm.data.digits import DigitsDataModule
from lightning_znorm.data.image_folder import ImageFolderDataModule
from lightning_znorm.data.lgg import LGGDataModule
from lightning_znorm.data.pcam import PCamDataModule

__all__ = ["CIFAR10DataModule", "DigitsDataModule", "ImageFolderDataModule", "LGGDataModule", "PCamDataModule"]
