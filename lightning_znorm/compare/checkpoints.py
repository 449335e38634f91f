"""The checkpoint that a study tests, and checks of checkpoints. `lightning_znorm.LastCheckpoint` writes the other one.

Both stay in one folder for all attempts at a run, because `ModelCheckpoint` forgets the best score when its folder
changes. Settings of runs name `BestCheckpoint` by this module, so it stays here.
"""

import errno
import pickle
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from typing_extensions import override

from lightning_znorm.compare.files import DamagedError

MONITORED = "lightning_znorm.monitored"
"""Key in a checkpoint: name of the metric that chose it, and the value in that epoch."""
STOPPED = "lightning_znorm.stopped"
"""Key in a checkpoint: whether training was told to stop. Lightning does not save that."""


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

    @override
    def on_save_checkpoint(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        # Not the score in the callback's own state: that is infinite where the metric is NaN.
        value = trainer.callback_metrics.get(str(self.monitor))
        checkpoint[MONITORED] = {"name": self.monitor, "value": None if value is None else float(value)}


def monitored_value(checkpoint: dict[str, Any]) -> tuple[str | None, float | None]:
    """Return the metric that chose a checkpoint, and its value; ``None`` for both if no metric chose it."""
    if MONITORED in checkpoint:
        return checkpoint[MONITORED]["name"], checkpoint[MONITORED]["value"]
    for key, state in checkpoint["callbacks"].items():  # written by versions before 0.1.0
        if key.startswith(f"{BestCheckpoint.__name__}{{"):
            return state["monitor"], None if state["current_score"] is None else float(state["current_score"])
    return None, None


def read_checkpoint(path: Path) -> Mapping[str, Any]:
    """Load a checkpoint onto the CPU, and verify the checksums of its bytes, which `torch.load` does not.

    Args:
        path: The checkpoint.

    Returns:
        What it holds. Empty if the checkpoint is a folder of parts, or has objects that need code to load: `fit`
        decides about those.

    Raises:
        DamagedError: If it is not a checkpoint, or has changed since it was written.
    """
    if path.is_dir():
        if not any(path.iterdir()):
            raise DamagedError(path, "it is an empty folder")
        return {}
    is_archive = _is_whole_archive(path)
    try:
        content = torch.load(path, weights_only=True, map_location="cpu", mmap=is_archive)
    except MemoryError:
        raise
    except Exception as error:  # those of pickle and torch have no common base class
        if is_archive and isinstance(error, pickle.UnpicklingError):
            return {}
        reason = "it is not a checkpoint, or not a whole one" if path.stat().st_size else "it is empty"
        raise DamagedError(path, reason) from error
    if not isinstance(content, Mapping) or not isinstance(content.get("state_dict"), Mapping):
        raise DamagedError(path, "it is not a checkpoint of Lightning")
    return content


def _is_whole_archive(path: Path) -> bool:
    """Return whether a file is an archive, as torch writes them, and verify the checksums if it is."""
    try:
        with path.open("rb") as file:
            if not zipfile.is_zipfile(file):
                return False
            with zipfile.ZipFile(file) as archive:
                for entry in archive.infolist():
                    if entry.CRC:  # 0 without checksums: `torch.serialization.set_crc32_options(False)`
                        with archive.open(entry) as record:
                            while record.read(2**20):
                                pass
    except OSError as error:
        if error.errno != errno.EINVAL:  # which a wrong offset in the archive causes
            raise
        raise DamagedError(path, "it is not a whole archive") from error
    except Exception as error:  # those of zip, zlib and struct have no common base class
        raise DamagedError(path, f"it has changed since it was written ({error})") from error
    return True
