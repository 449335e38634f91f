"""A fixed part of CIFAR-10, for studies that a CPU can finish."""

import numpy as np

from lightning_znorm.data import CIFAR10DataModule
from lightning_znorm.data.splits import stratified_split


class CIFAR10Subset(CIFAR10DataModule):
    """10,000 of CIFAR-10's 50,000 training images, 1,000 of each class; the test images are all 10,000.

    The images are the same for every seed and method, whatever the batches are. (A limit on the number of batches would
    draw other images in every epoch, and so train on all 50,000.) ``val_fraction`` of them become validation images.
    """

    def load(self, train: bool) -> tuple[np.ndarray, np.ndarray]:
        """Read the part of the training images, or all test images."""
        images, labels = super().load(train)
        return stratified_split(images, labels, fraction=0.2, seed=0)[1] if train else (images, labels)
