"""Two processes train with ``channels_last``. Called by test_channels_last.py."""

import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from lightning_znorm import ZNormCallback
from lightning_znorm.tasks import ClassificationTask
from tests.trainers import trainer


def train(name: str, channels_last: bool, **kwargs: Any) -> tuple[dict[str, Tensor], list[str]]:
    """Return the weights after three steps in float64, and what the processes were warned of."""
    torch.manual_seed(0)
    task = ClassificationTask(
        name, num_classes=4, optimizer=partial(torch.optim.SGD, lr=0.01, momentum=0.9), channels_last=channels_last
    )
    images = torch.randn(12, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    data = DataLoader(TensorDataset(images, torch.arange(12) % 4), batch_size=2)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run = trainer(
            max_steps=3,
            devices=2,
            strategy="ddp",
            limit_val_batches=0,
            precision="64-true",
            callbacks=[ZNormCallback(min_ndim=2)],
            **kwargs,
        )
        run.fit(task, data)
    return dict(task.named_parameters()), [str(warning.message) for warning in caught]
