"""Which checkpoint a run's test is of: the best one, on whatever way the run got there."""

import csv
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from forked import fork_processes
from lightning.pytorch import Trainer
from study_module import ScriptedModule, StudyData

from lightning_znorm import compare
from lightning_znorm.cli import main
from lightning_znorm.compare.files import read_json
from lightning_znorm.compare.study import StudyError
from tests.processes import run_forked

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="processes are forked"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"),
]

SCORES = [0.3, 0.9, 0.5, 0.4]  # best in the second epoch of four


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        fork_processes(patch)
        yield patch


@pytest.fixture(scope="module", autouse=True)
def folder(tmp_path_factory, patch) -> Path:
    """Of a study in one go."""
    folder = tmp_path_factory.mktemp("study")
    patch.chdir(folder)
    write_experiment()
    study()
    return folder


@pytest.fixture(autouse=True)
def _here(folder, monkeypatch):
    monkeypatch.chdir(folder)


def write_experiment(**settings: object) -> None:
    checkpoint = {"class_path": "ModelCheckpoint", "init_args": {"monitor": "val/score", "mode": "max"}}
    experiment = {
        "model": {"class_path": "study_module.ScriptedModule", "init_args": {"scores": SCORES, **settings}},
        "data": {"class_path": "study_module.StudyData"},
        "trainer": {"accelerator": "cpu", "max_epochs": 4, "log_every_n_steps": 2, "callbacks+": [checkpoint]},
    }
    Path("exp.yaml").write_text(yaml.safe_dump(experiment))
    Path("baseline.yaml").write_text("trainer: {}")


def study(**options: object) -> compare.Table:
    return compare.run("exp.yaml", ["baseline.yaml"], seeds=[5], output="out", **options)


def by_hand(checkpoint: Path) -> dict[str, float]:
    module = ScriptedModule(SCORES)
    module.load_state_dict(torch.load(checkpoint, weights_only=True)["state_dict"])
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False)
    metrics = trainer.test(module, StudyData(), verbose=False)[0]
    # Validation logs this name too.
    return {name.replace("seen", "test/seen"): value for name, value in metrics.items()}


def check_the_best_was_tested() -> None:
    """Of a study: its table's number is that of the best checkpoint, and everything says so."""
    run = Path("out/runs/baseline-5").absolute()
    best, last = (by_hand(run / "checkpoints" / f"{name}.ckpt") for name in ("best", "last"))
    assert (best["test/score"], last["test/score"]) == (2, 4)  # epochs that the weights have had
    assert best["test/loss"] != last["test/loss"]
    table = study()
    assert {metric: table.row("baseline", metric).values[0] for metric in best} == best
    assert json.loads((run / "test.json").read_text()) == {
        "checkpoint": {
            "path": "checkpoints/best.ckpt",
            "epoch": 1,
            "monitor": "val/score",
            "value": pytest.approx(0.9),
        },
        "metrics": best,
    }
    with Path("out/results.csv").open() as file:
        tested = [row for row in csv.DictReader(file) if row["metric"].startswith("test/")]
    assert {row["metric"]: (row["epoch"], float(row["value"])) for row in tested} == {
        metric: ("1", value) for metric, value in best.items()
    }
    report = Path("out/report.md").read_text()
    assert "| baseline | 5 | 2 | 4 | 0.9 |" in report
    assert "### `test/seen`, at the best checkpoint" in report
    assert "### `seen`, of the last epoch" in report
    assert table.row("baseline", "seen").values == (pytest.approx(SCORES[-1]),)


def test_in_one_go():
    check_the_best_was_tested()


def test_best_checkpoint_that_is_missing():
    run = Path("out/runs/baseline-5")
    (run / "test.json").unlink()
    best = run / "checkpoints/best.ckpt"
    best.rename("kept.ckpt")
    (failed,) = study().failures  # and not the last one in its place
    assert failed.error.startswith("test ended with exit code 1")
    assert f"Checkpoint file not found: {best.absolute()}" in failed.error
    assert not (run / "test.json").exists()
    Path("kept.ckpt").rename(best)
    study()
    check_the_best_was_tested()


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    """What results are of, and when it was written."""
    paths = [folder / "fit.json", folder / "test.json", *(folder / "checkpoints").iterdir()]
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in paths}


def test_a_test_by_hand_is_the_same():
    run = Path("out/runs/baseline-5").absolute()
    before = contents(run)["test.json"]
    command = ["test", "--config", str(run / "run.yaml"), "--ckpt_path", "out/runs/baseline-5/checkpoints/best.ckpt"]
    assert run_forked(command, Path("log")) == 0
    after = contents(run)["test.json"]
    assert after[0] == before[0]
    assert after[1] > before[1]
    check_the_best_was_tested()


def other_settings() -> Path:
    """All settings of the run except one, in a file of their own."""
    settings = yaml.safe_load(Path("out/runs/baseline-5/run.yaml").read_text())
    settings["trainer"]["log_every_n_steps"] = 1
    Path("other.yaml").write_text(yaml.safe_dump(settings))
    return Path("other.yaml")


OTHERWISE = {
    "flag": lambda run: ["--config", str(run / "run.yaml"), "--data.init_args.batch_size", "4"],
    "file": lambda run: ["--config", str(other_settings())],
    "checkpoint": lambda run: ["--config", str(run / "run.yaml"), "--ckpt_path", "elsewhere/best.ckpt"],
}
LAST = {"last": lambda run: ["--config", str(run / "run.yaml"), "--ckpt_path", str(run / "checkpoints/last.ckpt")]}


@pytest.mark.parametrize(
    ("command", "given"),
    [
        pytest.param(
            command, given, id=f"{command}-{name}", marks=[] if (command, name) == ("fit", "flag") else pytest.mark.full
        )
        for command, ways in [("fit", OTHERWISE), ("test", OTHERWISE | LAST)]
        for name, given in ways.items()
    ],
)
def test_other_settings_by_hand_leave_a_study_alone(command, given):
    run = Path("out/runs/baseline-5").absolute()
    Path("elsewhere").mkdir(exist_ok=True)
    shutil.copy(run / "checkpoints/last.ckpt", "elsewhere/best.ckpt")
    before = contents(run)
    log = Path("by_hand.txt")
    log.unlink(missing_ok=True)
    args = given(run)
    best = [] if command == "fit" or "--ckpt_path" in args else ["--ckpt_path", str(run / "checkpoints/best.ckpt")]
    assert run_forked([command, *args, *best], log) == (1 if command == "fit" else 0), log.read_text()
    if command == "fit":
        assert log.read_text().rpartition("error: ")[2].startswith(f"{run} is a run of a study, and trains with the ")
        assert "Traceback" not in log.read_text()
    assert contents(run) == before
    study()
    check_the_best_was_tested()


def test_tests_of_other_checkpoints_are_refused():
    run = Path("out/runs/baseline-5")
    tested = read_json(run / "test.json")
    (run / "test.json").write_text(json.dumps(tested["metrics"]))  # as versions before 0.1.0 did
    with pytest.raises(StudyError, match=r"baseline-5 by a version that tested last checkpoints and called them best"):
        study()
    tested["checkpoint"]["path"] = str(run / "checkpoints/last.ckpt")
    (run / "test.json").write_text(json.dumps(tested))
    with pytest.raises(StudyError, match=r"than each run's best.ckpt: baseline-5 at .*last.ckpt. Delete the test.json"):
        study()
    (run / "test.json").unlink()
    study()
    check_the_best_was_tested()


@pytest.mark.full
def test_killed_and_resumed(tmp_path, monkeypatch):
    """After the best checkpoint is there."""
    monkeypatch.chdir(tmp_path)
    write_experiment(killed_in=3)
    (failed,) = study().failures
    assert failed.error.startswith("fit was ended by SIGKILL")
    study()
    check_the_best_was_tested()


@pytest.mark.full
@pytest.mark.parametrize("dies", [{"killed_in": 0}, {"killed_in": 1}], ids=["in the first epoch", "after one epoch"])
def test_begun_again_by_hand_and_killed(dies, tmp_path, monkeypatch):
    """The report names the command. What the former training left is not gone on from, nor tested."""
    monkeypatch.chdir(tmp_path)
    write_experiment(**dies)
    Path("killed").touch()  # so that it is not, yet
    study()
    Path("killed").unlink()
    assert run_forked(["fit", "--config", "out/runs/baseline-5/run.yaml"], Path("log")) == -signal.SIGKILL
    study()
    assert [path.name for path in Path("out/runs/baseline-5/checkpoints").glob("last*")] == ["last.ckpt"]
    check_the_best_was_tested()


@pytest.mark.full
def test_by_the_line_of_a_dry_run(tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    write_experiment()
    options = {"--config": "exp.yaml", "--methods": "baseline.yaml", "--seeds": "5", "--output": "out"}
    main(["compare", *itertools.chain(*options.items()), "--dry-run"])
    (line,) = capfd.readouterr().out.splitlines()
    paths = os.pathsep.join(filter(None, sys.path))
    subprocess.run(["sh", "-c", line], env={**os.environ, "PYTHONPATH": paths}, check=True, timeout=200)
    check_the_best_was_tested()


@pytest.mark.full
@pytest.mark.parametrize("interval", [1.0, 0.5], ids=["at its end", "in its midst"])
def test_killed_when_training_was_over(interval, tmp_path, monkeypatch):
    """EarlyStopping had ended it: it does not go on."""
    monkeypatch.chdir(tmp_path)
    write_experiment()
    settings = yaml.safe_load(Path("exp.yaml").read_text())
    stopping = {"monitor": "val/score", "mode": "max", "patience": 1, "check_on_train_epoch_end": interval == 1.0}
    settings["trainer"]["callbacks+"] += [{"class_path": "EarlyStopping", "init_args": stopping}]
    settings["trainer"]["val_check_interval"] = interval
    Path("exp.yaml").write_text(yaml.safe_dump(settings))
    study()
    run = Path("out/runs/baseline-5")
    before, results = read_json(run / "fit.json"), Path("out/results.csv").read_text()
    assert before["epochs"] == (3 if interval == 1.0 else 1)
    for name in ("fit.json", "test.json"):
        (run / name).unlink()
    study()
    assert read_json(run / "fit.json") == before
    assert Path("out/results.csv").read_text() == results


def logged(folder: Path) -> dict[tuple[str, str], str]:
    """What a study's experiment logged, of each metric and epoch; times are other ones each time."""
    with (folder / "out/results.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if "seconds" not in row["metric"]]
    return {(row["metric"], row["epoch"]): row["value"] for row in rows}


@pytest.mark.full
@pytest.mark.parametrize(
    ("name", "resumed"),
    [("checkpoints/last.ckpt", "best.ckpt"), ("fit.json", "last.ckpt"), ("logs/version_0/metrics.csv", "")],
)
def test_damaged_and_done_again(name, resumed, folder, tmp_path, monkeypatch):
    """Of a run that was killed, or is done: it ends with the numbers of a run in one go."""
    monkeypatch.chdir(tmp_path)
    write_experiment(killed_in=3)
    if name != "checkpoints/last.ckpt":
        Path("killed").touch()  # so that it is not
    study()
    run = Path("out/runs/baseline-5")
    content = (run / name).read_bytes()
    (run / name).write_bytes(content[: len(content) // 2])
    assert study().failures == ()
    check_the_best_was_tested()
    assert logged(tmp_path) == logged(folder)
    attempts = [read_json(path)["step"] for path in sorted(run.glob("logs/version_*/attempt.json"))]
    assert attempts == ([0, 12] if resumed == "best.ckpt" else [0])  # none of one that has nothing left to train
    assert (run / "damaged-1/logs").exists() is (not resumed)
    assert (run / "damaged-1" / name).read_bytes() == content[: len(content) // 2]
