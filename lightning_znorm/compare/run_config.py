"""The settings of a run: those that its experiment and method give, and what a study needs besides.

The experiment's own loggers are kept, and write into the run's folder; a CSV logger comes after them. Of its callbacks
two kinds make way: progress bars, which have no terminal, and plain `ModelCheckpoint` and `LastCheckpoint`, for which
the study has its own.
"""

import copy
from pathlib import Path
from typing import Any

from lightning_znorm.compare.settings import as_list, class_name
from lightning_znorm.compare.study import Run

_HERE = __package__
OVERRIDDEN = ("logger", "enable_checkpointing", "enable_progress_bar", "barebones")
"""Settings of the trainer, beside its callbacks, that a run has its own of."""


def run_config(settings: dict[str, Any], run: Run, monitor: tuple[str, str] | None) -> dict[str, Any]:
    """Make the settings of a run.

    Args:
        settings: What ``fit --print_config`` says.
        run: The run.
        monitor: Metric that chooses the best checkpoint, and its mode.
    """
    config = copy.deepcopy(settings)
    config["seed_everything"] = run.seed
    config.pop("ckpt_path", None)
    trainer = config["trainer"]
    others = [logger for logger in as_list(trainer.get("logger")) if class_name(logger) != "CSVLogger"]
    trainer["logger"] = [*(_moved(logger, run.logs) for logger in others), _csv(run.logs)]
    # A run has one last checkpoint, whichever of its trainings wrote it.
    last = {"dirpath": str(run.last.parent), "enable_version_counter": False}
    checkpoints = [{"class_path": "lightning_znorm.LastCheckpoint", "init_args": last}]
    if monitor:
        best = {"dirpath": str(run.best.parent), "monitor": monitor[0], "mode": monitor[1]}
        checkpoints.insert(0, _callback("checkpoints.BestCheckpoint", **best))
    recorder = _callback("recorder.Recorder", folder=str(run.folder), seed=run.seed)
    trainer["callbacks"] = [recorder, *kept_callbacks(settings), *checkpoints]
    trainer |= {"enable_checkpointing": True, "enable_progress_bar": False, "barebones": False}
    return config


def kept_callbacks(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the callbacks of an experiment and method that its runs have too."""
    return [callback for callback in as_list(settings["trainer"].get("callbacks")) if not _makes_way(callback)]


def is_ours(callback: dict[str, Any]) -> bool:
    """Whether a callback is one that the study has added."""
    return str(callback["class_path"]).startswith(f"{_HERE}.")


def validates(settings: dict[str, Any]) -> bool:
    """Whether a run comes to its first validation, as far as the settings tell."""
    trainer = settings["trainer"]
    epochs, every = trainer.get("max_epochs"), trainer.get("check_val_every_n_epoch")
    return trainer.get("limit_val_batches") != 0 and not (every and epochs and 0 < epochs < every)


def probe_config(config: dict[str, Any]) -> dict[str, Any]:
    """Shorten the settings of a run to a batch or two of everything that it does."""
    config = copy.deepcopy(config)
    limits = {f"limit_{part}_batches": 1 for part in ("train", "test")}
    once = {"max_epochs": 1, "min_epochs": None, "max_steps": -1, "min_steps": None, "max_time": None}
    validation = {"val_check_interval": 1.0, "num_sanity_val_steps": 0}
    if validates(config):  # else its settings keep it from validating in this one epoch too
        validation |= {"limit_val_batches": 1, "check_val_every_n_epoch": 1}
    config["trainer"] |= {**limits, **once, **validation, "overfit_batches": 0.0, "log_every_n_steps": 1}
    return config


def _callback(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"{_HERE}.{name}", "init_args": arguments}


def _csv(logs: Path) -> dict[str, Any]:
    # No version: each attempt takes the next, for a second one in the same folder deletes the first one's log.
    arguments = {"save_dir": str(logs), "name": "", "version": None}
    return {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": arguments}


def _moved(logger: dict[str, Any], logs: Path) -> dict[str, Any]:
    arguments = dict(logger.get("init_args") or {})
    if "save_dir" in arguments:
        arguments["save_dir"] = str(logs)
    return {**logger, "init_args": arguments}


def _makes_way(callback: dict[str, Any]) -> bool:
    path, name = callback["class_path"], class_name(callback)
    last = name == "LastCheckpoint" and path.startswith("lightning_znorm.")
    return last or path.endswith(".callbacks.ModelCheckpoint") or name.endswith("ProgressBar")
