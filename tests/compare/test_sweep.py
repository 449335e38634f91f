"""Tuned against tuned: which runs a sweep has, what it refuses, and which values it chooses."""

import csv
import json
import math
from collections import Counter
from pathlib import Path

import pytest
import yaml
from pretended import Pretended
from samples import FIT

from lightning_znorm import compare
from lightning_znorm.compare.command import command_line
from lightning_znorm.compare.engines import Resources
from lightning_znorm.compare.plan import tuning_metric
from lightning_znorm.compare.plots import SweptValue, plot_sweep, read_numbers
from lightning_znorm.compare.processes import Processes
from lightning_znorm.compare.results import Measurement
from lightning_znorm.compare.statistics import compare_methods
from lightning_znorm.compare.study import Plan, Study, StudyError, short_key
from lightning_znorm.compare.sweep import Sweep, tune, tuned

LR = "model.init_args.optimizer.init_args.lr"


def study(output: Path = Path("out"), sweep=((LR, ("0.1", "1.0")),), **changes) -> Study:
    return Study(("exp.yaml",), ("m/baseline.yaml", "m/znorm.yaml"), (0, 1), output, sweep=sweep, **changes)


class TestStudy:
    def test_every_method_runs_at_every_value_with_every_seed(self):
        names = [f"{method}-lr={lr}-{seed}" for seed in (0, 1) for method in ("baseline", "znorm") for lr in (0.1, 1.0)]
        assert [run.name for run in study().runs] == names
        assert [run.folder.name for run in study().runs] == names

    def test_values_are_options_of_fit(self):
        args = study(args=("--trainer.max_epochs", "2")).fit_args("znorm-lr=1.0")
        assert args == [
            *("fit", "--config", "exp.yaml", "--config", "m/znorm.yaml", "--trainer.max_epochs", "2"),
            f"--{LR}=1.0",
        ]

    def test_several_settings_make_a_grid(self):
        grid = study(sweep=((LR, ("0.1", "1.0")), ("data.init_args.batch_size", ("8", "16"))))
        assert [arm.name for arm in grid.arms.values() if arm.method == "znorm"] == [
            f"znorm-lr={lr}-batch_size={size}" for lr in ("0.1", "1.0") for size in (8, 16)
        ]

    def test_short_names_tell_settings_apart(self):
        same_ends = study(sweep=(("model.one.lr", ("1", "2")), ("model.other.lr", ("1", "2")), ("lr", ("3", "4"))))
        assert [short_key(key, same_ends.swept) for key in same_ends.swept] == ["one.lr", "other.lr", "lr"]

    @pytest.mark.parametrize("value", ["a/b", "{class_path: x}", "é" * 99, "../..", "a b"])
    def test_any_value_has_a_folder_of_its_own(self, value):
        first, second = (run.folder for run in study(sweep=(("k", (value, value + "/")),)).runs[:2])
        assert first != second
        assert first.parent == second.parent == Path("out/runs")
        assert len(first.name.encode()) < 200

    def test_the_command_repeats_it(self):
        grid = study(sweep=((LR, ("0.1", "1.0")), ("data.a", ("x y", "z"))))
        line = command_line(grid, Resources())
        assert f"--sweep {LR} 0.1 1.0 --sweep data.a 'x y' z --methods" in line

    @pytest.mark.parametrize(
        ("sweep", "args", "message"),
        [
            (((LR, ()),), (), f"--sweep {LR}: name the values"),
            ((("0.1", ("0.2",)),), (), "--sweep 0.1: name a setting first"),
            ((("--lr", ("0.2",)),), (), "without its dashes"),
            (((LR, ("1",)), (LR, ("2",))), (), "is given twice"),
            (((LR, ("1", "2", "1")),), (), "1 is named twice"),
            (((LR, ("1", "2")),), (f"--{LR}=3",), "both swept and set"),
            (((LR, ("1", "2")),), (f"--{LR}", "3"), "both swept and set"),
            ((("seed_everything", ("1", "2")),), (), "seed_everything cannot be swept: name --seeds instead"),
            ((("trainer.fast_dev_run", ("1", "2")),), (), "keeps no logs"),
            (((LR, ("1\n", "2")),), (), "control characters"),
        ],
    )
    def test_refusals(self, sweep, args, message):
        with pytest.raises(StudyError, match=message):
            study(sweep=sweep, args=args)


def plan(output: Path, mode: str = "max", **changes) -> Plan:
    swept = study(output, **changes)
    logged = ["val/loss", "val/score", "test/score"]
    return Plan(swept, {name: {"name": name} for name in swept.arms}, ("val/loss", "min"), "test/score", mode, logged)


def done(plan: Plan, scores: dict[str, tuple[float, ...]], epoch: int = 1) -> list[Measurement]:
    """Runs that are done: the arms' validation scores by seed in the tested epoch. Test scores are a tenth of them."""
    found = []
    for run in plan.study.runs:
        if run.seed < len(scores[run.method]):
            score = scores[run.method][run.seed]
            run.folder.mkdir(parents=True)
            run.fit_file.write_text(json.dumps(FIT))
            checkpoint = {"path": "best.ckpt", "epoch": epoch, "monitor": "val/loss", "value": 0.5}
            run.test_file.write_text(json.dumps({"checkpoint": checkpoint, "metrics": {}}))
            # Epochs that are not tested have other scores.
            logged = {("val/score", 0): 9.0, ("val/score", 1): score, ("val/score", 2): -9.0}
            logged["test/score", epoch] = score / 10
            found += [Measurement(run.name, run.seed, run.method, e, m, value) for (m, e), value in logged.items()]
    return found


def chosen(sweep: Sweep) -> dict[str, str]:
    return {method: point[0][1] for method, point in sweep.chosen.items()}


ARMS = ("baseline-lr=0.1", "baseline-lr=1.0", "znorm-lr=0.1", "znorm-lr=1.0")


class TestChoice:
    def test_by_the_mean_over_seeds_in_the_tested_epoch(self, tmp_path):
        swept = plan(tmp_path)
        scores = dict(zip(ARMS, [(0.1, 0.9), (0.4, 0.5), (0.2, 0.2), (0.9, -0.3)], strict=True))
        found = tune(swept, done(swept, scores))
        assert (found.metric, found.mode) == ("val/score", "max")
        assert chosen(found) == {"baseline": "0.1", "znorm": "1.0"}  # 0.5 over 0.45, 0.3 over 0.2
        assert [trial.score for trial in found.trials] == pytest.approx([0.5, 0.45, 0.2, 0.3])
        assert found.trials[0].values == pytest.approx({0: 0.01, 1: 0.09})

    def test_less_may_be_better(self, tmp_path):
        swept = plan(tmp_path, mode="min")
        scores = dict(zip(ARMS, [(0.1, 0.9), (0.4, 0.5), (0.2, 0.2), (0.9, -0.3)], strict=True))
        assert chosen(tune(swept, done(swept, scores))) == {"baseline": "1.0", "znorm": "0.1"}

    def test_only_the_chosen_runs_are_compared(self, tmp_path):
        swept = plan(tmp_path)
        scores = dict(zip(ARMS, [(0.1, 0.9), (0.4, 0.5), (0.2, 0.2), (0.9, -0.3)], strict=True))
        measurements = done(swept, scores)
        reduced, left = tuned(swept, measurements, tune(swept, measurements))
        assert list(reduced.study.files.items()) == [("baseline", "m/baseline.yaml"), ("znorm", "m/znorm.yaml")]
        assert reduced.settings == {"baseline": {"name": ARMS[0]}, "znorm": {"name": ARMS[3]}}
        assert {(m.method, m.run) for m in left} == {
            *(("baseline", f"baseline-lr=0.1-{seed}") for seed in (0, 1)),
            *(("znorm", f"znorm-lr=1.0-{seed}") for seed in (0, 1)),
        }
        # Of each run, the same folder, and the command that a user would type.
        assert {run.folder for run in reduced.study.runs} < {run.folder for run in swept.study.runs}
        assert all(run.is_done for run in reduced.study.runs)
        assert reduced.study.fit_args("znorm")[-1] == f"--{LR}=1.0"

    @pytest.mark.parametrize("bad", [math.nan, math.inf])
    def test_a_value_at_which_a_run_diverges_is_not_chosen(self, tmp_path, bad):
        swept = plan(tmp_path)
        scores = dict(zip(ARMS, [(0.1, 0.1), (0.4, bad), (bad, bad), (bad, bad)], strict=True))
        found = tune(swept, done(swept, scores))
        assert chosen(found) == {"baseline": "0.1", "znorm": "0.1"}
        assert "baseline: the validation metric is not finite at lr=1.0." in found.warnings
        assert "znorm: no value has a finite validation metric, so the first one is shown." in found.warnings

    def test_a_value_at_which_runs_failed_is_not_chosen_and_named(self, tmp_path):
        swept = plan(tmp_path)
        scores = dict(zip(ARMS, [(0.1, 0.1), (0.9,), (0.2, 0.2), (0.1, 0.1)], strict=True))
        found = tune(swept, done(swept, scores))
        assert chosen(found) == {"baseline": "0.1", "znorm": "0.1"}
        assert any(text.startswith("baseline: not all seeds are done at lr=1.0") for text in found.warnings)

    def test_a_method_without_runs_has_no_values(self, tmp_path):
        swept = plan(tmp_path)
        measurements = done(swept, dict(zip(ARMS, [(0.1, 0.1), (0.9, 0.8), (), ()], strict=True)))
        found = tune(swept, measurements)
        assert chosen(found)["baseline"] == "1.0"
        assert (found.done, found.total) == (4, 8)
        reduced, left = tuned(swept, measurements, found)
        assert list(reduced.study.files) == ["baseline", "znorm"]
        assert {m.method for m in left} == {"baseline"}
        assert any(text.startswith("znorm: not all seeds are done at lr=0.1; lr=1.0") for text in found.warnings)

    def test_validation_less_often_than_tests(self, tmp_path):
        swept = plan(tmp_path)
        measurements = done(swept, dict.fromkeys(ARMS, (0.5, 0.5)), epoch=2)
        measurements = [m for m in measurements if not (m.metric == "val/score" and m.epoch == 2)]
        assert [trial.score for trial in tune(swept, measurements).trials] == [0.5] * 4  # that of epoch 1

    @pytest.mark.parametrize(
        ("values", "best", "edge"),
        [
            (("0.1", "1.0", "10"), 0, "0.1, is the least"),
            (("0.1", "1.0", "10"), 1, None),
            (("0.1", "1.0", "10"), 2, "10, is the greatest"),
            (("10", "0.1", "1e0"), 0, "10, is the greatest"),  # given in any order
            (("0.1",), 0, None),
            (("0", "0.1", "1"), 0, None),  # nothing is below zero
            (("adam", "sgd"), 0, None),
        ],
    )
    def test_edges(self, tmp_path, values, best, edge):
        swept = plan(tmp_path, sweep=((LR, values),))
        scores = {name: (float(i % len(values) == best),) * 2 for i, name in enumerate(swept.study.arms)}
        found = tune(swept, done(swept, scores)).warnings
        assert len(found) == (0 if edge is None else 2)  # for each method
        assert all(edge in text for text in found)


@pytest.mark.parametrize(
    ("metric", "monitor", "logged", "expected"),
    [
        ("test/a", ("val/loss", "min"), ["val/a", "val/loss"], ("val/a", "max")),
        ("test/a", ("val/loss", "min"), ["val/loss"], ("val/loss", "min")),
        ("val/a", ("val/a", "max"), ["val/a"], ("val/a", "max")),
        ("score", ("dice", "max"), ["dice"], ("dice", "max")),
        ("test/a", ("train/loss", "min"), ["train/loss"], None),
        ("test/a", None, [], None),
    ],
)
def test_metric_that_chooses(metric, monitor, logged, expected):
    if expected is None:
        with pytest.raises(StudyError, match="--sweep chooses values by a validation metric"):
            tuning_metric(metric, "max", monitor, logged)
    else:
        assert tuning_metric(metric, "max", monitor, logged) == expected


class TestPlot:
    def test_numbers(self):
        assert read_numbers(["1e-3", "0.1"]) == [0.001, 0.1]
        assert read_numbers(["1", "nan"]) is None
        assert read_numbers(["a", "1"]) is None

    @pytest.mark.parametrize(
        "values", [("1e-3", "0.1"), ("0", "1"), ("$a", "_b"), ("1",), ("-1", "2"), ("adam", "s" * 99)]
    )
    def test_any_values(self, values):
        found = {
            "baseline": [SweptValue(value, [0.5, 0.6], i == 0) for i, value in enumerate(values)],
            "$znorm": [SweptValue(value, [math.nan] if i else [], False) for i, value in enumerate(values)],
        }
        images = plot_sweep(found, values, "lr$", "val/score")
        assert images["png"].startswith(b"\x89PNG")
        assert b"<svg" in images["svg"]


def test_settings_that_end_alike_are_told_apart_in_the_terminal():
    rows = compare_methods("score", {"baseline": {0: 0.5}})
    table = compare.Table("score", tuple(rows), (), Path(), {"baseline": {"model.lr": "0.1", "model.head.lr": "2"}})
    assert "baseline model.lr=0.1 head.lr=2 " in str(table)


def test_from_python_values_are_written_as_options(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(
        "lightning_znorm.compare.command.run_study", lambda study, *_: given.append(study) or (None, [])
    )
    compare.run("e.yaml", ["m.yaml"], output=tmp_path, sweep={"a": [0.1, 1], "b": ["x", True, None]})
    assert given[0].sweep == (("a", ("0.1", "1")), ("b", ("x", "true", "null")))
    for wrong in (0.1, "0.1"):
        with pytest.raises(StudyError, match=r"sweep: the values of a are a list, such as \[0.01, 0.1\], got"):
            compare.run("e.yaml", ["m.yaml"], output=tmp_path, sweep={"a": wrong})
    with pytest.raises(StudyError, match="a value of a cannot be written in YAML"):
        compare.run("e.yaml", ["m.yaml"], output=tmp_path, sweep={"a": [Path()]})


class Swept(Pretended):
    """A study whose validation accuracy, in the epoch that is tested, depends on the swept value."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch) -> None:
        super().__init__(folder, patch)
        self.scores = {"0.1": 0.6, "0.2": 0.9, "0.4": 0.7}
        patch.setattr(Processes, "capture", lambda processes, args: self.resolve(args))

    def resolve(self, args: list[str]) -> tuple[int, str, str]:
        values = [word.partition("=")[2] for word in args if word.startswith("--model.lr=")]
        return 0, yaml.safe_dump({**yaml.safe_load(self.settings), "model": {"lr": float(values[0])}}), ""

    def process(self, args: list[str], log: Path) -> int:
        code = super().process(args, log)
        folder = Path(args[2]).parent
        score = next((value for lr, value in self.scores.items() if f"lr={lr}-" in folder.name), 0.5)
        for path in folder.glob("logs/version_*/metrics.csv"):
            path.write_text(path.read_text().replace(",1,19,,0.75", f",1,19,,{score}"))
        return code

    def sweep(self, *values: float, **options: object) -> compare.Table:
        return self.run(sweep={"model.lr": values}, **options)


@pytest.fixture
def swept(tmp_path, monkeypatch) -> Swept:
    return Swept(tmp_path, monkeypatch)


class TestWholeStudy:
    def test_report_table_and_results(self, swept):
        table = swept.sweep(0.1, 0.2, 0.4)
        assert table.chosen == {"baseline": {"model.lr": "0.2"}, "znorm": {"model.lr": "0.2"}}
        assert [row.method for row in table.rows if row.metric == "test/accuracy"] == ["baseline", "znorm"]
        assert "znorm lr=0.2 " in str(table)
        assert swept.done.count("znorm-lr=0.4-1: test") == 1
        report = Path("out/report.md").read_text()
        assert "12 of 12 runs are done: 2 methods, seeds 0, 1." in report
        assert "own best `model.lr`: baseline at lr=0.2; znorm at lr=0.2. `val/accuracy` (max)" in report
        assert "| znorm | lr=0.2 | 2 | 0.9000 | 0.0000 | 0.6000 | chosen |" in report
        assert "| znorm | lr=0.4 | 2 | 0.7000 | 0.0000 | 0.6000 |  |" in report
        assert "--model.lr=0.2 --seed_everything 1" in report
        assert "tuned nothing" not in report
        assert Path("out/figures/sweep-lr.png").is_file()
        assert "sweep-lr" not in Path("out/report.html").read_text()  # images are within the file
        with Path("out/results.csv").open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["metric"] == "test/accuracy"]
        assert Counter((row["method"], row["model.lr"]) for row in rows) == {
            (method, lr): 2 for method in ("baseline", "znorm") for lr in ("0.1", "0.2", "0.4")
        }

    def test_the_same_command_runs_nothing_and_more_values_run_what_is_missing(self, swept):
        swept.sweep(0.1, 0.2)
        assert len(swept.done) == 16  # fit and test
        assert "is the greatest that was tried" in Path("out/report.md").read_text()
        swept.sweep(0.1, 0.2)
        assert swept.done == []
        assert "No verdict yet: a best value is the least or the greatest that was tried." in str(swept.sweep(0.1, 0.2))
        # So the values that validation has asked for do not make the study exploratory.
        assert "adjusted" not in str(swept.sweep(0.1, 0.2, 0.4))
        assert {name.partition("-")[2].partition("-")[0] for name in swept.done} == {"lr=0.4"}
        assert "Exploratory" not in Path("out/report.md").read_text()
        assert "that was tried" not in Path("out/report.md").read_text()

    def test_other_values_after_a_look_that_was_settled_are_exploratory(self, swept):
        swept.sweep(0.1, 0.2, 0.4)
        swept.scores["0.3"] = 0.95
        table = swept.sweep(0.1, 0.2, 0.3, 0.4)
        assert table.chosen["znorm"] == {"model.lr": "0.3"}
        assert table.row("znorm").verdict == (
            "Exploratory, no verdict: values of model.lr were added after the first look: 0.3."
        )

    def test_values_that_are_left_out_after_a_look_are_exploratory(self, swept):
        first = swept.sweep(0.1, 0.2, 0.4)
        verdict = swept.sweep(0.1).row("znorm").verdict
        assert verdict == ("Exploratory, no verdict: values of model.lr were left out after the first look: 0.2, 0.4.")
        assert swept.sweep(0.1, 0.2, 0.4).row("znorm").verdict == first.row("znorm").verdict != verdict

    def test_no_verdict_before_all_seeds_of_a_value_are_done(self, swept):
        swept.does["znorm-lr=0.4-1: fit"] = lambda run: 1
        table = swept.sweep(0.1, 0.2, 0.4)
        assert table.row("znorm").verdict == "No verdict yet: not all seeds are done at all values."
        assert "There is no test yet: not all seeds are done at all values." in Path("out/report.md").read_text()
        swept.does.clear()
        assert "yet" not in swept.sweep(0.1, 0.2, 0.4).row("znorm").verdict

    def test_a_run_that_is_damaged_is_left_out(self, swept):
        swept.sweep(0.1, 0.2, 0.4)
        path = Path("out/runs/znorm-lr=0.2-0/logs/version_0/metrics.csv")
        content = path.read_text()
        swept.does["znorm-lr=0.2-0: fit"] = lambda run: path.write_text(content[:40]) or 1  # and it cannot be repaired
        path.write_text(content[:40])
        table = swept.sweep(0.1, 0.2, 0.4)
        assert [outcome.run.name for outcome in table.failures] == ["znorm-lr=0.2-0"]
        assert table.chosen == {"baseline": {"model.lr": "0.2"}, "znorm": {"model.lr": "0.4"}}

    def test_time_of_all_trainings(self, swept):
        swept.sweep(0.1, 0.2, 0.4)
        assert "Training alone took 0:01:36, all runs together." in Path("out/report.md").read_text()  # 12 of 8 seconds

    def test_a_value_that_fails_at_once_is_not_chosen(self, swept):
        """Whichever place it has."""
        for method in ("baseline", "znorm"):
            swept.does[f"{method}-lr=0.2: fit"] = lambda run: 1  # in the trial
            for seed in (0, 1):
                swept.does[f"{method}-lr=0.2-{seed}: fit"] = lambda run: 1
        table = swept.sweep(0.2, 0.1, 0.4)
        assert table.chosen["znorm"] == {"model.lr": "0.4"}
        assert len(table.failures) == 4
        assert "znorm: not all seeds are done at lr=0.2." in Path("out/report.md").read_text()

    def test_a_method_that_fails_at_all_values_is_refused_with_its_value(self, swept):
        for lr in (0.1, 0.2):
            swept.does[f"znorm-lr={lr}: fit"] = lambda run: 1
        with pytest.raises(StudyError, match=r"znorm.yaml with lr=0.2: in a first try at one batch, fit ended with"):
            swept.sweep(0.1, 0.2)
        assert swept.done == []

    def test_a_study_without_and_with_sweep_do_not_mix(self, swept):
        swept.sweep(0.1, 0.2)
        with pytest.raises(StudyError, match=r"holds a study that sweeps model.lr, and now it would sweep nothing"):
            swept.run(args=["--model.lr=0.1"])
        with pytest.raises(StudyError, match=r"sweeps model.lr, and now it would sweep model.lr, data.n"):
            swept.run(sweep={"model.lr": [0.1, 0.2], "data.n": [1]})

    def test_a_record_that_is_lost(self, swept):
        swept.sweep(0.1, 0.2, 0.4)
        Path("out/study.json").unlink()
        table = swept.sweep(0.1, 0.2, 0.4)
        assert not any("fit" in what for what in swept.done)
        assert table.chosen["znorm"] == {"model.lr": "0.2"}

    def test_values_that_are_the_same(self, swept):
        with pytest.raises(StudyError, match=r"lr=0.1 and lr=1e-1 give baseline the same settings: name each value"):
            swept.sweep(0.2, "0.1", "1e-1")
        assert swept.done == []

    def test_without_validation_metric_it_is_refused_before_the_first_run(self, swept):
        with pytest.raises(StudyError, match="--sweep chooses values by a validation metric"):
            swept.sweep(0.1, 0.2, metric="train/loss", mode="min")
        assert swept.done == []

    def test_without_a_sweep_the_report_says_so(self, swept, monkeypatch):
        monkeypatch.setattr(Processes, "capture", lambda *_: (0, swept.settings, ""))
        swept.run()
        assert (
            "This study tuned nothing: all methods ran with `SGD(lr=0.1)`. `--sweep` compares"
            in Path("out/report.md").read_text()
        )
