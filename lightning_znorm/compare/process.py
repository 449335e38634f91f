"""Runs `python -m lightning_znorm` in processes of its own, and ends them when the study ends."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")

_SIGKILL = getattr(signal, "SIGKILL", signal.SIGTERM)
_SECONDS_TO_END = 5
"""After which a process that was told to end is killed."""


class Stopped(RuntimeError):
    """The study was told to stop."""


class Processes:
    """The processes of a study."""

    def __init__(self) -> None:
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
        """
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as output:
            output.write(f"$ python -m lightning_znorm {' '.join(args)}\n".encode())
            output.flush()
            held_open = () if held is None or sys.platform == "win32" else (held,)
            options = {"stdout": output, "stderr": subprocess.STDOUT, "pass_fds": held_open}
            with self._started(args, environment or {}, options) as process:
                return process.wait()

    def capture(self, args: Sequence[str]) -> tuple[int, str, str]:
        """Run a command; return its exit code and what it printed, on stdout and stderr.

        Raises:
            Stopped: If `stop` was called.
        """
        options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with self._started(args, {"PYTHONIOENCODING": "utf-8"}, options) as process:
            out, errors = process.communicate()
            return process.returncode, out.decode(), errors.decode(errors="replace")

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
        for process in running:
            _signal(process, signal.SIGTERM)
        end = time.monotonic() + _SECONDS_TO_END
        for process in running:
            try:
                process.wait(timeout=max(0.0, end - time.monotonic()))
            except subprocess.TimeoutExpired:
                _signal(process, _SIGKILL)

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
        finally:
            # Of a run on several devices, others may wait forever for the one that died; or, where Ray interrupts this
            # thread, the process itself has not ended.
            _signal(process, _SIGKILL)
            process.wait()
            with self._lock:
                self._running.discard(process)
        if self._stopped.is_set():
            raise Stopped


def tail(log: Path, lines: int = 20) -> str:
    """The last lines of a log."""
    if not log.is_file():
        return ""
    text = log.read_bytes()[-20_000:].decode("utf-8", errors="replace")
    return "\n".join(text.replace("\r", "\n").rstrip().splitlines()[-lines:])


def _importable() -> dict[str, str]:
    """What this process can import, its processes can: the user's own modules among it."""
    return {"PYTHONPATH": os.pathsep.join(dict.fromkeys(path or os.getcwd() for path in sys.path))}


def _signal(process: subprocess.Popen[bytes], number: int) -> None:
    try:
        if sys.platform == "win32":
            process.terminate()
        else:
            os.killpg(process.pid, number)
    except ProcessLookupError:
        pass
