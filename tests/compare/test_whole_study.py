"""One study from its command line: with a run and the study itself killed, a method that fails, and what is found."""

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from alive import processes_of

from lightning_znorm import compare
from lightning_znorm.cli import main
from lightning_znorm.compare.processes import Processes
from lightning_znorm.compare.study import StudyError
from tests.compare.captured import capture_here

pytestmark = pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty")

EXPERIMENT = {
    "model": {"class_path": "study_module.StudyModule", "init_args": {"seconds_per_batch": 0.1}},
    "data": {"class_path": "study_module.StudyData"},
    "trainer": {
        "accelerator": "cpu",
        "max_epochs": 4,
        "log_every_n_steps": 2,
        "logger": False,
        "callbacks+": [{"class_path": "ModelCheckpoint", "init_args": {"monitor": "val/accuracy", "mode": "max"}}],
    },
}
METHODS = ("baseline", "noisy", "crash")
RUNS = [f"{method}-{seed}" for seed in (0, 1) for method in METHODS]


def wait_for(condition, process: subprocess.Popen, seconds: float = 600) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert process.poll() is None, Path("study.log").read_text()
        assert time.monotonic() < end, Path("study.log").read_text()
        time.sleep(0.01)


def epoch_of(folder: Path) -> int:
    """How many epochs a run has behind it."""
    path = folder / "progress.json"
    return json.loads(path.read_text())["epoch"] if path.exists() else -1


def read_csv(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(Processes, "capture", capture_here)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Iterator[Path]:
    before, path = Path.cwd(), tmp_path_factory.mktemp("study")
    os.chdir(path)
    for name, callback in (("noisy", "study_module.NoisyGradients"), ("crash", "study_module.Crash")):
        Path("methods").mkdir(exist_ok=True)
        Path(f"methods/{name}.yaml").write_text(yaml.safe_dump({"trainer": {"callbacks+": [{"class_path": callback}]}}))
    Path("exp.yaml").write_text(yaml.safe_dump(EXPERIMENT))
    yield path
    os.chdir(before)


@pytest.fixture(scope="module")
def command() -> list[str]:
    methods = ["configs/methods/baseline.yaml", "methods/noisy.yaml", "methods/crash.yaml"]
    return [
        "compare",
        "--config",
        "exp.yaml",
        "--methods",
        *methods,
        "--seeds",
        "0",
        "1",
        "--output",
        "out",
        "--jobs",
        "2",
    ]


@pytest.fixture(scope="module")
def study(folder, command) -> Iterator[SimpleNamespace]:
    """The study, after a run of it was killed, and then the study itself."""
    runs = folder / "out" / "runs"
    paths = os.pathsep.join(filter(None, (str(Path(__file__).parent), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    seen = SimpleNamespace(output=folder / "out", runs=runs)

    with Path("study.log").open("w") as log:
        words = [sys.executable, "-m", "lightning_znorm", *command]
        process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT, env=environment)
    try:
        wait_for(lambda: epoch_of(runs / "baseline-0") >= 1, process)
        for pid in processes_of(runs / "baseline-0"):
            os.kill(pid, signal.SIGKILL)
        wait_for(lambda: (runs / "noisy-0" / "test.json").exists(), process)
        wait_for(lambda: epoch_of(runs / "baseline-1") >= 1, process)
        process.kill()
        process.wait()
        seen.finished = (runs / "noisy-0" / "test.json").stat().st_mtime_ns
        seen.orphans = processes_of(runs / "baseline-1")  # lives on; the next study waits for it

        text = io.StringIO()
        with pytest.MonkeyPatch.context() as patch, redirect_stdout(text), redirect_stderr(text):
            patch.setattr(Processes, "capture", capture_here)
            patch.setenv("OMP_NUM_THREADS", "1")
            with pytest.raises(SystemExit) as exit_info:
                main(command)
        seen.code = exit_info.value.code
        seen.log = Path("study.log").read_text() + text.getvalue()
    finally:
        process.kill()
        for name in RUNS:
            for pid in processes_of(runs / name):
                os.kill(pid, signal.SIGKILL)
    assert (seen.output / "results.csv").is_file(), f"{seen.code}\n{seen.log}"
    seen.results = read_csv(seen.output / "results.csv")
    seen.report = (seen.output / "report.md").read_text()
    yield seen
    shutil.rmtree(seen.output)


@pytest.mark.timeout(900)
@pytest.mark.full
class TestStudy:
    def test_killed_run_costs_that_run_only(self, study):
        assert re.search(r"baseline-0: failed", study.log)
        assert "fit was ended by SIGKILL" not in study.report  # it was done afterwards
        assert len(list((study.runs / "baseline-0" / "logs").rglob("attempt.json"))) >= 2

    def test_killed_study_goes_on(self, study):
        assert (study.runs / "noisy-0" / "test.json").stat().st_mtime_ns == study.finished
        done = {f"{name}-{seed}" for name in ("baseline", "noisy") for seed in (0, 1)}
        assert {row["run"] for row in study.results} == done

    def test_orphan_is_waited_for(self, study):
        assert study.orphans
        attempts = list((study.runs / "baseline-1" / "logs").rglob("attempt.json"))
        assert len(attempts) == 1  # nobody trained beside it

    def test_failed_runs_are_reported(self, study):
        assert study.code == 1
        assert "crash-0 failed: fit ended with exit code 1" in study.log
        for name in ("crash-0", "crash-1"):
            assert f"### {name}" in study.report
        assert "RuntimeError: the method broke" in study.report
        assert "4 of 6 runs are done" in study.report

    def test_interrupted_is_as_if_it_was_not(self, study, monkeypatch, tmp_path, capsys):
        """The interrupted run's numbers are those of `fit` with the same settings in one go."""
        config = yaml.safe_load((study.runs / "baseline-0" / "run.yaml").read_text())
        text = yaml.safe_dump(config).replace(str(study.runs / "baseline-0"), str(tmp_path))
        (tmp_path / "run.yaml").write_text(text.replace("seconds_per_batch: 0.1", "seconds_per_batch: 0.0"))
        main(["fit", "--config", str(tmp_path / "run.yaml")])
        (log,) = (tmp_path / "logs").rglob("metrics.csv")
        for metric in ("train/loss", "val/loss", "val/accuracy"):
            whole = [float(row[metric]) for row in read_csv(log) if row[metric]]
            ours = [
                float(row["value"]) for row in study.results if (row["run"], row["metric"]) == ("baseline-0", metric)
            ]
            assert ours == whole
            assert len(ours) == 4

    def test_same_seed_same_start(self, study):
        def written(run: str, name: str) -> str:
            found = [path for path in (study.runs / run / "logs").rglob(f"{name}.json") if "version" in str(path)]
            return min(found, key=lambda path: int(path.parent.name.rpartition("_")[2])).read_text()

        for name in ("weights", "batches-0", "batches-1", "batches-2", "batches-3"):
            for seed in (0, 1):
                if name == "weights":
                    assert written(f"baseline-{seed}", name) == written(f"crash-{seed}", name)
                assert written(f"baseline-{seed}", name) == written(f"noisy-{seed}", name)
            assert written("baseline-0", name) != written("baseline-1", name)

    def test_results_are_tidy(self, study):
        assert list(study.results[0]) == ["run", "seed", "method", "epoch", "metric", "value", "count"]
        found = {(row["run"], row["metric"], row["epoch"]) for row in study.results}
        assert len(found) == len(study.results)
        assert {("noisy-1", "train/loss", str(epoch)) for epoch in range(4)} <= found
        for run in ("baseline-0", "noisy-1"):
            test = json.loads((study.runs / run / "test.json").read_text())
            tested = test["metrics"]
            rows = {row["metric"]: row for row in study.results if row["run"] == run and row["metric"] in tested}
            assert {metric: float(row["value"]) for metric, row in rows.items()} == tested
            accuracies = {
                int(row["epoch"]): float(row["value"])
                for row in study.results
                if (row["run"], row["metric"]) == (run, "val/accuracy")
            }
            best = max(accuracies, key=lambda epoch: (accuracies[epoch], -epoch))
            assert int(rows["test/accuracy"]["epoch"]) == best
            assert (Path(test["checkpoint"]["path"]).name, test["checkpoint"]["epoch"]) == ("best.ckpt", best)
            assert test["checkpoint"]["value"] == pytest.approx(accuracies[best])

    def test_report(self, study):
        values = {
            (row["method"], row["seed"]): float(row["value"]) for row in study.results if row["metric"] == "test/loss"
        }
        mean = (values["noisy", "0"] + values["noisy", "1"] - values["baseline", "0"] - values["baseline", "1"]) / 2
        line = next(
            line for line in study.report.split("### `test/loss`")[1].splitlines() if line.startswith("| noisy")
        )
        assert float(line.split("|")[5]) == pytest.approx(mean, abs=0.005)
        for words in (
            "`test/accuracy` decides",
            "95 % interval",
            "until `train/loss` is as good as baseline's",
            "ms per step",
            "## Gradient norms",
            "| noisy | trainer.callbacks[1].class_path | - | study_module.NoisyGradients |",
            "| noisy | `NoisyGradients()` | none | 1 | `SGD(lr=0.05, momentum=0.9, dampening=0, weight_decay=0",
            "Versions: python",
            "Device: 1 x cpu",
            "python -m lightning_znorm compare --config exp.yaml --methods configs/methods/baseline.yaml",
            "python -m lightning_znorm fit --config exp.yaml --config methods/crash.yaml --seed_everything 1",
        ):
            assert words in study.report
        for name in re.findall(r"!\[.*\]\((.*)\)", study.report):
            assert (study.output / name).stat().st_size > 10_000
        html = (study.output / "report.html").read_text()
        assert html.count("<img") == study.report.count("![") == 4
        assert not re.search(r"(src|href)=\"(?!data:)", html)

    def test_again_from_python(self, study, quick):
        methods = ["configs/methods/baseline.yaml", "methods/noisy.yaml"]
        before = [(study.runs / name / "log.txt").stat().st_size for name in RUNS]
        table = compare.run("exp.yaml", methods, seeds=[1, 0], output="out")
        assert [(study.runs / name / "log.txt").stat().st_size for name in RUNS] == before
        row = table.row("noisy")
        expected = {
            row["seed"]: float(row["value"])
            for row in study.results
            if row["metric"] == "test/accuracy" and row["method"] == "noisy"
        }
        assert dict(zip(row.seeds, row.values, strict=True)) == {int(seed): value for seed, value in expected.items()}
        assert table.row("baseline").verdict == ""
        assert table.failures == ()
        assert str(table).startswith("test/accuracy\nbaseline ")

    def test_changed_settings_are_refused(self, study, quick):
        with pytest.raises(
            StudyError, match=r"runs of baseline with other settings \(trainer.max_epochs was 4 and is 9\)"
        ):
            compare.run("exp.yaml", ["configs/methods/baseline.yaml"], output="out", args=["--trainer.max_epochs=9"])

    def test_dry_run_prints_what_is_left(self, study, quick, capsys):
        methods = ["configs/methods/baseline.yaml", "methods/crash.yaml"]
        main(["compare", "--config", "exp.yaml", "--methods", *methods, "--seeds", "0", "--output", "out", "--dry-run"])
        (line,) = capsys.readouterr().out.splitlines()
        run = study.runs / "crash-0"
        assert f" -m lightning_znorm fit --config {run}/run.yaml && " in line
        assert line.endswith(
            f" -m lightning_znorm test --config {run}/run.yaml --ckpt_path {run}/checkpoints/best.ckpt"
        )

    def test_metric_that_nothing_logs(self, study, quick):
        names = "test/accuracy, test/loss, train/loss, val/accuracy, val/loss"
        with pytest.raises(StudyError, match=rf"--metric test/dice: nothing logs it\. The experiment logs {names}\."):
            compare.run("exp.yaml", ["configs/methods/baseline.yaml"], output="out", metric="test/dice", mode="max")
