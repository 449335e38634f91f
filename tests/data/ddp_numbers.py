"""Two processes train on the numbered images. Called by test_base.py."""

from tests.data.numbered import NumberedDataModule, Recorder
from tests.trainers import trainer


def see() -> dict[str, list[list[int]]]:
    """Return the numbers of each batch that one of two processes sees, by stage."""
    data, recorder = NumberedDataModule(batch_size=16), Recorder()
    trainer(max_epochs=2, devices=2, strategy="ddp", num_sanity_val_steps=0).fit(recorder, datamodule=data)
    return {stage: [data.numbers(images) for images, _ in batches] for stage, batches in recorder.seen.items()}
