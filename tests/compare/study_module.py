"""An experiment of a user's own for a study: a small network that writes down what it starts from and is fed with."""

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset, random_split

from lightning_znorm import GradientTransform, ZNormCallback
from lightning_znorm.functional import attach


class StudyData(LightningDataModule):
    def __init__(self, batch_size: int = 8, drop_last: bool = False) -> None:
        super().__init__()
        self.batch_size = batch_size
        self.drop_last = drop_last

    def setup(self, stage: str) -> None:
        generator = torch.Generator().manual_seed(0)
        inputs = torch.randn(96, 6, generator=generator)
        labels = (inputs.sum(1) + torch.randn(96, generator=generator) > 0).long()
        seen, unseen = random_split(TensorDataset(inputs, labels), [72, 24], generator=generator)
        self.parts = [*random_split(seen, [48, 24]), unseen]  # of the run's seed, as users do it

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.parts[0], batch_size=self.batch_size, shuffle=True, drop_last=self.drop_last)

    def val_dataloader(self) -> DataLoader:
        return DataLoader(self.parts[1], batch_size=24)

    def test_dataloader(self) -> DataLoader:
        return DataLoader(self.parts[2], batch_size=24)


class StudyModule(LightningModule):
    """Writes, beside its logs, the weights that it starts with, and all batches."""

    def __init__(self, lr: float = 0.05, seconds_per_batch: float = 0.0) -> None:
        super().__init__()
        self.lr = lr
        self.seconds_per_batch = seconds_per_batch
        self.network = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.5), nn.Linear(16, 2))

    def on_train_start(self) -> None:
        self.write("weights", [parameter.tolist() for parameter in self.parameters()])

    def on_train_epoch_start(self) -> None:
        self.batches: list[Any] = []

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        time.sleep(self.seconds_per_batch)
        self.batches.append(batch[0].tolist())
        loss = nn.functional.cross_entropy(self.network(batch[0]), batch[1])
        self.log("train/loss", loss, on_step=False, on_epoch=True)
        return loss

    def on_train_epoch_end(self) -> None:
        self.write(f"batches-{self.current_epoch}", self.batches)

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.evaluate("val", batch)

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.evaluate("test", batch)

    def evaluate(self, stage: str, batch: tuple[Tensor, Tensor]) -> None:
        logits = self.network(batch[0])
        self.log(f"{stage}/loss", nn.functional.cross_entropy(logits, batch[1]))
        self.log(f"{stage}/accuracy", (logits.argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)]

    def write(self, name: str, content: Any) -> None:
        folder = Path(self.trainer.log_dir or ".")
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{name}.json").write_text(json.dumps(content))


class ScriptedModule(StudyModule):
    """Logs a score that it was given for each epoch, and when tested, how many epochs its weights have had.

    Args:
        scores: ``val/score`` of each epoch.
        killed_in: Epoch in whose midst the process is killed, once.
    """

    def __init__(self, scores: list[float], killed_in: int | None = None) -> None:
        super().__init__()
        self.scores = scores
        self.killed_in = killed_in
        self.register_buffer("epochs", torch.tensor(0.0))

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> Tensor:
        # Not in the first try of a study, of one batch.
        if (self.current_epoch, batch_idx) == (self.killed_in, 3) and not Path("killed").exists():
            Path("killed").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return super().training_step(batch, batch_idx)

    def on_train_epoch_end(self) -> None:
        self.epochs += 1

    def validation_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        self.log("val/score", self.score())
        self.log("seen", self.score())

    def score(self) -> float:
        return self.scores[self.current_epoch]

    def test_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        super().test_step(batch, batch_idx)
        self.log("test/score", self.epochs)
        self.log("seen", self.epochs)


class NoisyGradients(GradientTransform):
    """A method that draws random numbers when it is made and at every step."""

    def __init__(self) -> None:
        torch.randn(7)
        super().__init__(lambda gradient: gradient + 0.1 * torch.randn_like(gradient))


class Crash(Callback):
    """A method that fails once the first epoch is over."""

    def on_train_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        if trainer.num_training_batches > 1:  # not when the study tries it out
            raise RuntimeError("the method broke")


def unannotated(eps: float = 1e-10) -> Callback:
    """Makes a gradient method, and does not say so."""
    return ZNormCallback(eps)


class AddingModule(StudyModule):
    """Brings a gradient method along."""

    def configure_callbacks(self) -> list[Callback]:
        return [ZNormCallback()]


class AttachingModule(StudyModule):
    """Steps one of its optimizers itself, with a gradient method attached while it trains, if it is told to."""

    automatic_optimization = False

    def __init__(self, attached: bool = True) -> None:
        super().__init__()
        self.attached = attached

    def configure_optimizers(self) -> Any:
        first, *_, last = self.network
        return torch.optim.Adam(first.parameters()), torch.optim.SGD(last.parameters(), lr=self.lr)

    def training_step(self, batch: tuple[Tensor, Tensor], batch_idx: int) -> None:
        known, own = self.optimizers()
        self.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        known.step()
        own.optimizer.step()

    def on_train_start(self) -> None:
        super().on_train_start()
        self.handle = attach(self.trainer.optimizers[1]) if self.attached else None

    def on_train_end(self) -> None:
        if self.handle is not None:
            self.handle.remove()
