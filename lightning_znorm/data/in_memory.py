"""Image data sets that fit in memory."""

from abc import ABC, abstractmethod
from functools import lru_cache
from typing import TypeAlias

import numpy as np
import torch
from lightning.pytorch import LightningDataModule
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_convert
from typing_extensions import override

Images: TypeAlias = NDArray[np.uint8]
"""Shape ``(N, C, H, W)``."""
Labels: TypeAlias = NDArray[np.int64]
"""Shape ``(N,)``."""
Batch: TypeAlias = tuple[Tensor, Tensor]
"""Images of shape ``(N, C, H, W)`` and labels of shape ``(N,)``."""


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


class InMemoryDataModule(LightningDataModule, ABC):
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
    max_value: int
    """Largest value that a pixel may have."""
    mean: tuple[float, ...]
    """Mean of each channel, in units of `max_value`."""
    std: tuple[float, ...]
    """Standard deviation of each channel, in units of `max_value`."""

    def __init__(self, batch_size: int, val_fraction: float, seed: int) -> None:
        super().__init__()
        if not 0 < val_fraction < 1:
            raise ValueError(f"val_fraction is the share of training images to validate on, in (0, 1): {val_fraction}.")
        self.batch_size = batch_size
        self.val_fraction = val_fraction
        self.seed = seed

    @abstractmethod
    def load(self, train: bool) -> tuple[Images, Labels]:
        """Read all training images (those for validation among them), or all test images."""

    def augment_batch(self, images: Tensor) -> Tensor:
        """Change a batch of training images, uint8 on the device; by default not at all."""
        return images

    @override
    def setup(self, stage: str) -> None:
        """Read what the stage needs."""
        if stage in ("fit", "validate"):
            train, val = stratified_split(*self.load(train=True), self.val_fraction, self.seed)
            self.train_set, self.val_set = InMemoryImages(*train), InMemoryImages(*val)
        else:
            self.test_set = InMemoryImages(*self.load(train=False))

    @override
    def train_dataloader(self) -> DataLoader[Batch]:
        """Training batches, in a new order each epoch."""
        return self._loader(self.train_set, shuffle=True)

    @override
    def val_dataloader(self) -> DataLoader[Batch]:
        """Validation batches."""
        return self._loader(self.val_set)

    @override
    def test_dataloader(self) -> DataLoader[Batch]:
        """Test batches."""
        return self._loader(self.test_set)

    @override
    def predict_dataloader(self) -> DataLoader[Batch]:
        """Test batches."""
        return self._loader(self.test_set)

    @override
    def on_after_batch_transfer(self, batch: Batch, dataloader_idx: int) -> Batch:
        """Augment (in training alone) and normalize, on the device."""
        images, labels = batch
        if self.trainer is not None and self.trainer.training:
            images = self.augment_batch(images)
        mean, std = _mean_and_std(self.mean, self.std, self.max_value, images.device)
        images = images.float().sub_(mean).div_(std)  # in place: on a CPU, fresh memory costs more than sums
        if self.trainer is not None:
            # Lightning converts to the precision of "16-true" and its like before this hook, when there are no floats.
            images = self.trainer.precision_plugin.convert_input(images)
        return images, labels

    def _loader(self, dataset: InMemoryImages, shuffle: bool = False) -> DataLoader[Batch]:
        # Copies from pinned memory alone leave the CPU free to run ahead of a CUDA device.
        pin_memory = self.trainer is not None and self.trainer.strategy.root_device.type == "cuda"
        # By keyword, else Lightning cannot replace the sampler (for several processes, and to predict).
        return DataLoader(
            dataset, batch_size=self.batch_size, shuffle=shuffle, collate_fn=default_convert, pin_memory=pin_memory
        )


def stratified_split(
    images: Images, labels: Labels, fraction: float, seed: int
) -> tuple[tuple[Images, Labels], tuple[Images, Labels]]:
    """Split ``fraction`` of the images off, the same share of every class."""
    from sklearn.model_selection import train_test_split

    rest, taken = train_test_split(np.arange(len(labels)), test_size=fraction, stratify=labels, random_state=seed)
    return (images[rest], labels[rest]), (images[taken], labels[taken])


# Kept on the device: to send them with every batch would make the CPU wait for it.
@lru_cache
def _mean_and_std(
    mean: tuple[float, ...], std: tuple[float, ...], max_value: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    pixels = torch.tensor([mean, std], dtype=torch.float32, device=device) * max_value
    return pixels[0].view(-1, 1, 1), pixels[1].view(-1, 1, 1)
