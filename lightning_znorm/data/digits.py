"""scikit-learn's handwritten digits."""

import numpy as np
from typing_extensions import override

from lightning_znorm.data.base import InMemoryDataModule
from lightning_znorm.data.datasets import Images, Labels
from lightning_znorm.data.splits import stratified_split


class DigitsDataModule(InMemoryDataModule):
    """1,797 real handwritten digits, 8x8 pixels in 17 shades of grey. They come with scikit-learn: no download.

    A fifth of them (360, stratified) is the test set, the same for every seed. Of the others (1,437) a share is split
    off for validation.

    Source:
        Alpaydin and Kaynak, "Optical Recognition of Handwritten Digits", UCI Machine Learning Repository, 1998
        (CC BY 4.0): its test part, which `sklearn.datasets.load_digits` returns.

    Args:
        batch_size: Images per batch and process.
        val_fraction: Share of the training images that become validation images, between 0 and 1.
        seed: Draws the validation images, and nothing else.

    Raises:
        ValueError: If an argument is out of range.
        TypeError: If one is of another type.
        ImportError: If a package that it needs is missing.

    Example:
        >>> data = DigitsDataModule(batch_size=32)
        >>> data.setup("fit")
        >>> images, labels = next(iter(data.train_dataloader()))
        >>> images.shape, images.dtype, labels.shape
        (torch.Size([32, 1, 8, 8]), torch.uint8, torch.Size([32]))
    """

    num_classes = 10
    max_value = 16
    # Of the 1,437 digits that are not the test set.
    mean = (0.3054,)
    std = (0.3761,)

    def __init__(self, batch_size: int = 64, val_fraction: float = 0.1, seed: int = 0) -> None:
        super().__init__(batch_size, val_fraction, seed)
        self.save_hyperparameters()

    @override
    def load(self, train: bool) -> tuple[Images, Labels]:
        """Read the 1,437 digits for training and validation, or the 360 for the test."""
        from sklearn.datasets import load_digits

        digits = load_digits()
        images, labels = digits.images[:, None].astype(np.uint8), digits.target.astype(np.int64)
        training, test = stratified_split(images, labels, fraction=0.2, seed=0)
        return training if train else test
