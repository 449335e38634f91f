"""Locks that end with the processes that hold them: a crash never blocks what comes after it."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from lightning_znorm.compare.files import named
from lightning_znorm.errors import ZNormRuntimeError


class InUseError(ZNormRuntimeError):
    """Another process holds the lock."""


@contextmanager
def locked(path: Path, wait: Callable[[], object] | None = None) -> Iterator[int]:
    """Hold a lock.

    Args:
        path: File that the lock is on; made where there is none, and never removed.
        wait: Called until it is free, such as to sleep; by default, a lock that somebody else holds is an error.

    Yields:
        The descriptor: a process that is handed it goes on holding the lock (not on Windows).

    Raises:
        InUseError: If somebody else holds it; the message is what they wrote into it.
        OSError: If the file cannot be made, or locked where it is.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        while not _acquired(descriptor, path):
            if wait is None:
                raise InUseError(_read(descriptor))
            wait()
        with suppress(OSError):  # a full disk: what is written is for people to read, and the lock holds without it
            os.ftruncate(descriptor, 0)
            os.lseek(descriptor, 1, os.SEEK_SET)  # Windows locks the first byte against readers too
            os.write(descriptor, f"process {os.getpid()} on {_host()}".encode())
        yield descriptor
    finally:
        os.close(descriptor)


def holder(path: Path) -> str:
    """Who holds a lock, or held it last."""
    try:
        return path.read_bytes()[1:200].decode(errors="replace") or "another process"
    except OSError:  # not there, or locked against readers too
        return "another process"


def _acquired(descriptor: int, path: Path) -> bool:
    try:
        return _acquire(descriptor)
    except OSError as error:
        raise named(error, path) from error


def _read(descriptor: int) -> str:
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
        # Belongs to the open file, not to the process: a child that has inherited the descriptor keeps it held.
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True
