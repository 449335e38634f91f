"""Runs Python programs from tests, so that nothing of them is left behind."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = str(Path(__file__).parents[1])


def run_python(
    *arguments: str | Path, timeout: float, cwd: Path | None = None, **env: str
) -> subprocess.CompletedProcess[str]:
    """Runs ``python ARGUMENTS``, and returns once it and all processes that it has started are gone.

    The output ends when the last process that can write to it does. After ``timeout`` seconds all of them are killed,
    and the test fails. Each computes with one thread and finds package ``tests``, wherever it is started; ``env`` is
    laid over the environment.
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
