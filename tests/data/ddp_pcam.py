"""Two processes train on patches; each writes what it saw. Run by test_pcam.py."""

import json
import sys
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer

from lightning_znorm.data import PCamDataModule, array_file


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


if __name__ == "__main__":
    root, out = sys.argv[1:]
    made: list[str] = []
    make = array_file._make
    array_file._make = lambda file, fill: (made.append(file.path.name), make(file, fill))
    data, recorder = PCamDataModule(root, batch_size=8, cache_dir=Path(out) / "cache"), Recorder()
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        logger=False,
        num_sanity_val_steps=0,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(recorder, datamodule=data)
    Path(out, f"{trainer.global_rank}.json").write_text(json.dumps({**recorder.seen, "made": made}))
