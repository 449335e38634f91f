"""Checkpoints that are none, and checkpoints that would run code."""

import importlib
import importlib.util
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml

from lightning_znorm.cli.pickles import check_folder, load_plain
from lightning_znorm.errors import ZNormValueError

# What Lightning looks for without asking whether it is there.
_NEEDED: dict[str, type] = {"state_dict": Mapping, "pytorch-lightning_version": str}
# What is in the folder of a checkpoint in parts: FSDP's, FSDP2's, DeepSpeed's.
_PARTS = (".metadata", "meta.pt", "latest", "checkpoint")
# Whose classes may be made of any arguments.
_HARMLESS = (
    "lightning_znorm.models.",
    "lightning_znorm.tasks.",
    "monai.losses.",
    "monai.networks.",
    "torch.nn.",
    "torch.optim.",
)


def check_checkpoint(path: str) -> None:
    """Refuse what is no checkpoint of Lightning's, or would run code when it is loaded, before anything is made of it.

    Where there is no such file, Lightning says so. It warns of a checkpoint from a Lightning newer than itself.

    Args:
        path: Of a file or a folder; words such as ``"last"`` and addresses are Lightning's to understand.

    Raises:
        ValueError: If it cannot be read, holds something else, or names code.
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
        raise ZNormValueError(f"{path} is no checkpoint: it holds a {type(content).__name__}.")
    for key, kind in _NEEDED.items():
        if not isinstance(content.get(key), kind):
            raise ZNormValueError(f"{path} is no checkpoint of Lightning's: it holds no {key}, as Trainer saves it.")
    if not re.match(r"\d+\.\d+", version := content["pytorch-lightning_version"]):
        raise ZNormValueError(f"{path} is no checkpoint of Lightning's: its version is {version!r}.")
    if not isinstance(content.get("hyper_parameters", {}), Mapping):
        raise ZNormValueError(f"{path} is no checkpoint of Lightning's: its hyper_parameters are no names and values.")


def check_names(path: str, given: Mapping[str, Any]) -> None:
    """Refuse a checkpoint whose model's settings name code that was not asked for, before it is imported.

    Lightning's command line lays the settings of a checkpoint over those that were given.

    Args:
        path: Of the checkpoint.
        given: Settings of the model that files and flags ask for.

    Raises:
        ValueError: If the checkpoint names a class, a function or a file that they do not name; classes of networks,
            losses, optimizers and tasks aside, which run no code of others.
    """
    if not Path(path).is_file():
        return
    settings = load_plain(path, path).get("hyper_parameters", {})
    named = {text for _, text in _texts(given)}
    for key, text in _texts({key: value for key, value in settings.items() if key != "_instantiator"}):
        if text not in named and (os.path.isfile(text) or _may_be_code(text)):
            setting = "class_path" if key == "_class_path" else f"init_args.{key}"
            raise ZNormValueError(
                f"{path} names {text} for model.{setting}, which the config files and flags do not name, and which may "
                "run any code: name it there if you trust whoever made the checkpoint."
            )


def _texts(value: object, key: str = "") -> Iterator[tuple[str, str]]:
    """Each text in settings and the key that it is at, and each that YAML finds in one."""
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
        except (yaml.YAMLError, ValueError):  # which parses no settings either
            return
        if content != value:
            yield from _texts(content, key)


def _may_be_code(text: str) -> bool:
    """Whether a text names something that can be imported, and that is no class known to be harmless."""
    module, _, name = text.rpartition(".")
    if not module or not all(part.isidentifier() for part in text.split(".")):
        return False
    if text.startswith(_HARMLESS):
        try:
            found = getattr(importlib.import_module(module), name)
        except (ImportError, AttributeError):  # what jsonargparse finds may be one that this module has imported
            return True
        return not (isinstance(found, type) and f"{found.__module__}.".startswith(_HARMLESS))
    package = module.partition(".")[0]
    return package in sys.modules or importlib.util.find_spec(package) is not None
