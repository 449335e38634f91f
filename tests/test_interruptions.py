"""Killed trainings resume exactly: a few of the kills of `benchmarks.interruptions`."""

import sys
from pathlib import Path

import pytest

from tests.processes import run_python


@pytest.mark.skipif(sys.platform == "win32", reason="forks")
@pytest.mark.full
def test_killed_and_resumed():
    arguments = ("-m", "benchmarks.interruptions", "--kills", "4", "--saves", "2", "--seed", "3")
    process = run_python(*arguments, timeout=280, cwd=Path(__file__).parents[1])
    assert process.returncode == 0, process.stdout
    assert "4 of 4 trainings that were killed in a batch went on exactly" in process.stdout
    assert "2 of 2 trainings that were killed while they saved went on exactly" in process.stdout
    assert process.stdout.count("the same bits") == 4
