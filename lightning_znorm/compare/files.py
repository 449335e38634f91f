"""Files of a study: written as a whole or not at all, checked when they are read, and locks.

A process may die at any time. So a file is written under another name and put into its place when it is complete, and
a lock ends with the processes that hold it: a crash never blocks the next study.
"""

import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from itertools import count
from pathlib import Path
from types import UnionType
from typing import Any

from lightning_znorm.errors import ZNormRuntimeError, ZNormValueError

_SECONDS_TO_WRITE = 600
"""Time after which nobody is still writing a small file."""
_LEFTOVER = re.compile(r"\..+\.(json|yaml|csv|md|html)\.\d+")


class DamagedError(ZNormValueError):
    """A file does not hold what was written into it. The message names the file and the reason.

    Args:
        path: The file.
        reason: What is wrong with it.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(path, reason)
        self.path = path
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.path} is damaged: {self.reason}."


class InUseError(ZNormRuntimeError):
    """Another process holds the lock."""


def write_text(path: Path, text: str) -> None:
    """Write a text file, or replace it.

    Args:
        path: The file.
        text: Its content.

    Raises:
        OSError: If the file cannot be written. The error has the path, and nothing of the new file remains.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # File names in the text may hold bytes that are not UTF-8.
        with temporary.open("w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())  # without it, a power failure may keep the name and lose the content
        temporary.replace(path)
    except OSError as error:
        _discard(temporary)
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error
    except BaseException:
        _discard(temporary)
        raise


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file, or replace it.

    Args:
        path: The file.
        content: What it is to hold.

    Raises:
        OSError: If the file cannot be written. The error has the path, and nothing of the new file remains.
    """
    write_text(path, json.dumps(content, indent=1))


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Args:
        path: The file.

    Returns:
        What it holds; ``None`` if there is no such file.

    Raises:
        DamagedError: If the file is not JSON.
    """
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text)
    except FileNotFoundError:
        return None
    except IsADirectoryError as error:
        raise DamagedError(path, "it is a folder") from error
    except UnicodeDecodeError as error:
        raise DamagedError(path, "it is not text in UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise DamagedError(path, f"it is not JSON ({error})" if text.strip() else "it is empty") from error
    if content is None:
        raise DamagedError(path, "it holds null")
    return content


def read_object(
    path: Path, required: Mapping[str, type | UnionType], optional: Mapping[str, type | UnionType] | None = None
) -> dict[str, Any] | None:
    """Read a JSON file that holds an object.

    Args:
        path: The file.
        required: Types of the values that must be there, by key.
        optional: Types of the values that may be there, by key.

    Returns:
        The object; ``None`` if there is no such file.

    Raises:
        DamagedError: If the file holds something else.
    """
    content = read_json(path)
    if content is None:
        return None
    if not isinstance(content, dict):
        raise DamagedError(path, f"it holds {_shortened(content)}, where an object is expected")
    for key, kind in {**required, **(optional or {})}.items():
        if key in content and not isinstance(content[key], kind):
            raise DamagedError(path, f"its {key} is {_shortened(content[key])}")
        if key in required and key not in content:
            raise DamagedError(path, f"it holds no {key}")
    return content


def remove_leftovers(folder: Path) -> None:
    """Remove the temporary files of processes that died while they wrote.

    Args:
        folder: Where to look, without its subfolders.
    """
    for path in folder.glob(".*"):
        if is_leftover(path):
            with suppress(FileNotFoundError):  # its process has just moved it into its place
                if time.time() - path.stat().st_mtime > _SECONDS_TO_WRITE:
                    _discard(path)


def is_leftover(path: Path) -> bool:
    """Return whether a path has the name of a temporary file of `write_text`."""
    return bool(_LEFTOVER.fullmatch(path.name))


def free_path(path: Path) -> Path:
    """Return the path with the first number that is not taken, such as ``damaged-1``."""
    return next(found for i in count(1) if not (found := path.with_name(f"{path.name}-{i}")).exists())


def with_path(error: OSError, path: Path) -> OSError:
    """Return the same error with a path: the system names none where it cannot write to an open file."""
    return error if error.filename else OSError(error.errno, error.strerror or str(error), str(path))


def reason_of(error: OSError) -> str:
    """Return what the system says about a file, such as ``study.json: No space left on device``."""
    return f"{error.filename}: {error.strerror}" if error.filename else str(error)


@contextmanager
def locked(path: Path, wait: Callable[[], object] | None = None) -> Iterator[int]:
    """Hold a lock.

    Own code, and not a library such as filelock, because a run's process inherits the descriptor of the lock and goes
    on holding it when the study is killed.

    Args:
        path: File of the lock. It is created if needed and never removed.
        wait: Called until the lock is free, for example to sleep. Without it, a lock that is held is an error.

    Yields:
        The descriptor. A process that inherits it goes on holding the lock (not on Windows).

    Raises:
        InUseError: If another process holds the lock. The message is what that process wrote into the file.
        OSError: If the file cannot be created or locked.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        while not _acquired(descriptor, path):
            if wait is None:
                raise InUseError(_read_holder(descriptor))
            wait()
        with suppress(OSError):  # on a full disk: people read the text, but the lock holds without it
            os.ftruncate(descriptor, 0)
            os.lseek(descriptor, 1, os.SEEK_SET)  # Windows keeps others from reading the locked first byte
            os.write(descriptor, f"process {os.getpid()} on {_host()}".encode())
        yield descriptor
    finally:
        os.close(descriptor)


def lock_holder(path: Path) -> str:
    """Return who holds a lock, or held it last."""
    try:
        return path.read_bytes()[1:200].decode(errors="replace") or "another process"
    except OSError:  # the file is missing, or Windows keeps others from reading it
        return "another process"


def _discard(path: Path) -> None:
    with suppress(OSError):  # in a folder where nothing may be removed
        path.unlink(missing_ok=True)


def _shortened(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 40 else f"{text[:40]}..."


def _acquired(descriptor: int, path: Path) -> bool:
    try:
        return _acquire(descriptor)
    except OSError as error:
        raise with_path(error, path) from error


def _read_holder(descriptor: int) -> str:
    os.lseek(descriptor, 1, os.SEEK_SET)
    return os.read(descriptor, 200).decode(errors="replace")


def _host() -> str:
    import platform

    return platform.node() or "this machine"


if sys.platform == "win32":
    import msvcrt

    def _acquire(descriptor: int) -> bool:
        os.lseek(descriptor, 0, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)
        except OSError:
            return False
        return True

else:
    import fcntl

    def _acquire(descriptor: int) -> bool:
        # The lock belongs to the open file, not to the process: a child that inherits the descriptor keeps it.
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
