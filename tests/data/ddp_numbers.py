"""Two processes train on the numbered images; each writes the numbers it saw. Run by test_in_memory.py."""

import json
import sys
from pathlib import Path

from lightning.pytorch import Trainer
from numbered import NumberedDataModule, Recorder

if __name__ == "__main__":
    data, recorder = NumberedDataModule(batch_size=16), Recorder()
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
    seen = {
        stage: [data.numbers(images) for images, _ in batches] for stage, batches in recorder.seen.items() if batches
    }
    Path(sys.argv[1], f"{trainer.global_rank}.json").write_text(json.dumps(seen))
