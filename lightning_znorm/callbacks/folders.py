"""Where files of a run go, and by which name a callback's are known."""

import hashlib
import os
import re
from functools import lru_cache

import lightning.pytorch as pl

# Bytes of a state key. Lightning's profilers name files by it, `validate-[Callback]KEY.on_validation_batch_start.prof`
# for one, and most file systems have 255 bytes for a name.
_LONGEST_KEY = 160


@lru_cache(maxsize=64)  # Lightning asks before each hook
def short_key(key: str) -> str:
    """A callback's state key, short enough for the name of a file.

    A long one ends in its hash instead: other options, such as another pattern in a long list, give another key. It is
    the same in every process and program.

    Args:
        key: As :meth:`lightning.pytorch.Callback._generate_state_key` makes it.

    Returns:
        The key itself where it is short, as nearly all are, so that the states in older checkpoints are found.
    """
    key = re.sub(r" at 0x[0-9a-fA-F]+", "", key)  # where an object is in memory, of which its repr may tell
    encoded = key.encode("utf-8", "backslashreplace")
    if len(encoded) <= _LONGEST_KEY:
        return key
    digest = hashlib.sha256(encoded).hexdigest()[:16]
    return f"{encoded[: _LONGEST_KEY - len(digest) - 1].decode('utf-8', 'ignore')}-{digest}"


def run_folder(trainer: pl.Trainer) -> str:
    """Folder of this run's files, the one that ``ModelCheckpoint`` makes its folder in.

    ``trainer.log_dir`` is it for the loggers of CSV files and TensorBoard alone. For all others (Weights & Biases,
    MLflow) it is the folder of all their runs, each of which would overwrite the files of the one before.

    To be called in every process: they agree on it, and one that asked alone would wait for ever.

    Args:
        trainer: Of the run.

    Returns:
        A path or an address of a file system.
    """
    folder: str = trainer.default_root_dir
    if (logger := trainer.logger) is not None:
        if logger.log_dir is not None:
            folder = logger.log_dir
        else:
            version = f"version_{logger.version}" if isinstance(logger.version, int) else logger.version
            named = (str(part) for part in (logger.name, version) if part is not None)
            folder = os.path.join(logger.save_dir or folder, *named)
    return trainer.strategy.broadcast(folder)
