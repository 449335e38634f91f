"""Image data sets that fit in memory."""

from abc import abstractmethod
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_znorm.data.images import Batch, ImageDataModule, Labels, stratified_indices

Images: TypeAlias = NDArray[np.uint8]
"""Shape ``(N, C, H, W)``."""


class InMemoryImages(Dataset[Batch]):
    """Images and labels in two NumPy arrays, of which a DataLoader takes a whole batch at a time.

    NumPy, because torch indexes uint8 tensors many times more slowly.

    Args:
        images: Shape ``(N, C, H, W)``, uint8.
        labels: Shape ``(N,)``, int64.
    """

    def __init__(self, images: Images, labels: Labels) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        """Return one image of shape ``(C, H, W)`` and its label, of shape ``()``."""
        return torch.as_tensor(self.images[index]), torch.as_tensor(self.labels[index])

    def __getitems__(self, indices: list[int]) -> Batch:
        """Return a batch; `DataLoader` calls this in place of `__getitem__`."""
        return torch.from_numpy(self.images[indices]), torch.from_numpy(self.labels[indices])


class InMemoryDataModule(ImageDataModule):
    """Base of the data modules whose images fit in memory.

    A subclass says how its images are read (`load`) and what they are (the class attributes). Images travel as uint8
    and are normalized on the device to zero mean and unit standard deviation per channel. There are no worker
    processes, for there is no work per sample to share out: indexing one array is faster than passing batches between
    processes. (On a machine with more than two cores, Lightning advises workers all the same.)

    Validation images are split off from the training images, stratified by class; the test images are read for
    ``test`` and ``predict`` alone.

    Args:
        batch_size: Images per batch and process.
        val_fraction: Share of the training images that become validation images, between 0 and 1.
        seed: Draws the validation images, and nothing else.
    """

    num_classes: int

    @abstractmethod
    def load(self, train: bool) -> tuple[Images, Labels]:
        """Read all training images (those for validation among them), or all test images."""

    @override
    def setup(self, stage: str) -> None:
        """Read what the stage needs."""
        super().setup(stage)
        if stage in ("fit", "validate"):
            train, val = stratified_split(*self.load(train=True), self.val_fraction, self.seed)
            self.train_set, self.val_set = InMemoryImages(*train), InMemoryImages(*val)
        else:
            self.test_set = InMemoryImages(*self.load(train=False))


def stratified_split(
    images: Images, labels: Labels, fraction: float, seed: int
) -> tuple[tuple[Images, Labels], tuple[Images, Labels]]:
    """Split ``fraction`` of the images off, the same share of every class."""
    rest, taken = stratified_indices(labels, fraction, seed)
    return (images[rest], labels[rest]), (images[taken], labels[taken])
