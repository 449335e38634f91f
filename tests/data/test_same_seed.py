"""Two trainings with one seed get the same batches and end with the same weights, with any number of workers."""

from collections.abc import Callable
from functools import partial

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule, seed_everything
from torch import Tensor, nn

from lightning_znorm import ZNormCallback
from lightning_znorm.data import (
    CIFAR10DataModule,
    DigitsDataModule,
    ImageFolderDataModule,
    LGGDataModule,
    MaskFolderDataModule,
    PCamDataModule,
)
from tests.data.jpegs import write_image_folder
from tests.medical import write_mask_folder
from tests.trainers import trainer


class Witness(LightningModule):
    """Records its batches, and draws random numbers as it trains on them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.LazyLinear(4), nn.Dropout(), nn.Linear(4, 1))
        self.seen: list[Tensor] = []

    def training_step(self, batch, batch_idx):
        self.seen += [tensor.clone() for tensor in batch]
        return self.layer(batch[0].mean((2, 3))).square().mean()

    def validation_step(self, batch, batch_idx):
        self.seen += [tensor.clone() for tensor in batch if isinstance(tensor, Tensor)]

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=1e-3)


def bits(make: Callable[[], LightningDataModule], seed: int = 3) -> list[Tensor]:
    """Return all batches of two epochs, and the weights at the end."""
    seed_everything(seed)
    module, data = Witness(), make()
    module.layer(torch.zeros(1, 1 if isinstance(data, DigitsDataModule) else 3))
    trainer(max_epochs=2, limit_train_batches=5, callbacks=[ZNormCallback()]).fit(module, datamodule=data)
    return [*module.seen, *(parameter.detach() for parameter in module.parameters())]


def same(one: list[Tensor], other: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.fixture(autouse=True)
def seed_of_lightning(monkeypatch):
    monkeypatch.setenv("PL_GLOBAL_SEED", "0")  # to be put back


def check(make: Callable[[], LightningDataModule]) -> list[Tensor]:
    first = bits(make)
    assert same(first, bits(make))
    assert not same(first, bits(make, seed=4))
    return first


def test_digits():
    check(lambda: DigitsDataModule(batch_size=200))


def test_cifar10(fake_cifar10):
    check(lambda: CIFAR10DataModule(fake_cifar10, batch_size=50, augment=True))


def test_lgg(fake_lgg):
    check(lambda: LGGDataModule(fake_lgg, batch_size=4, augment=True))


def test_mask_folder(tmp_path):
    """With random numbers of torch, NumPy and MONAI."""
    write_mask_folder(tmp_path)
    noise = {"class_path": "monai.transforms.RandGaussianNoised", "init_args": {"keys": ["image"], "prob": 0.5}}
    steps = [noise, {"class_path": "torchvision.transforms.v2.RandomVerticalFlip"}]

    def make(workers: int) -> MaskFolderDataModule:
        return MaskFolderDataModule(
            tmp_path, 4, mask_values=[0, 128, 255], train_transform=steps, augment=True, num_workers=workers
        )

    first = check(lambda: make(0))
    for workers in (1, 2):
        assert same(first, bits(partial(make, workers)))


def test_pcam(fake_pcam):
    first = check(lambda: PCamDataModule(fake_pcam, batch_size=16))
    for workers in (1, 2):
        assert same(first, bits(lambda: PCamDataModule(fake_pcam, batch_size=16, num_workers=workers)))  # noqa: B023


def test_image_folder(tmp_path):
    root = write_image_folder(tmp_path / "images", classes=2, train=12, val=4)

    def make(workers: int) -> ImageFolderDataModule:
        return ImageFolderDataModule(root, batch_size=6, num_workers=workers, image_size=16, resize_size=20)

    first = check(lambda: make(0))
    for workers in (1, 2):
        assert same(first, bits(partial(make, workers)))
