"""Two processes train under BackboneFinetuning. Called by test_fine_tuning.py."""

import os
from functools import partial
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.callbacks import BackboneFinetuning, BaseFinetuning
from lightning.pytorch.strategies import DDPStrategy
from torch.utils.data import DataLoader, TensorDataset

from lightning_znorm.tasks import SegmentationTask, fine_tuning
from tests.trainers import trainer


class Network(torch.nn.Module):
    """An encoder and a decoder with batch normalization, each a single convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3, padding=1, bias=False), torch.nn.BatchNorm2d(4))
        self.decoder = torch.nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        return self.decoder(self.encoder(images).relu())


def task(**kwargs: Any) -> SegmentationTask:
    torch.manual_seed(0)
    return SegmentationTask(Network(), optimizer=partial(torch.optim.SGD, lr=0.1, momentum=0.9), **kwargs)


def loader(batch_size: int = 2) -> DataLoader[Any]:
    """Return the same eight images and masks at each call, in the same order."""
    generator = torch.Generator().manual_seed(1)
    images = torch.rand(8, 3, 8, 8, generator=generator)
    dataset = TensorDataset(images, (images[:, :1] > 0.5).float())
    # With a generator of its own, so that it draws nothing from torch's.
    return DataLoader(dataset, batch_size=batch_size, generator=torch.Generator())


class OwnFinetuning(BaseFinetuning):
    """A user's callback that unfreezes the encoder at epoch 1."""

    def freeze_before_training(self, pl_module: LightningModule) -> None:
        self.freeze(pl_module.model.encoder, train_bn=False)

    def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.model.encoder, optimizer)


def encoders_after(
    unfreeze_at: int, is_checked: bool, find_unused_parameters: bool = False, own: bool = False
) -> list[float] | str:
    """Train for two epochs; return the weights of this process' encoder, or the error."""
    if not is_checked:
        fine_tuning.check_processes = lambda _: None  # type: ignore[assignment]
        fine_tuning.check_still_frozen = lambda *_: None  # type: ignore[assignment]
    ours = task()
    made = trainer(
        max_epochs=2,
        devices=2,
        strategy=DDPStrategy(find_unused_parameters=find_unused_parameters),
        callbacks=[OwnFinetuning() if own else BackboneFinetuning(unfreeze_at, train_bn=False)],
        limit_val_batches=0,
    )
    assert int(os.environ["WORLD_SIZE"]) == made.world_size
    try:
        made.fit(ours, loader(), loader())
    except ValueError as error:
        return str(error)
    return ours.model.encoder[0].weight.flatten().tolist()
