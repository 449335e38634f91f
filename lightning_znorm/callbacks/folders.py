"""Where files of a run go."""

import os

import lightning.pytorch as pl


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
