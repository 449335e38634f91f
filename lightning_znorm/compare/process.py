"""Runs `python -m lightning_znorm` in processes of its own, and ends them when the study ends."""

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

from lightning_znorm.compare.files import named
from lightning_znorm.compare.numbers import clock
from lightning_znorm.errors import ZNormRuntimeError

Item = TypeVar("Item")
Result = TypeVar("Result")

_SIGKILL = getattr(signal, "SIGKILL", signal.SIGTERM)
_SECONDS_TO_END = 5
"""After which a process that was told to end is killed."""
_ENDING = [getattr(signal, name) for name in ("SIGTERM", "SIGHUP", "SIGQUIT") if hasattr(signal, name)]
"""Signals that end a program, beside Ctrl-C: of batch systems, of a terminal that is closed, of Ctrl-\\."""
_TAIL_BYTES = 20_000


class Stopped(ZNormRuntimeError):
    """The study was told to stop."""


class TimedOut(ZNormRuntimeError):
    """A command took longer than it may, and was ended; the message says so, and goes on behind the command's name."""


class Processes:
    """The processes of a study.

    Args:
        timeout: Seconds after which each is ended; none if they may take any time.
    """

    def __init__(self, timeout: float | None = None) -> None:
        self.timeout = timeout
        self._running: set[subprocess.Popen[bytes]] = set()
        self._lock = threading.Lock()
        self._stopped = threading.Event()

    def run(
        self, args: Sequence[str], log: Path, environment: Mapping[str, str] | None = None, held: int | None = None
    ) -> int:
        """Run a command and wait for it; nothing that it has started lives on.

        Args:
            args: What is typed behind ``python -m lightning_znorm``.
            log: File to which everything is appended that the command prints.
            environment: Laid over this process's.
            held: Descriptor that the command is to hold open (a lock), not on Windows.

        Returns:
            The exit code; negative after a signal.

        Raises:
            Stopped: If `stop` was called.
            TimedOut: If it took longer than it may.
            OSError: With the log's path, if that cannot be written.
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab", buffering=0) as output:
            try:
                output.write(f"$ python -m lightning_znorm {' '.join(args)}\n".encode())
            except OSError as error:
                raise named(error, log) from error
            held_open = () if held is None or sys.platform == "win32" else (held,)
            options = {"stdout": output, "stderr": subprocess.STDOUT, "pass_fds": held_open}
            with self._started(args, environment or {}, options) as process:
                return process.wait(self._seconds())

    def capture(self, args: Sequence[str]) -> tuple[int, str, str]:
        """Run a command; return its exit code and what it printed, on stdout and stderr.

        Raises:
            Stopped: If `stop` was called.
            TimedOut: If it took longer than it may.
        """
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with self._started(args, {"PYTHONIOENCODING": "utf-8"}, options) as process:
            out, errors = process.communicate(timeout=self._seconds())
            return process.returncode, out.decode(), errors.decode(errors="replace")

    def _seconds(self) -> float | None:
        # Windows and `poll` take no longer time than this one, of eleven days.
        return None if self.timeout is None else min(self.timeout, 1e6)

    def pause(self, seconds: float = 0.2) -> None:
        """Wait.

        Raises:
            Stopped: If `stop` was called.
        """
        if self._stopped.wait(seconds):
            raise Stopped

    def map(self, work: Callable[[Item], Result], items: Iterable[Item], jobs: int) -> list[Result]:
        """Apply a function that runs processes to several items at a time; where it fails, end them all.

        Args:
            work: The function.
            items: What it is applied to.
            jobs: To how many at a time.
        """
        with ThreadPoolExecutor(jobs) as threads:
            try:
                return list(threads.map(work, items))
            except BaseException:  # an interruption among them, before the threads are waited for
                self.stop()
                raise

    def stop(self) -> None:
        """End all that run, and let no other begin."""
        with self._lock:
            self._stopped.set()
            running = list(self._running)
        _end(running)

    @contextmanager
    def _started(
        self, args: Sequence[str], environment: Mapping[str, str], options: Mapping[str, Any]
    ) -> Iterator["subprocess.Popen[bytes]"]:
        with self._lock:
            if self._stopped.is_set():
                raise Stopped
            process = subprocess.Popen(
                [sys.executable, "-m", "lightning_znorm", *args],
                stdin=subprocess.DEVNULL,
                env={**os.environ, **_importable(), **environment},
                start_new_session=True,  # so that what it starts can be ended with it
                **options,
            )
            self._running.add(process)
        try:
            yield process
        except subprocess.TimeoutExpired as error:
            _end([process])
            raise TimedOut(f"was ended after {clock(error.timeout)} (--timeout)") from None
        finally:
            # Of a run on several devices, others may wait forever for the one that died; or, where Ray interrupts this
            # thread, the process itself has not ended.
            _signal(process, _SIGKILL)
            process.wait()
            for pipe in (process.stdout, process.stderr):
                if pipe is not None:
                    pipe.close()
            with self._lock:
                self._running.discard(process)
        if self._stopped.is_set():
            raise Stopped


def tail(log: Path, lines: int = 20, start: int = 0) -> str:
    """The last lines of a log, however long that is.

    Args:
        log: The log; empty if there is none.
        lines: How many.
        start: Byte from which on they are wanted.
    """
    if not log.is_file():
        return ""
    with log.open("rb") as file:
        file.seek(max(start, file.seek(0, os.SEEK_END) - _TAIL_BYTES))
        text = file.read(_TAIL_BYTES).decode("utf-8", errors="replace")
    return "\n".join(text.replace("\r", "\n").rstrip().splitlines()[-lines:])


@contextmanager
def interruptible() -> Iterator[None]:
    """Interrupt, as Ctrl-C does, what signals would end at once, so that it can end its processes.

    Signals that are ignored (``nohup``) or that the program handles itself stay as they are, and so do all of them in
    other threads than the main one, where Python handles none.

    Raises:
        KeyboardInterrupt: Upon the first signal. Those that follow, while processes are ended, do nothing.
    """
    main = threading.current_thread() is threading.main_thread()
    handled = [number for number in _ENDING if main and signal.getsignal(number) is signal.SIG_DFL]
    received = []

    def interrupt(signum: int, frame: FrameType | None) -> None:
        received.append(signum)
        for number in handled:
            signal.signal(number, _do_nothing)  # not SIG_IGN, which processes that begin now would inherit
        raise KeyboardInterrupt

    for number in handled:
        signal.signal(number, interrupt)
    try:
        yield
    except OSError as error:
        if received:  # what was to be shown on a terminal that is gone
            raise KeyboardInterrupt from error
        raise
    finally:
        for number in handled:
            signal.signal(number, signal.SIG_DFL)


def _importable() -> dict[str, str]:
    """What this process can import, its processes can: the user's own modules among it."""
    return {"PYTHONPATH": os.pathsep.join(dict.fromkeys(path or os.getcwd() for path in sys.path))}


def _do_nothing(signum: int, frame: FrameType | None) -> None:
    pass


def _end(processes: Sequence["subprocess.Popen[bytes]"]) -> None:
    """End processes, and kill what has not ended in time, or at once if this is interrupted in turn."""
    end = time.monotonic() + _SECONDS_TO_END
    try:
        for process in processes:
            _signal(process, signal.SIGTERM)
        for process in processes:
            with suppress(subprocess.TimeoutExpired):
                process.wait(timeout=max(0.0, end - time.monotonic()))
    finally:
        for process in processes:
            if process.poll() is None:
                _signal(process, _SIGKILL)


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    try:
        if sys.platform == "win32":
            process.terminate()
        else:
            os.killpg(process.pid, number)
    except ProcessLookupError:
        pass
