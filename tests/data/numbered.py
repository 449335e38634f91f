"""A data module whose images carry their own number, and a module that records its batches."""

import numpy as np
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from lightning_znorm.data.base import InMemoryDataModule


class NumberedDataModule(InMemoryDataModule):
    """Training images 0 ... 99 and test images 100 ... 149. All pixels of an image are its number, and its class is the
    number modulo 5. It shows all that a new data set needs."""

    num_classes = 5
    max_value = 200
    mean = (0.25, 0.5)
    std = (0.5, 0.25)

    def __init__(self, batch_size: int = 16, val_fraction: float = 0.2, seed: int = 0) -> None:
        super().__init__(batch_size, val_fraction, seed)
        self.reads: list[bool] = []

    def load(self, train):
        self.reads.append(train)
        numbers = np.arange(100) if train else np.arange(100, 150)
        images = np.broadcast_to(numbers.astype(np.uint8)[:, None, None, None], (len(numbers), 2, 4, 4))
        return images, numbers % 5

    def numbers(self, images: Tensor) -> list[int]:
        """Undo the normalization."""
        return ((images[:, 0, 0, 0] * self.std[0] + self.mean[0]) * self.max_value).round().int().tolist()


class Recorder(LightningModule):
    """Records the batches of every stage, as they reach a step."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 5)
        self.seen: dict[str, list[list[Tensor]]] = {"train": [], "val": [], "test": [], "predict": []}

    def training_step(self, batch, batch_idx):
        self.seen["train"].append(batch)
        return self.layer(batch[0].mean((2, 3))).sum()

    def validation_step(self, batch, batch_idx):
        self.seen["val"].append(batch)

    def test_step(self, batch, batch_idx):
        self.seen["test"].append(batch)

    def predict_step(self, batch, batch_idx):
        self.seen["predict"].append(batch)
        return batch[1]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)
