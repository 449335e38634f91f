"""Pickles in checkpoints, read without running code, before PyTorch, Lightning or DeepSpeed load them.

A pickle names the classes and functions that are called when it is loaded. A checkpoint is refused if it names others
than those that weights and states need.
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

# Classes that DeepSpeed's files name, beside those that `torch.load` accepts.
_DEEPSPEED = (
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
)
# Classes that the index of `torch.distributed.checkpoint` names, beside dtypes and the path of its folder.
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
    """Load a file that `torch.save` wrote, if it holds only tensors and plain values.

    DeepSpeed's own objects are replaced by empty ones.

    Args:
        source: A path, or an open file. The tensors of a path are memory-mapped.
        name: What a message calls it.

    Raises:
        ValueError: If the file holds anything else, or cannot be read.
    """
    is_archive = isinstance(source, str | Path) and zipfile.is_zipfile(source)
    try:
        with torch.serialization.safe_globals([(_Object, known) for known in _DEEPSPEED]):
            return torch.load(source, weights_only=True, map_location="cpu", mmap=is_archive)
    except Exception as error:  # the errors of zipfile, pickle and torch have no common base
        if found := re.search(r"GLOBAL ([\w.]+)", str(error)):
            raise ZNormValueError(_code(name, found[1])) from error
        raise ZNormValueError(_damaged(name, error)) from error


def check_folder(folder: Path) -> None:
    """Refuse a checkpoint folder that would run code when a strategy loads it.

    Args:
        folder: The folder that FSDP, FSDP2, tensor parallelism or DeepSpeed wrote.

    Raises:
        ValueError: If a pickle in it cannot be read, or names what weights and states do not need.
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
    if reason.startswith("Weights only load failed"):  # torch goes on to advise loading it with any code that it names
        reason = "it is not a file of tensors and plain values"
    return f"{name} is not a checkpoint, or a damaged one: it cannot be read ({reason})."


def _pickled_files(folder: Path) -> Iterator[Path]:
    """Yield the files that Lightning and DeepSpeed load by `torch.load`. DeepSpeed's ``latest`` names a subfolder."""
    for name in ("latest", "latest_universal"):
        if (latest := folder / name).is_file():
            tag = Path(latest.read_text(errors="replace").strip())
            if tag.is_absolute() or ".." in tag.parts:
                raise ZNormValueError(f"{latest} names {tag}, which is not in this folder: it is not a checkpoint.")
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
        # PyTorch reads tensors as raw data, and unpickles all other values of the state.
        values = [
            (entry.fqn, location)
            for entry, location in index.storage_data.items()
            if kinds.get(entry.fqn) != "TensorStorageMetadata"
        ]
    except _UnknownNameError as error:
        raise ZNormValueError(_code(str(path), str(error))) from error
    except Exception as error:  # a damaged pickle may raise any exception
        raise ZNormValueError(_damaged(str(path), error)) from error
    for name, location in values:
        _check_value(path.parent, name, location)


def _check_value(folder: Path, name: str, location: Any) -> None:
    try:
        if getattr(location, "transform_descriptors", None):
            raise ZNormValueError(f"{name} is packed, and Lightning packs nothing")
        path = folder / location.relative_path
        with path.open("rb") as file:
            file.seek(location.offset)
            value = io.BytesIO(file.read(location.length))
    except Exception as error:  # a foreign index may hold any values
        raise ZNormValueError(_damaged(str(folder / ".metadata"), error)) from error
    load_plain(value, f"{path} ({name})")


class _UnknownNameError(pickle.UnpicklingError):
    pass


class _Sealed(type):
    def __setattr__(cls, name: str, value: object) -> None:
        raise pickle.UnpicklingError(f"it changes {cls.__name__}")


class _Object(metaclass=_Sealed):
    """A stand-in for an object. It takes any arguments, and attributes only through its dictionary, as pickle does."""

    def __new__(cls, *args: object) -> "_Object":
        return super().__new__(cls)

    def __setattr__(self, name: str, value: object) -> None:
        raise pickle.UnpicklingError(f"it sets {name} of {type(self).__name__} in a way of its own")


class _Properties(_Object):
    """A stand-in for `TensorProperties`, whose state is a tuple."""

    def __setstate__(self, state: tuple[object, ...]) -> None:
        pass


class _IndexUnpickler(pickle.Unpickler):
    """Reads an index of `torch.distributed.checkpoint` without calling what it names."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)
        self._made: dict[str, Any] = {"builtins.getattr": self._member}

    def find_class(self, module: str, name: str) -> Any:
        """Return a stand-in of the same name."""
        full = f"{module}.{name}"
        if full not in self._made:
            if full not in _INDEX and not (module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)):
                raise _UnknownNameError(full)
            base = _Properties if name == "TensorProperties" else _Object
            self._made[full] = _Sealed(name, (base,), {})
        return self._made[full]

    def _member(self, owner: object, name: str) -> _Object:
        """Stand in for ``getattr``, which pickles of Python 3.11.0 to 3.11.3 call for the members of an `Enum`."""
        if owner is not self._made.get(_ENCODING) or not name.startswith("TORCH_"):
            raise _UnknownNameError("builtins.getattr")
        return _Object()
