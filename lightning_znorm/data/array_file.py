"""Arrays of bytes in files: mapped into memory, and cached where the images have to be decoded first."""

import hashlib
import mmap
import os
import secrets
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray

from lightning_znorm.arguments import checked_folder
from lightning_znorm.errors import ZNormOSError, ZNormPermissionError


@dataclass(frozen=True)
class ArrayFile:
    """Where a uint8 array lies in a file, uncompressed and contiguous.

    Args:
        path: The file.
        offset: Where the array begins, in bytes.
        shape: Its shape.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]

    def map(self) -> tuple[NDArray[np.uint8], mmap.mmap]:
        """Map the file, and return the array and its mapping.

        The system reads the array as it is used, and keeps it in its page cache. `np.memmap` would not do: it has no
        public name for its mapping, on which `MappedImages` calls ``madvise``.

        Raises:
            OSError: If the file is gone, cannot be read, or has become shorter.
        """
        try:
            size = self.path.stat().st_size
            with self.path.open("rb") as file:
                mapping = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) if size else None
        except OSError as error:
            way_out = "let its owner make it readable again" if isinstance(error, PermissionError) else "put it back"
            raise ZNormOSError(f"{self.path} cannot be read any more ({error.strerror}): {way_out}.") from error
        if mapping is None or size < self.offset + prod(self.shape):
            raise ZNormOSError(f"{self.path} has become shorter since it was opened: put it back as it was.")
        return np.frombuffer(mapping, np.uint8, prod(self.shape), self.offset).reshape(self.shape), mapping


def cache_folder(cache_dir: str | Path | None) -> Path:
    """Return the folder for decoded images: ``cache_dir``, or one in the user's cache folder."""
    if cache_dir is not None:
        return checked_folder("cache_dir", cache_dir)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lightning_znorm"


def cached_array(
    name: str,
    sources: Iterable[Path],
    shape: tuple[int, ...],
    fill: Callable[[NDArray[np.uint8]], None],
    folder: Path,
) -> ArrayFile:
    """Return an array in a file, which is made unless an earlier run, of any user, made it from the same files.

    Several processes may call this at the same time, because a file appears only when it is complete. The umask decides
    who may read it, as for any file. joblib's Memory would not do: it has the whole array in memory before it writes.

    Args:
        name: What the file's name begins with.
        sources: Files that the array is made from. If the path, size or time of one of them has changed, the array is
            made again.
        shape: Of the array.
        fill: Sets all values of the array.
        folder: Where the file is; made if it does not exist.

    Returns:
        Where the array is.

    Raises:
        OSError: If there is no room for the file, or if it exists and may not be read.
    """
    key = hashlib.sha256(repr(shape).encode())
    for source in sources:
        state = source.stat()
        key.update(f"{source}\0{state.st_size}\0{state.st_mtime_ns}\0".encode(errors="surrogateescape"))
    array_file = ArrayFile(folder / f"{name}-{key.hexdigest()[:16]}.u8", 0, shape)
    if _size(array_file.path) != prod(shape):  # a crash of the machine may have left it incomplete
        rank_zero_info(f"Decoding into {array_file.path} ({prod(shape) / 2**30:.1f} GiB), once for all runs.")
        _make(array_file, fill)
    return array_file


def _size(path: Path) -> int | None:
    """Return the size of a file that can be read; None if there is none, or a folder."""
    try:
        with path.open("rb") as file:
            return os.fstat(file.fileno()).st_size
    except PermissionError as error:
        raise ZNormPermissionError(
            f"{path} may not be read by this user ({error.strerror}): have its owner run chmod a+r on it and chmod a+x "
            "on the folders around it, or let cache_dir name a folder of your own."
        ) from error
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        return None


def _make(array_file: ArrayFile, fill: Callable[[NDArray[np.uint8]], None]) -> None:
    path, folder = array_file.path, array_file.path.parent
    part = folder / f"{path.name}{secrets.token_hex(8)}.part"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = part.open("x+b")  # files of the module tempfile can be read by their owner only
    except OSError as error:
        raise ZNormOSError(
            f"{folder} takes no files ({error.strerror}): let cache_dir name a folder that does."
        ) from error
    try:
        with file:
            _reserve(file.fileno(), prod(array_file.shape), folder)
        array = np.memmap(part, np.uint8, "r+", shape=array_file.shape)
        fill(array)
        array.flush()
        del array  # Windows does not rename a mapped file
        _replace(part, path)
    except BaseException:
        os.unlink(part)
        raise


def _replace(part: Path, path: Path) -> None:
    try:
        part.replace(path)
    except OSError as error:
        raise ZNormOSError(
            f"{path} cannot be put in place ({error.strerror}): delete what is there, or let cache_dir name another "
            "folder."
        ) from error


def _reserve(descriptor: int, size: int, folder: Path) -> None:
    """Reserve the disk space. If a mapped file runs out of it later, the system kills the process without a message."""
    try:
        if hasattr(os, "posix_fallocate"):
            os.posix_fallocate(descriptor, 0, size)
        else:
            os.truncate(descriptor, size)
    except OSError as error:
        raise ZNormOSError(
            f"{folder} has no room for {size / 2**30:.1f} GiB of decoded images ({error}): let cache_dir name a folder "
            "that has."
        ) from error
