"""Where the last checkpoint of a run is, when its successor is not there yet to ask."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def last_checkpoint(trainer: Mapping[str, Any]) -> Path | None:
    """Find the newest ``last.ckpt`` of the runs that were started with a trainer's settings.

    Each run logs into a folder of its own, ``version_0``, ``version_1``, ..., and keeps its checkpoints there, unless
    the logger was given a ``version``, or `LastCheckpoint` or `ModelCheckpoint` a ``dirpath``. Lightning looks for the
    last checkpoint in the folder of the run that is about to begin, where there is none.

    Args:
        trainer: Settings of the trainer.

    Returns:
        The path; None if there is no such file.
    """
    found = [path for folder in _folders(trainer) for path in folder.glob("last*.ckpt")]
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


def _folders(trainer: Mapping[str, Any]) -> list[Path]:
    entries = _entries(trainer.get("callbacks"))
    dirpaths = [_dirpath(entry) for entry in entries if "ModelCheckpoint" in str(entry)]
    # LastCheckpoint keeps to the folder of the first ModelCheckpoint.
    dirpaths += [_dirpath(entry) or next(iter(dirpaths), None) for entry in entries if "LastCheckpoint" in str(entry)]
    named = [Path(folder) for folder in dirpaths if folder]
    # One that names no folder keeps its checkpoints beside the logs, whatever another names.
    return named if named and all(dirpaths) else [*named, *_beside_logs(trainer)]


def _dirpath(entry: Mapping[str, Any]) -> str | None:
    return (entry.get("init_args") or {}).get("dirpath")


def _beside_logs(trainer: Mapping[str, Any]) -> list[Path]:
    root = Path(trainer.get("default_root_dir") or ".")
    if trainer.get("logger") is False:
        return [root / "checkpoints"]
    entry = next(iter(_entries(trainer.get("logger"))), {})
    logger = entry.get("init_args") or {}
    name, version = logger.get("name", "lightning_logs"), logger.get("version")
    if "WandbLogger" in str(entry.get("class_path")):  # in which a name is a title
        name = logger.get("project") or os.environ.get("WANDB_PROJECT", "lightning_logs")
        version = version or logger.get("id")
    folder = "*" if version is None else f"version_{version}" if isinstance(version, int) else str(version)
    return sorted((Path(logger.get("save_dir") or root) / str(name or "")).glob(f"{folder}/checkpoints"))


def _entries(value: Any) -> list[Mapping[str, Any]]:
    values = value if isinstance(value, list) else [value]
    return [entry for entry in values if isinstance(entry, Mapping)]
