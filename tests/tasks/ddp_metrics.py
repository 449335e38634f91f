"""Two processes validate one task; the first writes what was logged. Run by test_classification.py."""

import json
import sys
from pathlib import Path

import torch
from lightning.pytorch import Trainer
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_znorm.tasks import ClassificationTask


def task() -> ClassificationTask:
    torch.manual_seed(0)
    return ClassificationTask(nn.Linear(4, 3), num_classes=3)


def loader() -> DataLoader:
    """Ten images for each of two processes, in batches of eight and two."""
    generator = torch.Generator().manual_seed(1)
    images, labels = torch.randn(20, 4, generator=generator), torch.randint(3, (20,), generator=generator)
    return DataLoader(TensorDataset(images, labels), batch_size=8)


if __name__ == "__main__":
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    (metrics,) = trainer.validate(task(), loader(), verbose=False)
    if trainer.is_global_zero:
        Path(sys.argv[1]).write_text(json.dumps(metrics))
