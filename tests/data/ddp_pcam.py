"""Two processes train on patches. Called by test_pcam.py."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule

from lightning_znorm.data import PCamDataModule, array_file
from tests.trainers import trainer


class Recorder(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(3, 2)
        self.seen: dict[str, list[list[float]]] = {"train": [], "val": []}

    def note(self, stage: str, batch: list[torch.Tensor]) -> torch.Tensor:
        self.seen[stage].append([round(value, 7) for value in batch[0].double().mean((1, 2, 3)).tolist()])
        return self.layer(batch[0].mean((2, 3))).sum()

    def training_step(self, batch, batch_idx):
        return self.note("train", batch)

    def validation_step(self, batch, batch_idx):
        self.note("val", batch)

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def see(root: Path, cache_dir: Path) -> dict[str, list[Any]]:
    """Return the batches of each stage as one of two processes sees them, and the files that it made."""
    made: list[str] = []
    make = array_file._make
    array_file._make = lambda file, fill: (made.append(file.path.name), make(file, fill))
    data, recorder = PCamDataModule(root, batch_size=8, cache_dir=cache_dir), Recorder()
    trainer(max_epochs=2, devices=2, strategy="ddp", num_sanity_val_steps=0).fit(recorder, datamodule=data)
    return {**recorder.seen, "made": made}
