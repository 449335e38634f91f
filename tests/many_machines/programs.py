"""Programs that run side by side and leave no process behind."""

import os
import signal
import subprocess
import threading
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import pytest

MARK = "ZNORM_TEST_PROGRAMS"


class Programs:
    """Programs that start together; when the ``with`` block ends, they and all their processes are killed.

    All of these processes write into one pipe: the output ends when the last of them ends.

    Args:
        commands: Each program and its arguments.
        environments: Variables to add to the environment of each program.
        cwd: Working directory of all programs.
    """

    def __init__(self, commands: Sequence[Sequence[str]], environments: Sequence[Mapping[str, str]], cwd: Path) -> None:
        self._mark = uuid.uuid4().hex
        self._output: list[str] = []
        read, write = os.pipe()
        self._reader = threading.Thread(target=self._read, args=(read,), daemon=True)
        self._reader.start()
        self.processes: list[subprocess.Popen[bytes]] = []
        try:
            for command, environment in zip(commands, environments, strict=True):
                self.processes.append(
                    subprocess.Popen(
                        list(command),
                        cwd=cwd,
                        env={**os.environ, "OMP_NUM_THREADS": "1", **environment, MARK: self._mark},
                        stdin=subprocess.DEVNULL,
                        stdout=write,
                        stderr=write,
                        start_new_session=True,
                    )
                )
        except BaseException:
            self.kill()
            raise
        finally:
            os.close(write)

    def __enter__(self) -> "Programs":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.kill()

    def end(self, timeout: float) -> str:
        """Wait until all processes are gone, and return their output; after ``timeout`` seconds the test fails."""
        self._reader.join(timeout)
        if self._reader.is_alive():
            self.kill()
            self._reader.join()
            pytest.fail(f"still running after {timeout} s:\n{''.join(self._output)}")
        for process in self.processes:
            process.wait(timeout)
        return "".join(self._output)

    @property
    def running(self) -> bool:
        """Whether any of the processes still runs."""
        return self._reader.is_alive()

    @property
    def returncodes(self) -> list[int | None]:
        """The programs' exit statuses; None for a program that still runs."""
        return [process.poll() for process in self.processes]

    def kill(self) -> None:
        """Kill all processes by a mark in their environment, also those in other sessions, such as torchrun's."""
        for process in self.processes:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        mark = f"{MARK}={self._mark}".encode()
        for entry in Path("/proc").glob("[0-9]*"):
            try:
                if mark in (entry / "environ").read_bytes().split(b"\0"):
                    os.kill(int(entry.name), signal.SIGKILL)
            except OSError:  # the process is gone, or another user's
                continue

    def _read(self, pipe: int) -> None:
        with os.fdopen(pipe, errors="replace") as lines:
            for line in lines:
                self._output.append(line)
