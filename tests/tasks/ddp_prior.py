"""Two processes begin a training with a prior. Called by test_prior.py."""

import os
from functools import partial
from typing import Any

import torch
from torch import nn

from lightning_znorm.data import DigitsDataModule
from lightning_znorm.tasks import ClassificationTask
from tests.strategies.strategies import CPUFSDPStrategy, fsdp1_weights
from tests.trainers import trainer


class Watched(ClassificationTask):
    """Notes whether its setup draws random numbers, and the output biases before the first step."""

    def setup(self, stage: str) -> None:
        before = torch.get_rng_state()
        super().setup(stage)
        self.drew = not torch.equal(torch.get_rng_state(), before)

    def on_train_start(self) -> None:
        super().on_train_start()
        weights = dict(self.named_parameters())
        if isinstance(self.trainer.strategy, CPUFSDPStrategy):
            weights: Any = fsdp1_weights(self)
        self.bias = weights["model.1.bias"].detach().clone()


def start(strategy: str) -> tuple[list[float], list[float], bool]:
    """Return the output biases before the first step, the counted shares, and whether random numbers were drawn."""
    torch.manual_seed(int(os.environ["RANK"]))
    network = nn.Sequential(nn.Flatten(), nn.Linear(64, 10))
    task = Watched(network, num_classes=10, optimizer=partial(torch.optim.SGD, lr=0.1), prior="auto")
    data = DigitsDataModule(batch_size=64)
    made: Any = strategy if strategy == "ddp" else CPUFSDPStrategy()
    trainer(max_steps=1, devices=2, strategy=made, limit_val_batches=0).fit(task, datamodule=data)
    return task.bias.tolist(), data.class_frequencies(), task.drew
