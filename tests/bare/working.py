"""Use a feature from its beginning to its end: ``python working.py FEATURE FOLDER``."""

import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from torch.utils.data import DataLoader, TensorDataset

import lightning_znorm
from lightning_znorm import data, metrics


class Masks(LightningModule):
    """One convolution, which is trained on noise, and drawn."""

    def __init__(self) -> None:
        super().__init__()
        self.net = torch.nn.Conv2d(1, 1, 3, padding=1)

    def training_step(self, batch: Any, batch_idx: int) -> torch.Tensor:
        return torch.nn.functional.binary_cross_entropy_with_logits(self.net(batch[0]), batch[1].float())

    def validation_step(self, batch: Any, batch_idx: int) -> dict[str, torch.Tensor]:
        return {"preds": self.net(batch[0]) > 0, "target": batch[1] > 0}

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def train(folder: Path, callback: Any) -> list[str]:
    noise = torch.rand(4, 1, 8, 8)
    loader = DataLoader(TensorDataset(noise, noise > 0.5), batch_size=2)
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        callbacks=[callback],
        logger=CSVLogger(folder),
        log_every_n_steps=1,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
    )
    trainer.fit(Masks(), loader, loader)
    return sorted(path.name for path in folder.rglob("*.png"))


def digits(folder: Path) -> None:
    module = data.DigitsDataModule()
    module.setup("fit")
    assert next(iter(module.train_dataloader()))[0].shape == (64, 1, 8, 8)


def distance(folder: Path) -> None:
    masks = torch.zeros(2, 1, 1, 4, 4, dtype=torch.bool)
    masks[0, ..., 0, 0] = masks[1, ..., 0, 3] = True
    assert metrics.HausdorffDistance()(*masks) == 3


def mask_folder(folder: Path) -> None:
    from PIL import Image

    for number in range(6):
        for kind, mode in (("images", "RGB"), ("masks", "L")):
            (folder / kind).mkdir(exist_ok=True)
            Image.new(mode, (8, 8), "white" if kind == "masks" else "grey").save(folder / kind / f"{number}.png")
    module = data.MaskFolderDataModule(folder, batch_size=2, val_fraction=0.3, test_fraction=0.3)
    module.prepare_data()
    module.setup("fit")
    assert next(iter(module.train_dataloader()))[0].shape == (2, 3, 8, 8)


def volumes(folder: Path) -> None:
    import nibabel
    import numpy as np

    for number in range(4):
        for kind in ("imagesTr", "labelsTr"):
            (folder / kind).mkdir(exist_ok=True)
            voxels = np.random.default_rng(number).integers(0, 2, (8, 8, 8)).astype(np.uint8)
            nibabel.save(nibabel.Nifti1Image(voxels, np.eye(4)), folder / kind / f"case{number}.nii.gz")
    module = data.VolumeDataModule(folder, patch_size=(4, 4, 4), num_workers=0, val_fraction=0.25, test_fraction=0.25)
    module.prepare_data()
    module.setup("fit")
    assert next(iter(module.train_dataloader()))[0].shape[2:] == (4, 4, 4)


def overlay(folder: Path) -> None:
    assert train(folder, lightning_znorm.MaskOverlay()) == ["val-epoch=0.png"]


def monitor(folder: Path) -> None:
    assert len(train(folder, lightning_znorm.GradientMonitor())) >= 3


FEATURES = {
    "DigitsDataModule": digits,
    "HausdorffDistance": distance,
    "MaskFolderDataModule": mask_folder,
    "MaskOverlay": overlay,
    "VolumeDataModule": volumes,
    "GradientMonitor": monitor,
}

if __name__ == "__main__":
    FEATURES[sys.argv[1]](Path(sys.argv[2]))
    sys.stdout.write(f"{sys.argv[1]} works\n")
