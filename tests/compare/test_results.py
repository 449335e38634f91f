"""Joining the logs of several attempts at a run."""

import json
import math

import pytest

from lightning_znorm.compare.results import Evaluation, Measurement, last_counts, read_run, read_test, write_results
from lightning_znorm.compare.study import Run, Study


def run(folder) -> Run:
    return Run("znorm", 3, folder)


def attempt(folder, version: int, start: int | None, text: str) -> None:
    logs = folder / "logs" / f"version_{version}"
    logs.mkdir(parents=True)
    (logs / "metrics.csv").write_bytes(text.replace("\n", "\r\n").encode())
    if start is not None:
        (logs / "attempt.json").write_text(json.dumps({"step": start}))


def values(found: list[Measurement]) -> dict[tuple[int, str], float]:
    return {(measurement.epoch, measurement.metric): measurement.value for measurement in found}


def test_attempts_are_joined(tmp_path):
    header = "epoch,step,train/loss,val/accuracy\n"
    attempt(tmp_path, 0, 0, f"{header}0,4,1.0,\n0,9,,0.5\n1,14,0.9,\n")  # died in epoch 1
    attempt(tmp_path, 2, 10, f"{header}1,14,0.8,\n1,19,,0.6\n2,24,0.7,\n2,29,,0.55\n")
    attempt(tmp_path, 10, 30, f"{header}3,39,,0.7\n")  # the tenth comes after the second
    attempt(tmp_path, 1, None, f"{header}0,0,99,99\n")  # a test
    assert values(read_run(run(tmp_path))) == {
        (0, "train/loss"): 1.0,
        (0, "val/accuracy"): 0.5,
        (1, "train/loss"): 0.8,
        (1, "val/accuracy"): 0.6,
        (2, "train/loss"): 0.7,
        (2, "val/accuracy"): 0.55,
        (3, "val/accuracy"): 0.7,
    }


def test_attempt_that_began_anew(tmp_path):
    attempt(tmp_path, 0, 0, "epoch,step,train/loss\n0,4,1.0\n0,9,2.0\n")  # died before the first checkpoint
    attempt(tmp_path, 1, 0, "epoch,step,train/loss\n0,4,1.5\n")
    assert values(read_run(run(tmp_path))) == {(0, "train/loss"): 1.5}


def test_half_a_line(tmp_path):
    attempt(tmp_path, 0, 0, "epoch,step,train/loss\n0,4,1.0\n1,9,1.2")  # of 1.25
    assert values(read_run(run(tmp_path))) == {(0, "train/loss"): 1.0}


def test_several_values_in_an_epoch(tmp_path):
    attempt(tmp_path, 0, 0, "epoch,step,train/loss,val/loss\n0,4,1.0,3.0\n0,9,2.0,5.0\n1,14,4.0,\n")
    found = read_run(run(tmp_path))
    assert values(found) == {(0, "train/loss"): 1.5, (0, "val/loss"): 5.0, (1, "train/loss"): 4.0}
    assert {(one.epoch, one.metric): one.count for one in found} == {
        (0, "train/loss"): 2,
        (0, "val/loss"): 1,  # the last one
        (1, "train/loss"): 1,
    }
    assert last_counts(found, "train/loss") == {"znorm": {3: 1}}
    assert last_counts(found[:2], "train/loss") == {"znorm": {3: 2}}


def test_values_of_a_run_that_diverged(tmp_path):
    rows = "0,4,inf,1e308\n0,9,-inf,1e308\n"
    attempt(tmp_path, 0, 0, f"epoch,step,train/loss,train/error\n{rows}")
    found = values(read_run(run(tmp_path)))
    assert math.isnan(found[0, "train/loss"])
    assert found[0, "train/error"] == 1e308


def test_a_test_has_the_epoch_of_the_checkpoint_that_was_tested(tmp_path):
    """The one that the test wrote down, not the one that looks best in the logs."""
    attempt(tmp_path, 0, 0, "epoch,step,val/accuracy\n0,4,0.7\n1,9,0.9\n2,14,0.8\n")
    tested = {"path": "best.ckpt", "epoch": 0, "monitor": "val/accuracy", "value": 0.7}
    (tmp_path / "test.json").write_text(json.dumps({"checkpoint": tested, "metrics": {"test/accuracy": 0.75}}))
    found = values(read_run(run(tmp_path)))
    assert found[0, "test/accuracy"] == 0.75
    assert len(found) == 4
    assert read_test(run(tmp_path)) == Evaluation({"test/accuracy": 0.75}, "best.ckpt", 0, "val/accuracy", 0.7)


@pytest.mark.parametrize(
    "text", ['{"test/accuracy": 0.75}', '{"checkpoint": null, "metrics": {"test/accuracy": 0.75}}']
)
def test_a_test_of_nobody_knows_what_is_none(tmp_path, text):
    attempt(tmp_path, 0, 0, "epoch,step,val/accuracy\n0,4,0.7\n")
    (tmp_path / "test.json").write_text(text)
    assert read_test(run(tmp_path)) is None
    assert values(read_run(run(tmp_path))) == {(0, "val/accuracy"): 0.7}


def test_tidy(tmp_path):
    study = Study(("exp.yaml",), ("znorm.yaml",), (3,), tmp_path)
    write_results(tmp_path / "results.csv", [Measurement("znorm-3", 3, "znorm", 0, "val/loss", 0.1)], study)
    assert (
        tmp_path / "results.csv"
    ).read_text() == "run,seed,method,epoch,metric,value,count\nznorm-3,3,znorm,0,val/loss,0.1,1\n"


def test_tidy_sweep(tmp_path):
    sweep = (("model.lr", ("0.1", "1")), ("data.name", ("a", "b,c")))
    study = Study(("exp.yaml",), ("znorm.yaml",), (3,), tmp_path, sweep=sweep)
    name = list(study.arms)[3]
    write_results(tmp_path / "results.csv", [Measurement(f"{name}-3", 3, name, 0, "val/loss", 0.1)], study)
    assert (tmp_path / "results.csv").read_text() == (
        f'run,seed,method,epoch,metric,value,count,model.lr,data.name\n{name}-3,3,znorm,0,val/loss,0.1,1,1,"b,c"\n'
    )
