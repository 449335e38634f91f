"""Two processes draw, write and score masks. Called by test_mask_overlay.py and test_score_writer.py."""

from pathlib import Path

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.utils.data import DataLoader, Dataset

from lightning_znorm import MaskOverlay, MaskWriter, ScoreWriter
from lightning_znorm.tasks import SegmentationTask


class Squares(Dataset):
    """Five images of a bright square, their masks and names: the last two are of one name."""

    def __init__(self, named: bool) -> None:
        self.named = named

    def __len__(self) -> int:
        return 5

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor | str]:
        mask = torch.zeros(1, 32, 32)
        mask[:, index : index + 8, 6:14] = 1
        name = f"/scans/{index}/image.tif" if index > 2 else f"patient {index}/image.tif"
        return mask - 0.5, name if self.named else mask


def draw_and_write(folder: Path) -> None:
    """Train, test and predict as one of two processes."""
    torch.manual_seed(0)
    trainer = Trainer(
        max_epochs=2,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        logger=CSVLogger(folder, name=None, version="logs"),
        callbacks=[MaskOverlay(), MaskWriter(folder / "written")],
        log_every_n_steps=1,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    task = SegmentationTask(nn.Conv2d(1, 1, 1))
    squares = DataLoader(Squares(named=False), batch_size=2)
    trainer.fit(task, squares, squares)
    trainer.test(task, squares, verbose=False)
    trainer.predict(task, DataLoader(Squares(named=True), batch_size=2), return_predictions=False)


def score(folder: Path) -> None:
    """Test five cases as one of two processes."""
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        logger=CSVLogger(folder, name=None, version="logs"),
        callbacks=[ScoreWriter()],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    squares = DataLoader(Squares(named=False), batch_size=2)
    trainer.test(SegmentationTask(nn.Conv2d(1, 1, 1)), squares, verbose=False)
