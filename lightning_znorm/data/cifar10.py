"""CIFAR-10, 60,000 images in ten classes."""

from pathlib import Path

import numpy as np
from torch import Tensor
from typing_extensions import override

from lightning_znorm.arguments import checked_folder
from lightning_znorm.data.augmentation import random_crop_and_flip
from lightning_znorm.data.base import InMemoryDataModule
from lightning_znorm.data.datasets import Images, Labels
from lightning_znorm.errors import ZNormFileNotFoundError, ZNormRuntimeError
from lightning_znorm.hyperparameters import plain_values

_DOWNLOAD = "download=True (on the command line: --data.init_args.download=true)"


class CIFAR10DataModule(InMemoryDataModule):
    """CIFAR-10: 50,000 images for training and validation and 10,000 for the test, 32x32 pixels, RGB, ten classes.

    Read through `torchvision.datasets.CIFAR10`, which only unpickles files with the published MD5 sums::

        root/
          cifar-10-batches-py/
            data_batch_1 ... data_batch_5
            test_batch
            batches.meta

    Source:
        Krizhevsky, "Learning Multiple Layers of Features from Tiny Images", 2009,
        https://www.cs.toronto.edu/~kriz/cifar.html (no licence is stated).

    Args:
        root: Folder that holds ``cifar-10-batches-py``, or will hold it after a download.
        batch_size: Images per batch and process.
        val_fraction: Share of the training images that become validation images, between 0 and 1.
        seed: Draws the validation images, and nothing else.
        augment: Shift each training image by up to 4 pixels and mirror it with probability 1/2
            (`lightning_znorm.data.augmentation.random_crop_and_flip`).
        download: Download the data (170 MB) if they are missing or damaged.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If one is of another type.
        ImportError: If a package that it needs is missing.

    Example:
        >>> data = CIFAR10DataModule(root="data", download=True)
        >>> data.num_classes, data.hparams.batch_size
        (10, 256)
    """

    _packages = ("sklearn", "torchvision")
    num_classes = 10
    max_value = 255
    # Of all pixels of the 50,000 training images.
    mean = (0.4914, 0.4822, 0.4465)
    std = (0.2470, 0.2435, 0.2616)

    def __init__(
        self,
        root: str | Path = "data",
        batch_size: int = 256,
        val_fraction: float = 0.1,
        seed: int = 0,
        augment: bool = False,
        download: bool = False,
    ) -> None:
        super().__init__(batch_size, val_fraction, seed)
        root, augment, download = plain_values(root=root, augment=augment, download=download)
        self.save_hyperparameters()
        self.root = checked_folder("root", root)
        self.augment = augment
        self.download = download

    @override
    def prepare_data(self) -> None:
        """Download the data, if ``download`` is set. One process per machine runs this."""
        if not self.download:
            return
        from torchvision.datasets import CIFAR10

        try:
            CIFAR10(self.root, train=False, download=True)
        except OSError as error:  # the errors of urllib are subclasses
            raise ZNormRuntimeError(
                f"CIFAR-10 could not be downloaded into {self.root} ({error}): fetch {CIFAR10.url} another way and "
                "unpack it there."
            ) from error

    @override
    def load(self, train: bool) -> tuple[Images, Labels]:
        """Read the 50,000 images for training and validation, or the 10,000 for the test."""
        from torchvision.datasets import CIFAR10

        try:
            dataset = CIFAR10(self.root, train=train)
        except RuntimeError as error:
            raise _read_error(self.root) from error
        return dataset.data.transpose(0, 3, 1, 2), np.array(dataset.targets, dtype=np.int64)

    @override
    def augment_batch(self, images: Tensor) -> Tensor:
        """Shift and mirror each image, if ``augment`` is set."""
        return random_crop_and_flip(images) if self.augment else images


def _read_error(root: Path) -> Exception:
    """Return an error that names the missing or damaged files, which torchvision's does not."""
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    folder = root / CIFAR10.base_folder
    if not folder.is_dir():
        return ZNormFileNotFoundError(
            f"No CIFAR-10 at {root}: download it there with {_DOWNLOAD}, or let root name the folder that holds "
            f"{CIFAR10.base_folder}."
        )
    files = [*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])]
    damaged = [folder / name for name, md5 in files if not check_integrity(folder / name, md5)]
    states = [f"{path} is {'corrupted' if path.exists() else 'missing'}" for path in damaged]
    return ZNormRuntimeError(f"{' and '.join(states)}: download CIFAR-10 again with {_DOWNLOAD}.")
