"""Trains with a metric that gets worse by each epoch, and resumes: alone or as one of two processes."""

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.utils.data import DataLoader

from lightning_znorm import LastCheckpoint

# In "alone", no callback that looks for the best epoch has all ranks reduce the metrics at an epoch's end.
SCENARIOS = {"ddp": DDPStrategy, "alone": DDPStrategy, "fsdp2": ModelParallelStrategy}


class Falling(LightningModule):
    """Its metric is best in the first epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(2, 1)

    def configure_model(self) -> None:
        if isinstance(self.trainer.strategy, ModelParallelStrategy):
            fully_shard(self.layer, mesh=self.device_mesh["data_parallel"])

    def training_step(self, batch: Tensor) -> Tensor:
        loss = self.layer(batch).square().mean()
        # At an epoch's end the progress bar of rank 0 reduces it, before the other rank gets there.
        self.log("loss", loss, on_step=False, on_epoch=True, prog_bar=True, sync_dist=True)
        return loss

    def validation_step(self, batch: Tensor) -> None:
        for name in ("score", "other"):
            self.log(name, 1.0 / (1 + self.current_epoch), sync_dist=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(
    folder: Path, *extra: Callback, ckpt_path: str | None = None, keep_best: bool = True, **options: Any
) -> Trainer:
    best = ModelCheckpoint(folder, monitor="score", mode="max", filename="best", enable_version_counter=False)
    checkpoints = [LastCheckpoint(), best] if keep_best else [LastCheckpoint(folder)]
    return fit(*checkpoints, *extra, ckpt_path=ckpt_path, **options)


def fit(*callbacks: Callback, ckpt_path: str | None = None, **options: Any) -> Trainer:
    trainer = Trainer(
        accelerator="cpu",
        callbacks=list(callbacks),
        **{"logger": False, "enable_progress_bar": False, "enable_model_summary": False, "max_epochs": 3, **options},
    )
    again(trainer, ckpt_path)
    return trainer


def again(trainer: Trainer, ckpt_path: str | None = None) -> None:
    data = DataLoader(torch.ones(8, 2), batch_size=2)
    trainer.fit(Falling(), data, data, ckpt_path=ckpt_path)


def refused(folder: Path) -> str:
    """Return what one of two processes is told of another callback that writes the same file."""
    with pytest.raises(MisconfigurationException) as caught:
        train(folder, ModelCheckpoint(folder, save_last=True), keep_best=False, devices=2, strategy=DDPStrategy())
    return str(caught.value)


def resumed(folder: Path, name: str) -> list[dict[str, Any]]:
    """Return what one of two processes sees after three epochs, and after a fourth that goes on from them."""
    seen = []
    for ckpt_path, epochs in ((None, 3), ("last", 4)):
        options = {"devices": 2, "strategy": SCENARIOS[name](), "max_epochs": epochs, "enable_progress_bar": True}
        trainer = train(folder, ckpt_path=ckpt_path, keep_best=name != "alone", **options)
        seen.append(
            {
                "resumed": Path(trainer.ckpt_path or "").name,
                "epoch": trainer.current_epoch,
                "files": sorted(path.name for path in folder.iterdir()),
                "is_folder": (folder / "last.ckpt").is_dir(),
                "step": trainer.strategy.load_checkpoint(folder / "last.ckpt", weights_only=False)["global_step"]
                if name != "fsdp2"
                else torch.load(folder / "last.ckpt" / "meta.pt", weights_only=False)["global_step"],
            }
        )
        trainer.strategy.barrier()  # so that none saves the next one while the other still looks
    return seen
