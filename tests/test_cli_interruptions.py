"""The command line, killed and told to end: a few of the cases of `benchmarks`, which count many at random."""

import sys
from pathlib import Path

import pytest
import torch

from benchmarks.cli_interruptions import same
from benchmarks.terminations import Training, completed
from tests.processes import run_python

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")


@pytest.mark.parametrize("processes", ["1", "2"])
def test_killed_and_resumed(processes):
    arguments = ("-m", "benchmarks.cli_interruptions", "--kills", "1", "--seed", "3", "--processes", processes)
    process = run_python(*arguments, timeout=280, cwd=Path(__file__).parents[1])
    assert process.returncode == 0, process.stdout
    assert "1 of 1 command lines that were killed went on exactly" in process.stdout
    assert process.stdout.count("the same bits") == 1


TERMINATE = """
trainer:
  callbacks+:
    - {class_path: benchmarks.kills.Terminate, init_args: {batch: 13}}
"""


def test_told_to_end_at_the_same_moment(tmp_path):
    """Where the processes are not at the same line, Lightning's may wait for each other: docs/reliability.md."""
    run = tmp_path / "terminated"
    run.mkdir()
    (run / "terminate.yaml").write_text(TERMINATE)
    training = Training("torchrun", run, "--config", "terminate.yaml")
    try:
        assert training.ended(150), training.log()
        assert training.process.returncode == 0, training.log()
    finally:
        training.kill()
    checkpoint = torch.load(run / "saved" / "last.ckpt")
    assert checkpoint["global_step"] == 14  # the step in hand is taken to its end
    assert [state is None for state in checkpoint["random_states"]] == [False, True]
    resumed = completed("torchrun", run, "--ckpt_path", "saved/last.ckpt")
    assert same(resumed, completed("torchrun", tmp_path / "whole"))
    assert "The checkpoint holds the random numbers of 1 processes, and 2 go on" in training.log()
