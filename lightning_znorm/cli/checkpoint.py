"""Checkpoints that are none."""

import re
import zipfile
from collections.abc import Mapping
from pathlib import Path

import torch

# What Lightning looks for without asking whether it is there.
_NEEDED: dict[str, type] = {"state_dict": Mapping, "pytorch-lightning_version": str}
# What is in the folder of a checkpoint in parts: FSDP's, FSDP2's, DeepSpeed's.
_PARTS = (".metadata", "meta.pt", "latest", "checkpoint")


def check_checkpoint(path: str) -> None:
    """Refuse a file that is no checkpoint of Lightning's, before anything is made of it.

    Where there is no such file, Lightning says so. It warns of a checkpoint from a Lightning newer than itself.

    Args:
        path: Of a file or a folder; words such as ``"last"`` and addresses are Lightning's to understand.

    Raises:
        ValueError: If the file cannot be read, or holds something else.
    """
    if Path(path).is_dir() and not any(Path(path, name).exists() for name in _PARTS):
        raise ValueError(f"{path} is a folder without a checkpoint in parts: name a file in it.")
    if not Path(path).is_file():
        return
    try:
        # Mapped, because it is going to be read again.
        content = torch.load(path, weights_only=True, map_location="cpu", mmap=zipfile.is_zipfile(path))
    except Exception as error:  # zip's, pickle's and torch's have no common base
        reason = str(error).strip().partition("\n")[0] or type(error).__name__
        raise ValueError(f"{path} is no checkpoint, or a damaged one: it cannot be read ({reason}).") from error
    if not isinstance(content, Mapping):
        raise ValueError(f"{path} is no checkpoint: it holds a {type(content).__name__}.")
    for key, kind in _NEEDED.items():
        if not isinstance(content.get(key), kind):
            raise ValueError(f"{path} is no checkpoint of Lightning's: it holds no {key}, as Trainer saves it.")
    if not re.match(r"\d+\.\d+", version := content["pytorch-lightning_version"]):
        raise ValueError(f"{path} is no checkpoint of Lightning's: its version is {version!r}.")
    if not isinstance(content.get("hyper_parameters", {}), Mapping):
        raise ValueError(f"{path} is no checkpoint of Lightning's: its hyper_parameters are no names and values.")
