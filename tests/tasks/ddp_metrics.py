"""Two processes validate on two loaders, and train. Called by test_classification.py."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_znorm.tasks import ClassificationTask


def task(**kwargs: Any) -> ClassificationTask:
    torch.manual_seed(0)
    return ClassificationTask(nn.Linear(4, 3), num_classes=3, **kwargs)


def loader(seed: int = 1) -> DataLoader:
    """Ten images for each of two processes, in batches of eight and two."""
    generator = torch.Generator().manual_seed(seed)
    images, labels = torch.randn(20, 4, generator=generator), torch.randint(3, (20,), generator=generator)
    return DataLoader(TensorDataset(images, labels), batch_size=8)


def validate_and_train() -> tuple[list[Mapping[str, float]], list[int]]:
    """Return what was logged of each loader, and the steps of the scheduler and of the trainer."""
    trainer = Trainer(
        max_epochs=3,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    metrics = trainer.validate(task(), [loader(), loader(seed=2)], verbose=False)
    trainer.fit(task(lr_scheduler=partial(torch.optim.lr_scheduler.OneCycleLR, max_lr=0.1)), loader())
    (config,) = trainer.lr_scheduler_configs
    return metrics, [config.scheduler.total_steps, config.scheduler.last_epoch, trainer.global_step]
