"""Two processes train on volumes and write label maps. Called by test_volumes.py."""

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import seed_everything

from lightning_znorm import MaskWriter
from lightning_znorm.data import VolumeDataModule
from lightning_znorm.tasks import SegmentationTask
from tests.trainers import trainer


class Witness(SegmentationTask):
    """Records its training images, and the names of what it predicts for."""

    def __init__(self) -> None:
        super().__init__(torch.nn.Conv3d(1, 1, 1), spatial_dims=3, in_chans=1)
        self.seen: list[bytes] = []
        self.names: list[str] = []

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        self.seen += [image.numpy().tobytes() for image in batch[0]]
        return super().training_step(batch, batch_idx)

    def predict_step(self, batch: Any, batch_idx: int = 0, dataloader_idx: int = 0) -> torch.Tensor:
        self.names += batch[-1]["name"]
        return super().predict_step(batch)


def see_volumes(root: Path, folder: Path, processes: int = 2) -> dict[str, Any]:
    """Return what a process sees in two epochs, and what it predicts for; it writes masks into a folder."""
    seed_everything(5, verbose=False)
    data = VolumeDataModule(
        root,
        batch_size=2,
        patch_size=[8, 8, 8],
        test_fraction=0.3,
        num_workers=0,
        max_memory_gb=0,
        cache_dir=folder / "cache",
    )
    task = Witness()
    run = trainer(
        max_epochs=2,
        devices=processes,
        strategy="ddp" if processes > 1 else "auto",
        callbacks=[MaskWriter(folder / "masks", format="nifti", label_map=True)],
    )
    run.fit(task, datamodule=data)
    run.predict(task, datamodule=data, return_predictions=False)
    return {"seen": task.seen, "names": task.names}
