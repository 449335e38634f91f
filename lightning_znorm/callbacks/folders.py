"""The folder of a run's files, and names of callbacks that fit in a file name."""

import hashlib
import os
import re
from functools import lru_cache

import lightning.pytorch as pl

# Bytes of a state key. Lightning's profilers put it in names of files, such as
# `validate-[Callback]KEY.on_validation_batch_start.prof`, and most file systems allow 255 bytes for a name.
_LONGEST_KEY = 160


@lru_cache(maxsize=64)  # Lightning asks before each hook
def short_key(key: str) -> str:
    """Return a callback's state key, short enough for the name of a file.

    The end of a long key is replaced by a hash of the whole key. So different options, such as another pattern in a
    long list, give different keys. A key is the same in every process and program.

    Args:
        key: What :meth:`lightning.pytorch.Callback._generate_state_key` returns.

    Returns:
        The key itself if it is short, as nearly all are, so that states in older checkpoints are found.
    """
    key = re.sub(r" at 0x[0-9a-fA-F]+", "", key)  # the address of an object, which may be in its repr
    encoded = key.encode("utf-8", "backslashreplace")
    if len(encoded) <= _LONGEST_KEY:
        return key
    digest = hashlib.sha256(encoded).hexdigest()[:16]
    return f"{encoded[: _LONGEST_KEY - len(digest) - 1].decode('utf-8', 'ignore')}-{digest}"


def run_folder(trainer: pl.Trainer) -> str:
    """Return the folder of this run's files, in which ``ModelCheckpoint`` makes its own folder too.

    ``trainer.log_dir`` is that folder only for the CSV and TensorBoard loggers. For other loggers (Weights & Biases,
    MLflow) it is the folder of all their runs, where each run would overwrite the files of the one before.

    Every process must call this, because the result is broadcast: a process that calls it alone waits for ever.

    Args:
        trainer: The trainer of the run.

    Returns:
        A path, or the URL of a remote file system.
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
