"""Two processes train on an image folder; each writes the numbers of the images it saw. Run by test_image_folder.py."""

import json
import sys
from pathlib import Path

import torch
from numbered import Recorder

from lightning_znorm.data import ImageFolderDataModule
from tests.data.jpegs import numbers
from tests.trainers import trainer

if __name__ == "__main__":
    root, output, step = sys.argv[1:]
    data, recorder = ImageFolderDataModule(root, batch_size=8, num_workers=1, image_size=32, resize_size=36), Recorder()
    recorder.layer = torch.nn.Linear(3, 4)
    run = trainer(max_epochs=2, devices=2, strategy="ddp", num_sanity_val_steps=0)
    run.fit(recorder, datamodule=data)
    run.test(recorder, datamodule=data, verbose=False)
    seen = {
        stage: [numbers(data, images, int(step)) for images, _ in batches] for stage, batches in recorder.seen.items()
    }
    Path(output, f"{run.global_rank}.json").write_text(json.dumps(seen))
