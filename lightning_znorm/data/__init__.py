"""LightningDataModules, one file a data set.

To add a data set, write one new file with a subclass of a base class in `lightning_znorm.data.base`. Name it here.

- `InMemoryDataModule` for images that fit in memory: the method ``load`` reads them.
- `lightning_znorm.data.segmentation.SegmentationDataModule` for images and masks, split by patient.
- `ImageDataModule` for other images: the method ``setup`` sets ``train_set``, ``val_set`` and ``test_set`` to datasets,
  such as those in `lightning_znorm.data.datasets`.
"""

from typing import TYPE_CHECKING

from lightning_znorm.lazy import lazy_names

if TYPE_CHECKING:
    from lightning_znorm.data.cifar10 import CIFAR10DataModule
    from lightning_znorm.data.digits import DigitsDataModule
    from lightning_znorm.data.image_folder import ImageFolderDataModule
    from lightning_znorm.data.lgg import LGGDataModule
    from lightning_znorm.data.mask_folder import MaskFolderDataModule
    from lightning_znorm.data.pcam import PCamDataModule
    from lightning_znorm.data.volumes import VolumeDataModule
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "cifar10": ["CIFAR10DataModule"],
            "digits": ["DigitsDataModule"],
            "image_folder": ["ImageFolderDataModule"],
            "lgg": ["LGGDataModule"],
            "mask_folder": ["MaskFolderDataModule"],
            "pcam": ["PCamDataModule"],
            "volumes": ["VolumeDataModule"],
        },
    )

__all__ = [
    "CIFAR10DataModule",
    "DigitsDataModule",
    "ImageFolderDataModule",
    "LGGDataModule",
    "MaskFolderDataModule",
    "PCamDataModule",
    "VolumeDataModule",
]
