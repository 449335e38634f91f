"""The command line, killed or terminated: a few of the cases of `benchmarks`, which count many random ones."""

import csv
import signal
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.cli_interruptions import same
from benchmarks.terminations import Training, completed
from tests.processes import run_forked, run_python

pytestmark = [
    pytest.mark.full,
    pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc"),
]


@pytest.mark.parametrize("processes", ["1", "2"])
def test_killed_and_resumed(processes):
    arguments = ("-m", "benchmarks.cli_interruptions", "--kills", "1", "--seed", "3", "--processes", processes)
    process = run_python(*arguments, timeout=280, cwd=Path(__file__).parents[1])
    assert process.returncode == 0, process.stdout
    assert "1 of 1 command lines that were killed went on exactly" in process.stdout
    assert process.stdout.count("the same bits") == 1


KILL = """
trainer:
  callbacks+:
    - {{class_path: benchmarks.kills.Kill, init_args: {{batch: {batch}, rank: 0}}}}
"""


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_killed_after_an_epoch_that_did_not_improve(tmp_path, monkeypatch):
    """An experiment as it is shipped resumes from the last epoch, not from the best, to the same bits."""
    monkeypatch.chdir(tmp_path)
    command = ["fit", "--config", "configs/digits/resnet20.yaml", "--config", "configs/methods/znorm.yaml"]
    options = {"max_epochs": 4, "limit_train_batches": 3, "limit_val_batches": 1, "accelerator": "cpu"}
    command += [f"--trainer.{name}={value}" for name, value in options.items()]
    command += ["--model.init_args.optimizer.init_args.lr=0.05", "--trainer.logger.init_args.version"]

    assert run_forked([*command, "whole"], Path("log")) == 0, Path("log").read_text()
    whole, killed = (Path("logs/digits-resnet20", name) for name in ("whole", "killed"))
    with (whole / "metrics.csv").open() as file:
        scores = [float(row["val/accuracy"]) for row in csv.DictReader(file) if row["val/accuracy"]]
    epoch = next(epoch for epoch in (1, 2) if scores[epoch] <= max(scores[:epoch]))

    Path("kill.yaml").write_text(KILL.format(batch=3 * (epoch + 1) + 1))  # in the next epoch
    assert run_forked([*command, "killed", "--config", "kill.yaml"], Path("log")) == -signal.SIGKILL
    last, best = (torch.load(killed / f"checkpoints/{name}.ckpt")["epoch"] for name in ("last", "best"))
    assert (last, best) == (epoch, scores.index(max(scores[:epoch])))
    assert run_forked([*command, "killed", "--ckpt_path", "last"], Path("log")) == 0, Path("log").read_text()
    weights = [torch.load(run / "checkpoints/last.ckpt") for run in (whole, killed)]
    for name in ("epoch", "global_step", "state_dict", "optimizer_states"):
        assert same(weights[0][name], weights[1][name])
    with (killed / "metrics.csv").open() as file:  # no epoch was repeated
        assert {row["epoch"] for row in csv.DictReader(file)} == {str(number) for number in range(epoch + 1, 4)}


TERMINATE = """
trainer:
  callbacks+:
    - {class_path: benchmarks.kills.Terminate, init_args: {batch: 13}}
"""


def test_told_to_end_at_the_same_moment(tmp_path):
    """If the processes are at different lines, they may wait for each other: docs/reference/resuming.md."""
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
    assert checkpoint["global_step"] == 14  # the current step is completed
    assert [state is None for state in checkpoint["random_states"]] == [False, True]
    resumed = completed("torchrun", run, "--ckpt_path", "saved/last.ckpt")
    assert same(resumed, completed("torchrun", tmp_path / "whole"))
    assert "The checkpoint holds the random numbers of 1 processes, and 2 go on" in training.log()
