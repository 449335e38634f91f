"""Run Python programs from tests, without leaving a process behind."""

import os
import signal
import subprocess
import sys
import traceback
import warnings
from collections.abc import Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
import torch

from lightning_znorm.compare.forks import autograd_works_in_copies

ROOT = str(Path(__file__).parents[1])


def run_python(
    *arguments: str | Path, timeout: float, cwd: Path | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    """Run ``python ARGUMENTS``, and return when it and all processes that it has started are gone.

    The output ends when the last process that can write to it ends. After ``timeout`` seconds all of them are killed,
    and the test fails. Each process computes with one thread and finds the package ``tests``, in any folder; ``env``
    adds to the environment, or changes it.
    """
    command = [sys.executable, *map(str, arguments)]
    process = subprocess.Popen(
        command,
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": ROOT, **env},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        pytest.fail(f"still running after {timeout} s: {' '.join(command)}\n{process.communicate()[0]}")
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    return subprocess.CompletedProcess(command, process.returncode, output)


def start_autograd() -> None:
    """Let autograd look for devices: at its first backward pass, and for good.

    It starts a thread for each, and does not work in forks after that. So it must not take a GPU that a test has
    pretended for one.
    """
    torch.ones((), requires_grad=True).backward()


def run_forked(arguments: Sequence[str], log: Path) -> int:
    """Run ``python -m lightning_znorm ARGUMENTS`` in a fork of this process, which need not import anything.

    Return its exit code, or the negative number of the signal that ended it. Its output is appended to ``log``. On a
    machine with a GPU, a fork of a process that has computed gradients cannot, so a new process runs.
    """
    from lightning_znorm.cli import main

    log.parent.mkdir(parents=True, exist_ok=True)
    if not autograd_works_in_copies():
        result = run_python("-m", "lightning_znorm", *arguments, timeout=600)
        with log.open("a") as output:
            output.write(result.stdout)
        return result.returncode
    if process := os.fork():
        try:
            return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        except BaseException:  # such as pytest's timeout of the test
            os.kill(process, signal.SIGKILL)
            os.waitpid(process, 0)
            raise
    code = 1
    try:
        os.setsid()  # so that a signal to its process group does not reach this process
        with log.open("a") as output, redirect_stdout(output), redirect_stderr(output):
            warnings.simplefilter("ignore")
            # OpenMP's threads do not exist after a fork, and a wait for them would never end. Lightning's strategies of
            # several processes set their number too, unless the variable is set.
            os.environ["OMP_NUM_THREADS"] = "1"
            torch.set_num_threads(1)
            try:
                main(list(arguments))
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else int(end.code is not None)
                if code:
                    print(end.code)
            except BaseException:
                traceback.print_exc()
    finally:
        os._exit(code)
