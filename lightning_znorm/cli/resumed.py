"""What files and flags say, and what the checkpoint says that a command is to go on from."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lightning_znorm.cli.config_files import flatten
from lightning_znorm.errors import ZNormValueError

# Of a model that is evaluated, these do nothing.
_TRAINING = ("init_args.optimizer", "init_args.lr_scheduler")
# Of data, these change where they are and how they are read, not what they are.
_WAYS = {"cache_dir", "download", "max_memory_gb", "num_workers", "predict_root", "root"}


def check_resumed(checkpoint: str, own: dict[str, Any], given: dict[str, Any]) -> None:
    """Refuse to go on with a training under other settings than its own, which a checkpoint brings back.

    Args:
        checkpoint: Where the training is to go on.
        own: Settings of the checkpoint's model.
        given: Settings of the model that files and flags ask for.

    Raises:
        ValueError: If they differ.
    """
    settings, asked = flatten(own), flatten(given)
    for key in sorted(settings | asked):
        if settings.get(key) != asked.get(key):
            raise ZNormValueError(
                f"{checkpoint} was trained with model.{key} {settings.get(key)}, and a training that is resumed keeps "
                f"its model and optimizer, so {asked.get(key)} would be lost: name the files and flags of that run."
            )


def overridden(checkpoint: str, own: dict[str, Any], given: dict[str, Any]) -> Iterator[str]:
    """Say which settings of a model that is evaluated a checkpoint overrides.

    Args:
        checkpoint: Whose weights are evaluated.
        own: Settings of the checkpoint's model.
        given: Settings of the model that files and flags ask for.
    """
    settings, asked = flatten(own), flatten(given)
    for key in sorted(settings.keys() & asked.keys()):
        if settings[key] != asked[key] and not key.startswith(_TRAINING):
            yield f"model.{key} is {settings[key]}, as {checkpoint} was trained, and not {asked[key]}."


def changed_data(checkpoint: str, given: dict[str, Any]) -> Iterator[str]:
    """Say which settings of the data are others than those that a checkpoint was trained with.

    Args:
        checkpoint: From which training goes on.
        given: Settings of the data that files and flags ask for.
    """
    if not Path(checkpoint).is_file():
        return
    import torch

    saved = torch.load(checkpoint, weights_only=True, map_location="cpu", mmap=True)
    own = saved.get("datamodule_hyper_parameters", {})
    for key, value in given.get("init_args", {}).items():
        if key in own and own[key] != value and key not in _WAYS:
            yield (
                f"data.init_args.{key} was {own[key]} when {checkpoint} was trained, and is {value} from here on: this "
                "is not the training that it would have been."
            )
