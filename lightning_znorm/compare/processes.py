"""Processes of a study: each runs ``python -m lightning_znorm``, and ends with the study."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import Any, TypeVar

import psutil

from lightning_znorm.compare.files import with_path
from lightning_znorm.compare.forks import CAN_FORK, ForkedProcess, ForkServer
from lightning_znorm.compare.formatting import clock
from lightning_znorm.errors import ZNormRuntimeError

Item = TypeVar("Item")
Result = TypeVar("Result")

_SIGKILL = getattr(signal, "SIGKILL", signal.SIGTERM)
_HAS_GROUPS = hasattr(os, "killpg")
_SECONDS_TO_END = 5
"""Time after which a process that was told to end is killed."""
_ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGQUIT") if hasattr(signal, name)]
"""Signals that end a program, besides Ctrl-C: from batch systems, closed terminals and Ctrl-\\."""
_TAIL_BYTES = 20_000


class Stopped(ZNormRuntimeError):
    """The study was told to stop."""


class TimedOut(ZNormRuntimeError):
    """A command took too long and was ended. The message continues a sentence that begins with the command's name."""


class Processes:
    """The processes of a study.

    Args:
        timeout: Seconds after which each is ended; ``None`` for any time.
    """

    def __init__(self, timeout: float | None = None) -> None:
        self.timeout = timeout
        self._forks: ForkServer | None = None
        self._may_fork = False
        self._running: set[_Tree] = set()
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def run(
        self,
        args: Sequence[str],
        log: Path,
        environment: Mapping[str, str] | None = None,
        lock: int | None = None,
        milestone: Path | None = None,
    ) -> int:
        """Run a command and wait for it. What it started ends with it.

        These are its process group, and all of its descendants that can still be found.

        Args:
            args: Arguments of ``python -m lightning_znorm``.
            log: File to which the output of the command is appended.
            environment: Environment variables, in addition to this process's.
            lock: Descriptor of a lock that the command inherits and holds (not on Windows).
            milestone: File at which the time for the command begins anew.

        Returns:
            The exit code; negative after a signal.

        Raises:
            Stopped: If `stop` was called.
            TimedOut: If it took too long.
            OSError: If the log cannot be written. The error has its path.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab", buffering=0) as output:
            try:
                output.write(f"$ python -m lightning_znorm {' '.join(args)}\n".encode())
            except OSError as error:
                raise with_path(error, log) from error
            inherited = () if lock is None or sys.platform == "win32" else (lock,)
            options = {"stdout": output, "stderr": subprocess.STDOUT, "pass_fds": inherited}
            with self.started(args, environment or {}, options) as process:
                return self._wait(process, milestone)

    def capture(self, args: Sequence[str]) -> tuple[int, str, str]:
        """Run a command and capture its output.

        Args:
            args: Arguments of ``python -m lightning_znorm``.

        Returns:
            The exit code, and what it printed on stdout and on stderr.

        Raises:
            Stopped: If `stop` was called.
            TimedOut: If it took too long.
        """
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with self.started(args, {"PYTHONIOENCODING": "utf-8"}, options) as process:
            out, err = process.communicate(timeout=self._seconds())
            return process.wait(), out.decode(), err.decode(errors="replace")

    @contextmanager
    def forking(self, environment: Mapping[str, str] | None = None) -> Iterator[None]:
        """Start processes in this context as copies of one that has the imports, on systems where that works.

        Args:
            environment: Environment variables of that one, in addition to this process's.
        """
        self._may_fork = CAN_FORK
        self._forks_environment = environment or {}
        try:
            yield
        finally:
            self._may_fork = False
            self._close_forks()

    def pause(self, seconds: float = 0.2) -> None:
        """Wait.

        Args:
            seconds: How long.

        Raises:
            Stopped: If `stop` was called.
        """
        if self._stopped.wait(seconds):
            raise Stopped

    def map(self, work: Callable[[Item], Result], items: Iterable[Item], jobs: int) -> list[Result]:
        """Apply a function that runs processes to several items in parallel. If one fails, end all processes.

        Args:
            work: The function.
            items: Its arguments.
            jobs: Number of items at a time.
        """
        with ThreadPoolExecutor(jobs) as threads:
            try:
                return list(threads.map(work, items))
            except BaseException:  # also an interruption, before the executor waits for its threads
                self.stop()
                raise

    def stop(self) -> None:
        """End all running processes, and start no others."""
        with self._lock:
            self._stopped.set()
            running = list(self._running)
        try:
            _end(running)
        finally:
            self._close_forks()  # after the processes, of which it says how they end

    @contextmanager
    def started(
        self, args: Sequence[str], environment: Mapping[str, str], options: Mapping[str, Any]
    ) -> Iterator["subprocess.Popen[bytes] | ForkedProcess"]:
        """Start a command, and end it and everything that it started on leaving the context.

        Args:
            args: Arguments of ``python -m lightning_znorm``.
            environment: Environment variables, in addition to this process's.
            options: Further arguments of `subprocess.Popen`.

        Raises:
            Stopped: If `stop` was called.
            TimedOut: If a wait for the process within the context took too long.
        """
        variables = {**os.environ, **import_paths(), **environment}
        copy = self._fork(args, variables, options)
        with self._lock:
            if self._stopped.is_set():
                if copy is not None:
                    _Tree(copy).send_signal(_SIGKILL)
                    copy.close_outputs()
                raise Stopped
            process = copy or subprocess.Popen(
                [sys.executable, "-m", "lightning_znorm", *args],
                stdin=subprocess.DEVNULL,
                env=variables,
                start_new_session=True,  # a process group of its own
                **options,
            )
            tree = _Tree(process)
            self._running.add(tree)
        try:
            yield process
        except subprocess.TimeoutExpired as error:
            _end([tree])
            raise _timed_out(error) from None
        finally:
            # Other ranks may wait forever for the one that died; and if Ray interrupts this thread, the process itself
            # is still running.
            tree.send_signal(_SIGKILL)
            process.wait()
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()
            with self._lock:
                self._running.discard(tree)
        if self._stopped.is_set():
            raise Stopped

    def _fork(
        self, args: Sequence[str], variables: Mapping[str, str], options: Mapping[str, Any]
    ) -> ForkedProcess | None:
        """Start a command as a copy of a process with the imports; return ``None`` if it needs a process of its own.

        Raises:
            TimedOut: If the imports took too long.
        """
        with self._lock:
            if not self._may_fork or self._stopped.is_set():
                return None
            if self._forks is None:
                self._forks = ForkServer({**variables, **self._forks_environment})
            forks = self._forks
        try:
            copy = forks.start(args, variables, options, self._seconds())
        except subprocess.TimeoutExpired as error:
            raise _timed_out(error) from None
        self._may_fork = copy is not None
        return copy

    def _wait(self, process: "subprocess.Popen[bytes] | ForkedProcess", milestone: Path | None) -> int:
        seconds = self._seconds()
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            if seconds is None or milestone is None or not milestone.is_file():
                raise
        with suppress(subprocess.TimeoutExpired):
            age = time.time() - milestone.stat().st_mtime
            return process.wait(min(max(seconds - age, 0.0), seconds))  # whatever the clock says
        raise subprocess.TimeoutExpired(process.args, seconds)

    def _close_forks(self) -> None:
        with self._lock:
            forks, self._forks = self._forks, None
        if forks is not None:
            forks.close()

    def _seconds(self) -> float | None:
        # Windows and `poll` accept no longer time than this one, of eleven days.
        return None if self.timeout is None else min(self.timeout, 1e6)


def tail(log: Path, lines: int = 20, start: int = 0) -> str:
    """Return the last lines of a log of any length.

    Args:
        log: The log; the result is empty if it does not exist.
        lines: Number of lines.
        start: Byte before which nothing is returned.
    """
    if not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(max(start, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        text = file.read(_TAIL_BYTES).decode("utf-8", errors="replace")
    return "\n".join(text.replace("\r", "\n").rstrip().splitlines()[-lines:])


@contextmanager
def interruptible() -> Iterator[None]:
    """Let signals that end a program interrupt it as Ctrl-C does, so that it can end its processes.

    Signals that are ignored (``nohup``) or that the program handles itself stay as they are. Python handles signals in
    the main thread only, so all of them stay as they are in other threads.

    Raises:
        KeyboardInterrupt: Upon the first signal. Those that follow, while processes are ended, do nothing.
    """
    main = threading.current_thread() is threading.main_thread()
    handled = [number for number in _ENDING if main and signal.getsignal(number) is signal.SIG_DFL]
    received = []

    def interrupt(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        for number in handled:
            signal.signal(number, _do_nothing)  # not SIG_IGN, which processes that start now would inherit
        raise KeyboardInterrupt

    for number in handled:
        signal.signal(number, interrupt)
    try:
        yield
    except OSError as error:
        if received:  # the terminal is gone, so the last output failed
            raise KeyboardInterrupt from error
        raise
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)


def import_paths() -> dict[str, str]:
    """Return the environment variable with which a process can import what this one can, such as the user's modules."""
    return {"PYTHONPATH": os.pathsep.join(dict.fromkeys(path or os.getcwd() for path in sys.path))}


class _Tree:
    """A process, and everything that it starts.

    Args:
        process: The process.
    """

    def __init__(self, process: "subprocess.Popen[bytes] | ForkedProcess") -> None:
        self.process = process
        self._descendants: set[psutil.Process] = set()
        try:
            self._root: psutil.Process | None = psutil.Process(process.pid)
        except psutil.NoSuchProcess:  # on Windows, if it has ended already
            self._root = None

    def send_signal(self, number: int) -> None:
        """Send a signal to all processes of the tree that still run; on Windows, end them.

        psutil compares start times, so a process that has reused the id of an earlier one gets no signal.
        """
        self._descendants.update(self._find_descendants())
        targets = [process for process in (self._root, *self._descendants) if process is not None]
        if _HAS_GROUPS:
            # Besides psutil, because the group also holds processes whose parent has ended.
            targets = [process for process in targets if not self._is_in_group(process)]
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, number)
        for process in targets:
            with suppress(psutil.Error):  # it has ended, or belongs to another user
                process.send_signal(number)

    def _find_descendants(self) -> list[psutil.Process]:
        if self._root is None:
            return []
        parents = [self._root]
        found: list[psutil.Process] = []
        if not _HAS_GROUPS and not self._root.is_running():
            # On Windows its children keep its id, which is not reused as long as `Popen` has a handle of it.
            started = self._root.create_time()
            parents = [
                process
                for process in psutil.process_iter(["ppid", "create_time"])
                if process.info["ppid"] == self._root.pid and process.info["create_time"] >= started
            ]
            found += parents
        for parent in parents:
            with suppress(psutil.NoSuchProcess):  # it has just ended
                found += parent.children(recursive=True)
        return found

    def _is_in_group(self, process: psutil.Process) -> bool:
        try:
            return os.getpgid(process.pid) == self.process.pid
        except ProcessLookupError:
            return True  # it has ended: nothing to signal


def _timed_out(error: subprocess.TimeoutExpired) -> TimedOut:
    return TimedOut(f"was ended after {clock(error.timeout)} (--timeout)")


def _do_nothing(signum: int, frame: FrameType | None) -> None:
    pass


def _end(trees: Sequence[_Tree]) -> None:
    """End processes. Kill those that have not ended in time, or all at once if this is interrupted, too."""
    end = time.monotonic() + _SECONDS_TO_END
    try:
        for tree in trees:
            tree.send_signal(signal.SIGTERM)
        for tree in trees:
            with suppress(subprocess.TimeoutExpired):
                tree.process.wait(timeout=max(0.0, end - time.monotonic()))
    finally:
        for tree in trees:
            if tree.process.poll() is None:
                tree.send_signal(_SIGKILL)
