"""Arrays of bytes in files: mapped into memory, and made once where they have to be decoded first."""

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

from lightning_znorm.data.arguments import checked_folder
from lightning_znorm.errors import ZNormOSError, ZNormPermissionError


@dataclass(frozen=True)
class ArrayFile:
    """Where a uint8 array lies in a file, uncompressed and in one piece.

    Args:
        path: The file.
        offset: Where the array begins, in bytes.
        shape: Its shape.
    """

    path: Path
    offset: int
    shape: tuple[int, ...]

    def map(self) -> tuple[NDArray[np.uint8], mmap.mmap]:
        """Return the array, read from the file when it is looked at and kept by the system alone, and its mapping.

        Raises:
            OSError: If the file is not there any more, or not as it was.
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
    """Return the folder for decoded images: the one that is named, or the user's own."""
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
    """Make an array in a file, unless an earlier run made it from the same files, of whichever user.

    Other processes may do the same at the same time: a file appears when it is complete. Who may read it the umask
    says, as of any file.

    Args:
        name: What the file's name begins with.
        sources: Files that the array is made from. If the path, size or time of one of them is another than it was,
            the array is made anew.
        shape: Of the array.
        fill: Sets all values of the array.
        folder: For the file; made if need be.

    Returns:
        Where the array is.

    Raises:
        OSError: If there is no room for it, or if it is there and may not be read.
    """
    key = hashlib.sha256(repr(shape).encode())
    for source in sources:
        state = source.stat()
        key.update(f"{source}\0{state.st_size}\0{state.st_mtime_ns}\0".encode(errors="surrogateescape"))
    array_file = ArrayFile(folder / f"{name}-{key.hexdigest()[:16]}.u8", 0, shape)
    if _size(array_file.path) != prod(shape):  # a machine that went down may have left it incomplete
        rank_zero_info(f"Decoding into {array_file.path} ({prod(shape) / 2**30:.1f} GiB), once for all runs.")
        _make(array_file, fill)
    return array_file


def _size(path: Path) -> int | None:
    """Size of a file that can be read; None if there is none, or a folder."""
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
        file = part.open("x+b")  # not by tempfile, whose files nobody else may read
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
        del array  # Windows renames no file that is mapped
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
    """Claim the room: where it gives out under a mapping, the system kills the process without a word."""
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
