"""Two processes train on an image folder. Called by test_image_folder.py."""

from pathlib import Path

import torch

from lightning_znorm.data import ImageFolderDataModule
from tests.data.jpegs import numbers
from tests.data.numbered import Recorder
from tests.trainers import trainer


def see_folder(root: Path, step: int) -> dict[str, list[list[int]]]:
    """Return the numbers of each batch of images that one of two processes sees, by stage."""
    data, recorder = ImageFolderDataModule(root, batch_size=8, num_workers=1, image_size=32, resize_size=36), Recorder()
    recorder.layer = torch.nn.Linear(3, 4)
    run = trainer(max_epochs=2, devices=2, strategy="ddp", num_sanity_val_steps=0)
    run.fit(recorder, datamodule=data)
    run.test(recorder, datamodule=data, verbose=False)
    return {stage: [numbers(data, images, step) for images, _ in batches] for stage, batches in recorder.seen.items()}
