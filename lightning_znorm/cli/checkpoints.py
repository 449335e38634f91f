"""Checkpoints that a command loads: where the last one is, whether it is safe, and whether it fits the settings."""

import importlib
import importlib.util
import inspect
import os
import pydoc
import re
import sys
from collections.abc import Collection, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from lightning_znorm.cli.config_files import dotted
from lightning_znorm.cli.pickles import check_folder, load_plain
from lightning_znorm.errors import ZNormValueError

# Lightning reads these keys without asking whether they are there.
_NEEDED: dict[str, type] = {"state_dict": Mapping, "pytorch-lightning_version": str}
# Files and folders in the checkpoint folders of FSDP, FSDP2 and DeepSpeed.
_PARTS = (".metadata", "meta.pt", "latest", "checkpoint")
# Packages whose classes run no code of others, whatever their arguments are.
_HARMLESS = (
    "lightning_znorm.models.",
    "lightning_znorm.tasks.",
    "monai.losses.",
    "monai.networks.",
    "torch.nn.",
    "torch.optim.",
)
# Of these, the public metrics alone.
_METRICS = "lightning_znorm.metrics."
# Settings of a SegmentationTask that say how it is evaluated, and leave the trained network as it is.
_EVALUATION = ("metrics", "inferer", "threshold", "class_names", "size_divisor")
# Settings of the model that change nothing in an evaluation.
_TRAINING = ("init_args.optimizer", "init_args.lr_scheduler")
# Settings of the data that say where the data are and how they are read, not what they are.
_ACCESS = {"cache_dir", "download", "max_memory_gb", "num_workers", "predict_root", "root"}
# Settings of the data that are saved as they were found in the data, or drawn, if the command leaves them at None.
_FOUND = {"mean", "num_classes", "patients", "std"}


def last_checkpoint(trainer: Mapping[str, Any]) -> Path | None:
    """Find the newest ``last.ckpt`` of the runs that were started with a trainer's settings.

    Each run logs into a folder of its own, ``version_0``, ``version_1``, ..., and keeps its checkpoints there, unless
    the logger was given a ``version``, or `LastCheckpoint` or `ModelCheckpoint` a ``dirpath``. Lightning looks for the
    last checkpoint in the folder of the run that is about to begin, which holds none yet.

    Args:
        trainer: Settings of the trainer.

    Returns:
        The path; None if there is no such file.
    """
    found = [path for folder in _folders(trainer) for path in folder.glob("last*.ckpt")]
    return max(found, key=lambda path: path.stat().st_mtime_ns, default=None)


def check_checkpoint(path: str) -> None:
    """Reject what is not a Lightning checkpoint, or would run code when it is loaded.

    If there is no such file, Lightning says so. Lightning also warns of a checkpoint from a newer Lightning.

    Args:
        path: A file or a folder. Words such as ``"last"`` and addresses are left to Lightning.

    Raises:
        ValueError: If the checkpoint cannot be read, holds something else, or names code.
    """
    if Path(path).is_dir():
        if not any(Path(path, name).exists() for name in _PARTS):
            raise ZNormValueError(f"{path} is a folder without a checkpoint in parts: name a file in it.")
        check_folder(Path(path))
    elif Path(path).exists() and not Path(path).is_file():
        raise ZNormValueError(
            f"{path} is a pipe or a device, and a checkpoint is read several times: save it in a file."
        )
    if not Path(path).is_file():
        return
    content = load_plain(path, path)
    if not isinstance(content, Mapping):
        raise ZNormValueError(f"{path} is not a checkpoint: it holds a {type(content).__name__}.")
    for key, kind in _NEEDED.items():
        if not isinstance(content.get(key), kind):
            raise ZNormValueError(f"{path} is not a Lightning checkpoint: it holds no {key}, as Trainer saves it.")
    if not re.match(r"\d+\.\d+", version := content["pytorch-lightning_version"]):
        raise ZNormValueError(f"{path} is not a Lightning checkpoint: its version is {version!r}.")
    if not isinstance(content.get("hyper_parameters", {}), Mapping):
        raise ZNormValueError(f"{path} is not a Lightning checkpoint: its hyper_parameters are not names and values.")


def evaluation_settings(given: Mapping[str, Any], keys: Iterable[str]) -> dict[str, bool]:
    """Return the settings that say how a model is evaluated, and whether the command gives each of them.

    These are ``metrics``, ``inferer``, ``threshold``, ``class_names`` and ``size_divisor`` of a `SegmentationTask`.
    Those that the command gives are taken from it, all others from the checkpoint. The command gives a setting if a
    file or a flag names it, or if it differs from the default of the class. A file with ``threshold: 0.5`` or
    ``metrics: null`` so brings the default back.

    Args:
        given: Settings of the model in files and flags, with its defaults.
        keys: Dotted keys that files and flags set, such as ``model.init_args.threshold``.

    Example:
        >>> given = {"class_path": "lightning_znorm.tasks.SegmentationTask", "init_args": {"threshold": 0.5}}
        >>> evaluation_settings(given, [])
        {'threshold': False}
        >>> evaluation_settings(given, ["model.init_args.threshold"])
        {'threshold': True}
    """
    from lightning_znorm.tasks import SegmentationTask

    task = pydoc.locate(str(given.get("class_path")))
    if not (isinstance(task, type) and issubclass(task, SegmentationTask)):
        return {}
    pattern = rf"model\.(?:init_args\.)?({'|'.join(_EVALUATION)})(?:[.+]|$)"
    named = {found[1] for key in keys if (found := re.match(pattern, key))}
    init_args = given.get("init_args") or {}
    return {name: name in named or init_args[name] != _default(task, name) for name in _EVALUATION if name in init_args}


def saved_model(path: str, left_out: Collection[str] = ()) -> dict[str, Any]:
    """Return the settings of a checkpoint's model, as a parser takes them; empty if it holds none.

    Args:
        path: The checkpoint.
        left_out: Arguments of the model that are not taken.
    """
    if not Path(path).is_file():
        return {}
    saved = load_plain(path, path).get("hyper_parameters", {})
    settings = {key: value for key, value in saved.items() if key != "_instantiator" and key not in left_out}
    if "_class_path" not in settings:
        return settings
    return {"class_path": settings.pop("_class_path"), "dict_kwargs": settings}


def saved_class(path: str) -> str | None:
    """Return the class path of a checkpoint's model; None if it says none.

    Args:
        path: The checkpoint.
    """
    return load_plain(path, path).get("hyper_parameters", {}).get("_class_path") if Path(path).is_file() else None


def check_names(path: str, given: Mapping[str, Any], left_out: Collection[str] = ()) -> None:
    """Refuse a checkpoint whose model settings name code that the user did not ask for, before it is imported.

    Lightning's command line applies the settings of a checkpoint over those of files and flags.

    Args:
        path: The checkpoint.
        given: Settings of the model in files and flags.
        left_out: Arguments of the model that are not taken from the checkpoint, and so not imported either.

    Raises:
        ValueError: If the checkpoint names a class, a function or a file that files and flags do not name. Classes of
            networks, losses, optimizers and tasks, and this package's metrics are allowed, because they run no code of
            others.
    """
    settings = saved_model(path, left_out)
    named = {text for _, text in _texts(given)}
    for key, text in _texts(settings):
        if text not in named and (os.path.isfile(text) or _may_be_code(text)):
            is_class = "class_path" in settings and key == "class_path"
            setting = "class_path" if is_class else f"init_args.{key.removeprefix('dict_kwargs.')}"
            raise ZNormValueError(
                f"{path} names {text} for model.{setting}, which the config files and flags do not name, and which may "
                "run any code: name it there if you trust whoever made the checkpoint."
            )


def check_resumed(checkpoint: str, saved: dict[str, Any], given: dict[str, Any]) -> None:
    """Refuse to resume a training under other settings than its own, which the checkpoint brings back.

    Args:
        checkpoint: The checkpoint to resume from.
        saved: Settings of the checkpoint's model.
        given: Settings of the model in files and flags.

    Raises:
        ValueError: If the two differ.
    """
    settings, asked = dotted(saved), dotted(given)
    for key in sorted(settings | asked):
        if settings.get(key) != asked.get(key):
            raise ZNormValueError(
                f"{checkpoint} was trained with model.{key} {settings.get(key)}, and a training that is resumed keeps "
                f"its model and optimizer, so {asked.get(key)} would be lost: name the files and flags of that run."
            )


def overridden_settings(checkpoint: str, saved: dict[str, Any], given: dict[str, Any]) -> Iterator[str]:
    """Say which settings of an evaluated model the checkpoint overrides, and which metrics it drops or adds.

    Args:
        checkpoint: The checkpoint whose weights are evaluated.
        saved: Settings of the checkpoint's model.
        given: Settings of the model in files and flags.
    """
    settings, asked = dotted(saved), dotted(given)
    for key in sorted(settings.keys() & asked.keys()):
        if settings[key] != asked[key] and not key.startswith(_TRAINING):
            yield f"model.{key} is {settings[key]}, as {checkpoint} was trained, and not {asked[key]}."
    before, after = ((model.get("init_args") or {}).get("metrics") for model in (given, saved))
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for name in sorted(before.keys() ^ after.keys()):
            verb = "dropped" if name in before else "added"
            yield f"model.init_args.metrics.{name} is {verb}, as {checkpoint} was trained."


def changed_data(checkpoint: str, given: dict[str, Any]) -> Iterator[str]:
    """Say which settings of the data differ from those that a checkpoint was trained with.

    A key ``0`` is the same as ``"0"``, because files are read with texts as keys. What a data module finds by itself if
    it is None, such as ``mean``, and saves as it was found, is no change either.

    Args:
        checkpoint: The checkpoint to resume from.
        given: Settings of the data in files and flags.
    """
    if not Path(checkpoint).is_file():
        return
    saved = load_plain(checkpoint, checkpoint).get("datamodule_hyper_parameters", {})
    for key, value in given.get("init_args", {}).items():
        if key not in saved or key in _ACCESS or (value is None and key in _FOUND):
            continue
        if _comparable(saved[key]) != _comparable(value):
            yield (
                f"data.init_args.{key} was {saved[key]} when {checkpoint} was trained, and is {value} from here on: "
                "this is not the training that it would have been."
            )


def _default(task: type, name: str) -> Any:
    """Return the default of a constructor's argument. A constructor may pass others on to the class below."""
    parameters = (inspect.signature(base).parameters.get(name) for base in task.__mro__ if "__init__" in vars(base))
    return next((parameter.default for parameter in parameters if parameter), None)


def _comparable(value: Any) -> Any:
    """Return a setting with texts as keys and lists in place of tuples."""
    if isinstance(value, Mapping):
        return {str(key): _comparable(inner) for key, inner in value.items()}
    return [_comparable(inner) for inner in value] if isinstance(value, list | tuple) else value


def _folders(trainer: Mapping[str, Any]) -> list[Path]:
    entries = _entries(trainer.get("callbacks"))
    dirpaths = [_dirpath(entry) for entry in entries if "ModelCheckpoint" in str(entry)]
    # LastCheckpoint keeps to the folder of the first ModelCheckpoint.
    dirpaths += [_dirpath(entry) or next(iter(dirpaths), None) for entry in entries if "LastCheckpoint" in str(entry)]
    named = [Path(folder) for folder in dirpaths if folder]
    # A callback that names no folder keeps its checkpoints beside the logs, even if another callback names one.
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
    if "WandbLogger" in str(entry.get("class_path")):  # its name is a title, and its folder is the project
        name = logger.get("project") or os.environ.get("WANDB_PROJECT", "lightning_logs")
        version = version or logger.get("id")
    folder = "*" if version is None else f"version_{version}" if isinstance(version, int) else str(version)
    return sorted((Path(logger.get("save_dir") or root) / str(name or "")).glob(f"{folder}/checkpoints"))


def _entries(value: Any) -> list[Mapping[str, Any]]:
    values = value if isinstance(value, list) else [value]
    return [entry for entry in values if isinstance(entry, Mapping)]


def _texts(value: object, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield each text in settings with its key, and each text that YAML finds in one."""
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _texts(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list | tuple | set | frozenset):
        for number, item in enumerate(value):
            yield from _texts(item, f"{key}[{number}]")
    elif isinstance(value, str):
        yield key, value
        try:
            content = yaml.safe_load(value)
        except (yaml.YAMLError, ValueError):  # then jsonargparse reads no settings in it either
            return
        if content != value:
            yield from _texts(content, key)


def _may_be_code(text: str) -> bool:
    """Return whether a text names something that can be imported and is not known to be harmless."""
    module, _, name = text.rpartition(".")
    if not module or not all(part.isidentifier() for part in text.split(".")):
        return False
    if text.startswith((*_HARMLESS, _METRICS)):
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):  # jsonargparse may find a module that this module has imported
            return True
        if text.startswith(_METRICS):
            from lightning_znorm import metrics

            return found not in [getattr(metrics, known) for known in metrics.__all__]
        return not (isinstance(found, type) and f"{found.__module__}.".startswith(_HARMLESS))
    package = module.partition(".")[0]
    return package in sys.modules or importlib.util.find_spec(package) is not None
