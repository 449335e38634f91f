"""The settings of the runs: what the study adds, how methods differ, and what each does with gradients.

Settings are what ``fit --print_config`` prints, read as YAML.
"""

import copy
import hashlib
import json
import os
import pkgutil
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, get_type_hints

from lightning_znorm.compare.study import Run, Study, StudyError

STUDY_OPTIONS = ("logger", "enable_checkpointing", "enable_progress_bar", "barebones")
"""Settings of the trainer, besides its callbacks, that the study sets itself."""
TRANSFORMS = ("GradientCentralizationCallback", "GradientTransform", "SINGCallback", "ZNormCallback")
"""The gradient methods among the names of `lightning_znorm`, known without an import of Lightning, which is slow."""
_PACKAGE = __package__


def as_list(value: Any) -> list[dict[str, Any]]:
    """Return the objects in a setting that may hold one object, a list, ``None`` or a switch."""
    values = value if isinstance(value, list) else [value]
    return [entry for entry in values if isinstance(entry, dict)]


def class_name(entry: dict[str, Any]) -> str:
    """Return the name of an object's class, without its module."""
    return str(entry["class_path"]).rpartition(".")[2]


def as_call(entry: dict[str, Any]) -> str:
    """Write an object of the settings as a call.

    Example:
        >>> as_call({"class_path": "lightning_znorm.SINGCallback", "init_args": {"eps": 0.1, "include": "*"}})
        "SINGCallback(eps=0.1, include='*')"
    """
    arguments = (entry.get("init_args") or {}).items()
    return f"{class_name(entry)}({', '.join(f'{key}={value!r}' for key, value in arguments)})"


def settings_hash(settings: dict[str, Any]) -> str:
    """Return a short hash of settings."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]


def changed_settings(before: Any, after: Any) -> list[tuple[str, str, str]]:
    """Return the paths at which two settings differ, with both values; a missing value is ``-``.

    Example:
        >>> changed_settings({"lr": 0.1, "betas": [0.9]}, {"lr": 0.2, "betas": [0.9], "eps": 1})
        [('eps', '-', '1'), ('lr', '0.1', '0.2')]
    """
    a, b = values_by_path(before), values_by_path(after)
    return [(key, _text_of(a, key), _text_of(b, key)) for key in sorted({*a, *b}) if a.get(key, a) != b.get(key, b)]


def values_by_path(settings: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested settings to one value for each path.

    Example:
        >>> values_by_path({"trainer": {"max_epochs": 2, "callbacks": [{"class_path": "ZNormCallback"}]}})
        {'trainer.max_epochs': 2, 'trainer.callbacks[0].class_path': 'ZNormCallback'}
    """
    if isinstance(settings, dict) and settings:
        items = [(f"{prefix}.{key}" if prefix else str(key), value) for key, value in settings.items()]
    elif isinstance(settings, list) and any(isinstance(value, dict) for value in settings):
        items = [(f"{prefix}[{i}]", value) for i, value in enumerate(settings)]
    else:
        return {prefix: settings}
    return {path: value for key, inner in items for path, value in values_by_path(inner, key).items()}


def same_settings(settings: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Return the groups of two or more methods whose settings are the same."""
    groups: list[list[str]] = []
    for method, resolved in settings.items():
        for group in groups:
            if settings[group[0]] == resolved:
                group.append(method)
                break
        else:
            groups.append([method])
    return [group for group in groups if len(group) > 1]


def monitored_metric(settings: dict[str, Any]) -> tuple[str, str] | None:
    """Return the metric that the experiment's own `ModelCheckpoint` monitors, and its mode."""
    for callback in as_list(settings["trainer"].get("callbacks")):
        arguments = callback.get("init_args") or {}
        if arguments.get("monitor") and callback["class_path"].endswith("Checkpoint"):
            return str(arguments["monitor"]), str(arguments.get("mode", "min"))
    return None


def run_config(settings: dict[str, Any], run: Run, monitor: tuple[str, str] | None) -> dict[str, Any]:
    """Return the settings of a run: those of its method, and what the study adds.

    The experiment's own loggers stay, and write into the run's folder; a CSV logger comes after them. Two kinds of its
    callbacks are replaced: progress bars, which have no terminal here, and plain `ModelCheckpoint` and
    `LastCheckpoint`, because the study has its own.

    Args:
        settings: Resolved settings of the method.
        run: The run.
        monitor: Metric that chooses the best checkpoint, and its mode.
    """
    config = copy.deepcopy(settings)
    config["seed_everything"] = run.seed
    config.pop("ckpt_path", None)
    trainer = config["trainer"]
    others = [logger for logger in as_list(trainer.get("logger")) if class_name(logger) != "CSVLogger"]
    trainer["logger"] = [*(_moved_logger(logger, run.logs) for logger in others), _csv_logger(run.logs)]
    # All attempts at a run share one last checkpoint.
    last = {"dirpath": str(run.last.parent), "enable_version_counter": False}
    checkpoints = [{"class_path": "lightning_znorm.LastCheckpoint", "init_args": last}]
    if monitor:
        best = {"dirpath": str(run.best.parent), "monitor": monitor[0], "mode": monitor[1]}
        checkpoints.insert(0, _study_callback("checkpoints.BestCheckpoint", **best))
    recorder = _study_callback("recorder.Recorder", folder=str(run.folder), seed=run.seed)
    trainer["callbacks"] = [recorder, *kept_callbacks(settings), *checkpoints]
    trainer |= {"enable_checkpointing": True, "enable_progress_bar": False, "barebones": False}
    return config


def trial_config(config: dict[str, Any]) -> dict[str, Any]:
    """Shorten the settings of a run to one batch of everything that it does.

    Args:
        config: Settings of the run, as `run_config` returns them.
    """
    config = copy.deepcopy(config)
    limits = {f"limit_{part}_batches": 1 for part in ("train", "test")}
    once = {"max_epochs": 1, "min_epochs": None, "max_steps": -1, "min_steps": None, "max_time": None}
    validation = {"val_check_interval": 1.0, "num_sanity_val_steps": 0}
    if reaches_validation(config):  # otherwise its own settings keep this single epoch from validating, too
        validation |= {"limit_val_batches": 1, "check_val_every_n_epoch": 1}
    config["trainer"] |= {**limits, **once, **validation, "overfit_batches": 0.0, "log_every_n_steps": 1}
    return config


def comparable_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return settings without everything that the study sets itself: two runs with the same ones train alike."""
    callbacks = [entry for entry in kept_callbacks(settings) if not _is_study_callback(entry)]
    trainer = {key: value for key, value in settings["trainer"].items() if key not in STUDY_OPTIONS}
    others = {key: value for key, value in settings.items() if key not in ("seed_everything", "ckpt_path")}
    return {**others, "trainer": {**trainer, "callbacks": callbacks}}


def kept_callbacks(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the callbacks of an experiment and method that the runs keep."""
    return [callback for callback in as_list(settings["trainer"].get("callbacks")) if not _is_replaced(callback)]


def reaches_validation(settings: dict[str, Any]) -> bool:
    """Return whether a run comes to its first validation, as far as the settings tell."""
    trainer = settings["trainer"]
    epochs, every = trainer.get("max_epochs"), trainer.get("check_val_every_n_epoch")
    return trainer.get("limit_val_batches") != 0 and not (every and epochs and 0 < epochs < every)


def gradient_callbacks(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the callbacks that transform gradients: every `GradientTransform`, including a user's own."""
    return [entry for entry in as_list(settings["trainer"].get("callbacks")) if _transforms_gradients(entry)]


def scales_gradients(settings: dict[str, Any]) -> bool:
    """Return whether a callback gives gradients of any size the same one, as ZNorm and SING do."""
    from lightning_znorm.callbacks import SINGCallback, ZNormCallback

    classes = (_class_of(entry) for entry in gradient_callbacks(settings))
    return any(found is not None and issubclass(found, ZNormCallback | SINGCallback) for found in classes)


def check_experiment(study: Study, settings: dict[str, dict[str, Any]]) -> None:
    """Refuse an experiment that has a gradient method itself, because every method would train with it.

    Args:
        study: The study.
        settings: Resolved settings of each method.

    Raises:
        StudyError: If a run has a gradient method that its method file does not name.
    """
    for method, resolved in settings.items():
        transforms = Counter(class_name(entry) for entry in gradient_callbacks(resolved))
        for name in transforms - _callback_names(study.files[method]) if transforms else ():
            holders = (config for config in study.configs if name in _callback_names(config))
            raise StudyError(
                f"{next(holders, 'An option of `fit`')} adds {name} to every method, so that {method} is not what "
                f"{study.files[method]} says: move {name} into a method file of its own (`trainer: callbacks+:`), and "
                "name that file among --methods."
            )


def check_trial(study: Study, method: str, settings: dict[str, Any], found: dict[str, list[str]]) -> None:
    """Refuse a method that trained, in its trial, with a gradient method that its settings do not name.

    Args:
        study: The study.
        method: Name of the method.
        settings: Its resolved settings.
        found: Classes of the gradient methods that were active, as the run recorded them.

    Raises:
        StudyError: If more gradient methods were active than the settings name.
    """
    file, entries = study.files[method], gradient_callbacks(settings)
    if found["added"] and not _sets_model(file):
        raise StudyError(
            f"{found['added'][0]} trains under {file}, which does not name it: the model's configure_callbacks, or "
            "other code, adds it to the Trainer. Take it out there, and name it in a method file of its own "
            "(`trainer: callbacks+:`), or let a setting of the model decide, which a method file sets."
        )
    if len(found["given"]) > len(entries):
        name = next(iter(Counter(found["given"]) - Counter(map(class_name, entries))))
        raise StudyError(
            f"{name} trains under {file}, and no callback in the settings says that it is one: a function, or an "
            f"installed plugin of Lightning, seems to create it. Name the class, or annotate the function: `-> {name}`."
        )
    if found["attached"] and not _sets_model(file):
        raise StudyError(
            f"A gradient method that is attached to {found['attached'][0]} trains under {file}, which sets nothing of "
            "the model: the code of the model or of the optimizer calls lightning_znorm.functional.attach. Let a "
            "setting of the model decide that, which a method file sets."
        )


def _text_of(values: dict[str, Any], key: str) -> str:
    return str(values[key]) if key in values else "-"


def _study_callback(name: str, **arguments: Any) -> dict[str, Any]:
    return {"class_path": f"{_PACKAGE}.{name}", "init_args": arguments}


def _is_study_callback(callback: dict[str, Any]) -> bool:
    return str(callback["class_path"]).startswith(f"{_PACKAGE}.")


def _is_replaced(callback: dict[str, Any]) -> bool:
    path, name = callback["class_path"], class_name(callback)
    last = name == "LastCheckpoint" and path.startswith("lightning_znorm.")
    return last or path.endswith(".callbacks.ModelCheckpoint") or name.endswith("ProgressBar")


def _csv_logger(logs: Path) -> dict[str, Any]:
    # Without a version, each attempt takes the next one. In the same folder, it would delete the first attempt's log.
    arguments = {"save_dir": str(logs), "name": "", "version": None}
    return {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": arguments}


def _moved_logger(logger: dict[str, Any], logs: Path) -> dict[str, Any]:
    arguments = dict(logger.get("init_args") or {})
    if "save_dir" in arguments:
        arguments["save_dir"] = str(logs)
    return {**logger, "init_args": arguments}


def _transforms_gradients(entry: dict[str, Any]) -> bool:
    package, _, name = str(entry["class_path"]).rpartition(".")
    if package == "lightning_znorm":
        return name in TRANSFORMS
    if package in ("lightning.pytorch.callbacks", "pytorch_lightning.callbacks"):
        return False
    from lightning_znorm.callbacks import GradientTransform

    found = _class_of(entry)
    return found is not None and issubclass(found, GradientTransform)


def _class_of(entry: dict[str, Any]) -> type | None:
    """Return the class of an object of the settings, also if a function makes it; ``None`` if that is not known."""
    with _working_directory_importable():
        found = pkgutil.resolve_name(entry["class_path"])
    if not isinstance(found, type):  # a function that creates a callback
        try:
            found = get_type_hints(found).get("return")
        except NameError:  # a type that is imported for type checkers only: nothing is known about it
            return None
    return found if isinstance(found, type) else None


@contextmanager
def _working_directory_importable() -> Iterator[None]:
    """Import from the working directory, too, as the processes of the runs do."""
    folder = os.getcwd()
    if folder in sys.path:
        yield
        return
    sys.path.append(folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def note_on_order(files: Sequence[str]) -> list[str]:
    """Return a sentence for the user if config files are applied in another order than they were named."""
    from lightning_znorm.cli.config_files import describe_moves, read_config

    moves = describe_moves([read_config(file) for file in files])
    return [moves] if moves else []


def _sets_model(file: str) -> bool:
    """Return whether a file sets anything of the model, such as its optimizer."""
    from lightning_znorm.cli.config_files import read_config  # imported here, because `cli` imports `compare`

    return any(key.partition(".")[0] == "model" for key in read_config(file).settings)


def _callback_names(file: str) -> Counter[str]:
    """Count the class names of the callbacks that a file adds."""
    from lightning_znorm.cli.config_files import read_config

    return Counter(name.rpartition(".")[2] for name in read_config(file).callbacks)
