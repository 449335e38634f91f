"""The two checkpoints of a run: the best, to test, and the last, to go on from.

Both stay in one folder for all attempts at a run, because `ModelCheckpoint` forgets what the best score was when its
folder changes.
"""

import shutil
from pathlib import Path

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from typing_extensions import override


class BestCheckpoint(ModelCheckpoint):
    """Keep the checkpoint of the epoch with the best validation metric.

    Args:
        dirpath: Folder.
        monitor: The metric.
        mode: Whether ``"min"`` or ``"max"`` of it is best.
    """

    def __init__(self, dirpath: str, monitor: str, mode: str) -> None:
        super().__init__(
            dirpath,
            filename="best",
            monitor=monitor,
            mode=mode,
            save_on_train_epoch_end=True,
            enable_version_counter=False,
        )


class LastCheckpoint(Checkpoint):
    """Keep the checkpoint of the last epoch that was finished.

    Unlike that of `ModelCheckpoint`, it is one of every epoch, whether or not a metric has improved; and it takes its
    place once the epoch's metrics are in the logs, so that none is missing after a resumption, and as a whole, whenever
    the process dies. (Lightning logs after the hook in which it saves, and resumes rightly only what is saved there.)

    Args:
        dirpath: Folder.
    """

    def __init__(self, dirpath: str) -> None:
        self.folder = Path(dirpath)
        self._saved = False

    @override
    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        trainer.save_checkpoint(self.folder / "new.ckpt")
        self._saved = True

    @override
    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._put_in_place(trainer)

    @override
    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._put_in_place(trainer)

    def _put_in_place(self, trainer: pl.Trainer) -> None:
        if self._saved and trainer.is_global_zero:
            new, last, old = (self.folder / f"{name}.ckpt" for name in ("new", "last", "old"))
            if last.is_dir():  # of a strategy that shards checkpoints; such a folder cannot take another one's place
                shutil.rmtree(old, ignore_errors=True)  # of a process that died before it was gone
                last.rename(old)
            new.replace(last)
            shutil.rmtree(old, ignore_errors=True)
        self._saved = False
