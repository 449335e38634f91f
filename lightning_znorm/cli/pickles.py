"""Pickles in checkpoints: what would run code is found before PyTorch, Lightning or DeepSpeed load it.

A pickle names the classes and functions that are called when it is loaded. Which ones come with weights and states is
known, and a checkpoint that names another is refused.
"""

import io
import os
import pickle
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import torch

from lightning_znorm.errors import ZNormValueError

# What DeepSpeed's files name, beside what `torch.load` takes.
_DEEPSPEED = (
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
# What the index of `torch.distributed.checkpoint` names, beside dtypes and the folder that it was written to.
_METADATA = "torch.distributed.checkpoint.metadata"
_ENCODING = f"{_METADATA}._MEM_FORMAT_ENCODING"
_INDEX = {
    f"{_METADATA}.BytesStorageMetadata",
    f"{_METADATA}.ChunkStorageMetadata",
    f"{_METADATA}.Metadata",
    f"{_METADATA}.MetadataIndex",
    f"{_METADATA}.StorageMeta",
    f"{_METADATA}.TensorProperties",
    f"{_METADATA}.TensorStorageMetadata",
    _ENCODING,
    "torch.distributed.checkpoint.filesystem._StorageInfo",
    "torch.Size",
    "torch.serialization._get_layout",
    *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in ("PosixPath", "WindowsPath")),
}


def load_plain(source: str | Path | io.BytesIO, name: str) -> Any:
    """Load what `torch.save` wrote, if it is made of tensors and plain values; DeepSpeed's own objects come empty.

    Args:
        source: A path, or a file. Of the file on disk that a path names, tensors are read when they are looked at.
        name: What to call it.

    Raises:
        ValueError: If it holds anything else, or cannot be read.
    """
    is_archive = isinstance(source, str | Path) and zipfile.is_zipfile(source)
    try:
        with torch.serialization.safe_globals([(_Object, known) for known in _DEEPSPEED]):
            return torch.load(source, weights_only=True, map_location="cpu", mmap=is_archive)
    except Exception as error:  # zip's, pickle's and torch's have no common base
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ZNormValueError(_code(name, found[1])) from error
        raise ZNormValueError(_damaged(name, error)) from error


def check_folder(folder: Path) -> None:
    """Refuse a checkpoint in parts that would run code when it is loaded, by whatever strategy.

    Args:
        folder: Of FSDP, FSDP2 or tensor parallelism, or of DeepSpeed.

    Raises:
        ValueError: If a pickle in it names what weights and states do not need, or cannot be read.
    """
    if (index := folder / ".metadata").exists():
        _check_index(index)
    for path in _pickled_files(folder):
        load_plain(path, str(path))


def _code(name: str, found: str) -> str:
    return (
        f"{name} names {found}, and may run any code when it is loaded: if you trust whoever made the checkpoint, load "
        "it in Python (Trainer.fit(..., ckpt_path=..., weights_only=False))."
    )


def _damaged(name: str, error: Exception) -> str:
    reason = str(error).strip().partition("\n")[0] or type(error).__name__
    if reason.startswith("Weights only load failed"):  # and torch's advice is to load it with any code that it names
        reason = "it is no file of tensors and plain values"
    return f"{name} is no checkpoint, or a damaged one: it cannot be read ({reason})."


def _pickled_files(folder: Path) -> Iterator[Path]:
    """What Lightning and DeepSpeed load by `torch.load`: DeepSpeed's files are below, where ``latest`` says."""
    for name in ("latest", "latest_universal"):
        if (latest := folder / name).is_file():
            tag = Path(latest.read_text(errors="replace").strip())
            if tag.is_absolute() or ".." in tag.parts:
                raise ZNormValueError(f"{latest} names {tag}, which is not in this folder: it is no checkpoint's.")
    seen = set()
    for where, below, names in os.walk(folder, onerror=_raise, followlinks=True):
        if (real := os.path.realpath(where)) in seen:
            below.clear()
            continue
        seen.add(real)
        yield from (Path(where, name) for name in sorted(names) if name.lower().endswith(".pt"))


def _raise(error: OSError) -> None:
    raise error


def _check_index(path: Path) -> None:
    try:
        with path.open("rb") as file:
            index = _IndexUnpickler(file).load()
        kinds = {name: type(entry).__name__ for name, entry in index.state_dict_metadata.items()}
        # Tensors are read as such; other values of the state PyTorch unpickles, whatever they are.
        values = [
            (entry.fqn, place)
            for entry, place in index.storage_data.items()
            if kinds.get(entry.fqn) != "TensorStorageMetadata"
        ]
    except _UnknownNameError as error:
        raise ZNormValueError(_code(str(path), str(error))) from error
    except Exception as error:  # a damaged pickle may raise any
        raise ZNormValueError(_damaged(str(path), error)) from error
    for name, place in values:
        _check_value(path.parent, name, place)


def _check_value(folder: Path, name: str, place: Any) -> None:
    try:
        if getattr(place, "transform_descriptors", None):
            raise ZNormValueError(f"{name} is packed, as Lightning packs nothing")
        path = folder / place.relative_path
        with path.open("rb") as file:
            file.seek(place.offset)
            value = io.BytesIO(file.read(place.length))
    except Exception as error:  # the index may say anything
        raise ZNormValueError(_damaged(str(folder / ".metadata"), error)) from error
    load_plain(value, f"{path} ({name})")


class _UnknownNameError(pickle.UnpicklingError):
    pass


class _Sealed(type):
    def __setattr__(cls, name: str, value: object) -> None:
        raise pickle.UnpicklingError(f"it changes {cls.__name__}")


class _Object(metaclass=_Sealed):
    """Stands in for an object: it is made of anything, and takes attributes as pickle sets them, by its dictionary."""

    def __new__(cls, *args: object) -> "_Object":
        return super().__new__(cls)

    def __setattr__(self, name: str, value: object) -> None:
        raise pickle.UnpicklingError(f"it sets {name} of {type(self).__name__} in a way of its own")


class _Properties(_Object):
    """Stands in for `TensorProperties`, whose state is a tuple."""

    def __setstate__(self, state: tuple[object, ...]) -> None:
        pass


class _IndexUnpickler(pickle.Unpickler):
    """Reads an index of `torch.distributed.checkpoint` without a call of what it names."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self._made: dict[str, Any] = {"builtins.getattr": self._member}

    def find_class(self, module: str, name: str) -> Any:
        """Return a stand-in: for a class a class of the same name."""
        full = f"{module}.{name}"
        if full not in self._made:
            if full not in _INDEX and not (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
                raise _UnknownNameError(full)
            base = _Properties if name == "TensorProperties" else _Object
            self._made[full] = _Sealed(name, (base,), {})
        return self._made[full]

    def _member(self, owner: object, name: str) -> _Object:
        """Stand in for ``getattr``, by which Python 3.11.0 to 3.11.3 name the members of an `Enum`."""
        if owner is not self._made.get(_ENCODING) or not name.startswith("TORCH_"):
            raise _UnknownNameError("builtins.getattr")
        return _Object()
