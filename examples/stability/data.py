"""CIFAR-10, small enough to be learnt by heart on one CPU core."""

import numpy as np

from lightning_znorm.data import CIFAR10DataModule
from lightning_znorm.data.splits import stratified_split


class SmallCIFAR10(CIFAR10DataModule):
    """3,000 of CIFAR-10's training images and 2,000 of its test images at 8x8 pixels, equally many of each class.

    The images are the same for every seed and method. ``val_fraction`` of the training images become validation images.
    Each pixel is the mean of sixteen pixels.
    """

    def load(self, train: bool) -> tuple[np.ndarray, np.ndarray]:
        """Read the part of the images."""
        images, labels = super().load(train)
        images, labels = stratified_split(images, labels, fraction=0.06 if train else 0.2, seed=0)[1]
        count, channels, height, width = images.shape
        squares = images.reshape(count, channels, height // 4, 4, width // 4, 4)
        return squares.mean(axis=(3, 5)).round().astype(np.uint8), labels
