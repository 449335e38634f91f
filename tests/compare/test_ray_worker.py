"""What a Ray worker does, and what is said of one that is lost; without Ray."""

import os
import signal
import subprocess
import sys
import time
from concurrent.futures import Future
from contextlib import suppress
from pathlib import Path

import pytest
from alive import is_alive

from lightning_znorm.compare import engines
from lightning_znorm.compare.study import Outcome, Run

WORKER = """
import sys
from pathlib import Path
from lightning_znorm.compare.engines import LeashedProcesses

sys.executable = sys.argv[1]
LeashedProcesses().run(["fit"], Path(sys.argv[2]))
"""


@pytest.fixture
def worker(tmp_path):
    """Starts a process that runs a shell script, in place of `fit`, as a Ray worker does; with the script's ids."""
    started: list[subprocess.Popen[bytes]] = []
    groups: list[int] = []

    def start(script: str) -> tuple["subprocess.Popen[bytes]", list[int]]:
        stand_in, pids = tmp_path / "python", tmp_path / "pids"
        stand_in.write_text(f'#!/bin/sh\n[ "$1" = -m ] || exec "{sys.executable}" "$@"\n{script}\n')
        stand_in.chmod(0o755)
        process = subprocess.Popen([sys.executable, "-c", WORKER, stand_in, tmp_path / "log.txt"])
        started.append(process)
        wait_for(lambda: pids.is_file() and pids.read_text().endswith("\n"))
        groups.append(int(pids.read_text().split()[0]))
        return process, [int(pid) for pid in pids.read_text().split()]

    yield start
    for process in started:
        process.kill()
        process.wait()
    for group in groups:
        with suppress(ProcessLookupError):
            os.killpg(group, signal.SIGKILL)


def wait_for(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "nothing happens"
        time.sleep(0.01)


@pytest.mark.skipif(sys.platform == "win32", reason="the stand-in for Python is a shell script")
class TestLeash:
    def test_what_a_worker_has_started_dies_with_it(self, worker, tmp_path):
        """Also what that has started in turn, and what ignores all signals that it can."""
        script = f"trap '' TERM HUP INT PIPE; sleep 300 & echo $$ $! > {tmp_path}/pids; wait; sleep 300"
        process, pids = worker(script)
        wait_for(lambda: watches(pids[0]))
        process.send_signal(signal.SIGKILL)
        wait_for(lambda: not any(map(is_alive, pids)), 10)
        wait_for(lambda: not watches(pids[0]), 10)

    def test_nothing_watches_on_once_the_run_has_ended(self, worker, tmp_path):
        process, pids = worker(f"echo $$ > {tmp_path}/pids; while [ ! -e {tmp_path}/end ]; do sleep 0.05; done; exit 3")
        wait_for(lambda: watches(pids[0]))
        (tmp_path / "end").touch()
        assert process.wait(60) == 0
        assert not watches(pids[0])


def watches(group: int) -> list[str]:
    """Command lines of processes that would kill a group."""
    listed = subprocess.run(["ps", "-axww", "-o", "args="], capture_output=True, text=True, check=True).stdout
    return [line for line in listed.splitlines() if "killpg" in line and line.endswith(f" {group}")]


class RayTaskError(Exception):
    """As Ray makes it of what was raised in a worker."""

    def __init__(self, cause: Exception) -> None:
        super().__init__("a traceback of another machine\n" * 30)
        self.cause = cause


def ray_error(name: str, base: type[Exception] = Exception) -> Exception:
    """An error of a class of this name, as Ray has them."""
    return type(name, (base,), {})("Check python-core-worker-*.log files for more information.")


@pytest.mark.parametrize(
    ("error", "words"),
    [
        (
            ray_error("WorkerCrashedError"),
            "The Ray worker of this run died, so the run was ended, too",
        ),
        (ray_error("OutOfMemoryError"), "Ray ended this run, because its machine was about to run out of memory"),
        (ray_error("NodeDiedError"), "The machine of this run has left the Ray cluster, or cannot be reached."),
        (ray_error("LocalRayletDiedError"), "Ray has ended on the machine of this run."),
        (ray_error("TaskCancelledError"), "This run was cancelled in Ray."),
        (ray_error("Newer", type(ray_error("NodeDiedError"))), "The machine of this run has left the Ray cluster"),
        (
            RayTaskError(OSError(28, "No space left on device")),
            "The Ray worker of this run failed: OSError: [Errno 28]",
        ),
        (RayTaskError(ModuleNotFoundError("No module named 'x'")), "failed: ModuleNotFoundError: No module named 'x'"),
        (ray_error("UnheardOfError"), "The Ray worker of this run was lost: UnheardOfError: Check"),
    ],
)
def test_a_lost_run_is_explained_in_plain_words(error, words):
    done: Future[Outcome] = Future()
    future: Future[Outcome] = Future()
    done.add_done_callback(lambda ended: engines.copy_result(ended, future))
    done.set_exception(error)
    with pytest.raises(engines.LostError) as found:
        future.result(timeout=0)
    assert words in str(found.value)
    assert "\n" not in str(found.value)


def test_an_outcome_is_handed_on():
    outcome = Outcome(Run("a", 0, Path()), seconds=3.0)
    done: Future[Outcome] = Future()
    future: Future[Outcome] = Future()
    done.add_done_callback(lambda ended: engines.copy_result(ended, future))
    done.set_result(outcome)
    assert future.result(timeout=0) is outcome


def test_a_cancelled_future_leaves_nobody_waiting():
    done: Future[Outcome] = Future()
    future: Future[Outcome] = Future()
    done.add_done_callback(lambda ended: engines.copy_result(ended, future))
    assert done.cancel()
    with pytest.raises(engines.LostError, match="cancelled"):
        future.result(timeout=0)
