"""Speed, tables, plots and the report, of measurements made up for it."""

import dataclasses
import errno
import io
import json
import math
import re
from itertools import combinations, pairwise
from pathlib import Path

import pytest

from lightning_znorm.compare import plots
from lightning_znorm.compare.document import Code, Grid, Heading, Points, Text, code
from lightning_znorm.compare.findings import Findings
from lightning_znorm.compare.html import to_html
from lightning_znorm.compare.markdown import to_markdown
from lightning_znorm.compare.one_run import Outcome
from lightning_znorm.compare.plots import plot, spaced
from lightning_znorm.compare.prepare import Plan
from lightning_znorm.compare.report import write_report
from lightning_znorm.compare.results import Measurement
from lightning_znorm.compare.speed import overheads, reaches, step_seconds
from lightning_znorm.compare.study import Study
from lightning_znorm.compare.tables import Table, make_rows

FIT = {
    "epochs": 4,
    "seconds": 8.0,
    "parameters": 10,
    "device": "1 x cpu: x86_64",
    "threads": 1,
    "versions": {"python": "3.11", "torch": "2.6"},
}


def plan(output: Path, methods: tuple[str, ...] = ("baseline", "znorm"), seeds: tuple[int, ...] = (0, 1, 2)) -> Plan:
    study = Study(("exp.yaml",), tuple(f"m/{name}.yaml" for name in methods), seeds, output)
    settings = {name: {"trainer": {"lr": i}} for i, name in enumerate(methods)}
    return Plan(study, settings, ("val/accuracy", "max"), "test/accuracy", "max", [])


def done(plan: Plan) -> list[Measurement]:
    """Runs that are done: znorm is as fast in two epochs as the baseline in four, at twice the time per step."""
    found = []
    for run in plan.study.runs:
        run.folder.mkdir(parents=True)
        run.fit_file.write_text(json.dumps(FIT))
        factor = 1 + list(plan.study.files).index(run.method)
        checkpoint = {"path": "best.ckpt", "epoch": 2, "monitor": "val/accuracy", "value": 0.75}
        metrics = {"test/accuracy": 0.8 + 0.01 * factor * (1 + run.seed)}
        run.test_file.write_text(json.dumps({"checkpoint": checkpoint, "metrics": metrics}))
        for epoch in range(4):
            accuracy = 0.5 + 0.1 * min(4, factor * (epoch + 1)) + 0.01 * run.seed
            for metric, value in (
                ("val/accuracy", accuracy),
                ("train/loss", 1 - accuracy),
                ("compare/train_seconds", (epoch + 1) * factor),
                ("compare/step_seconds", (9.0, 0.05, 0.1, 0.15)[epoch] * factor),
                ("compare/gradient_norm", 10.0 / (epoch + 1)),
            ):
                found.append(Measurement(run.name, run.seed, run.method, epoch, metric, value))
        found += [Measurement(run.name, run.seed, run.method, 2, metric, value) for metric, value in metrics.items()]
    return found


def report(plan: Plan, measurements: list[Measurement], failures: tuple[Outcome, ...] = (), alone: bool = True) -> str:
    plan.study.output.mkdir(parents=True, exist_ok=True)
    write_report(Findings(plan, measurements, failures, "the command", alone), plan.study.output)
    return (plan.study.output / "report.md").read_text()


class TestSpeed:
    def test_reaching_the_first_methods_end(self, tmp_path):
        first, other = reaches(done(plan(tmp_path)), "val/accuracy", "max", ["baseline", "znorm"])
        assert (first.epochs, first.seconds, first.seeds) == ((4, 4, 4), (4, 4, 4), 3)
        assert (other.epochs, other.seconds, other.seeds) == ((2, 2, 2), (4, 4, 4), 3)

    def test_not_reached(self):
        numbers = [("baseline", 0, 0.5), ("baseline", 1, 0.4), ("znorm", 0, 0.6), ("znorm", 1, 0.41)]
        found = [Measurement("", 0, method, epoch, "loss", value) for method, epoch, value in numbers]
        assert [reach.epochs for reach in reaches(found, "loss", "min", ["baseline", "znorm"])] == [(2,), ()]

    def test_time_per_step_leaves_the_first_epoch_out(self, tmp_path):
        steps = step_seconds(done(plan(tmp_path)))
        assert steps["baseline"] == pytest.approx({0: 0.1, 1: 0.1, 2: 0.1})
        assert overheads(steps["znorm"], steps["baseline"]) == pytest.approx([1.0] * 3)
        assert step_seconds([Measurement("", 0, "a", 0, "compare/step_seconds", 3.0)]) == {"a": {0: 3.0}}

    def test_overhead_is_paired(self):
        assert overheads({0: 2.0, 1: 10.0, 2: 5.0}, {0: 1.0, 1: 10.0}) == [1.0, 0.0]
        assert overheads({0: 1.0}, {}) == []


class TestReport:
    @pytest.fixture(autouse=True)
    def _quick(self, monkeypatch):
        """What figures look like is another test's."""
        monkeypatch.setattr("lightning_znorm.compare.report_curves.plot", lambda *args: {"png": b"", "svg": b""})

    def test_numbers(self, tmp_path):
        text = report(plan(tmp_path), done(plan(tmp_path)))
        # Differences 0.01, 0.02, 0.03.
        assert "| baseline | 3 | 0.820 | 0.010 | - | - |  |" in text
        assert "| znorm | 3 | 0.840 | 0.020 | +0.020 | -0.005 to +0.045 | 3 seeds cannot tell; if" in text
        assert "- znorm: +0.020 (-0.005 to +0.045). 3 seeds cannot tell" in text
        assert "| znorm | 2.0 | 4 | 3 of 3 |" in text
        assert "| znorm | 200 | +100.0% | +100.0% to +100.0% |" in text
        assert "| baseline | 10 | 2.5 |" in text
        assert "| znorm | trainer.lr | 0 | 1 |" in text
        assert "Training alone took 0:00:48, all runs together." in text
        assert "methods are compared, and each interval" not in text

    def test_metrics_in_order(self, tmp_path):
        text = report(plan(tmp_path), done(plan(tmp_path)))
        assert re.findall(r"### `(.*)`", text) == ["test/accuracy", "val/accuracy", "train/loss"]

    def test_tests_are_labelled_by_what_was_tested(self, tmp_path):
        text = report(plan(tmp_path), done(plan(tmp_path)))
        assert "### `test/accuracy`, at the best checkpoint" in text
        assert "### `val/accuracy`, of the last epoch" in text
        assert "Tests are of each run's best checkpoint (that of the epoch with the best `val/accuracy`, max)" in text
        assert "| method | seed | epoch | of | `val/accuracy` |" in text
        for row in ("| baseline | 2 | 3 | 4 | 0.75 |", "| znorm | 0 | 3 | 4 | 0.75 |"):
            assert row in text

    def test_without_a_monitor_tests_are_of_the_last_checkpoint(self, tmp_path):
        found = done(plan(tmp_path))
        # A name says nothing of where it was logged: this one was not in the test.
        found += [Measurement("", 0, "znorm", 3, "test/seen", 1.0)]
        text = report(dataclasses.replace(plan(tmp_path), monitor=None), found)
        assert "### `test/accuracy`, at the last checkpoint" in text
        assert "### `test/seen`, of the last epoch" in text
        assert "Tests are of each run's last checkpoint; all other metrics" in text
        assert "| baseline | 2 | 3 | 4 |\n" in text
        assert "best" not in text
        test_line = next(line for line in text.splitlines() if " test --config" in line)
        assert test_line.endswith("checkpoints/last.ckpt")

    def test_what_each_method_does_with_gradients(self, tmp_path):
        the_plan = plan(tmp_path, ("baseline", "mine", "clip", "copy"))
        found = done(the_plan)
        callback = {"class_path": "study_module.NoisyGradients", "init_args": {"eps": 1e-10, "include": ["*fc*"]}}
        stopping = {"class_path": "lightning.pytorch.callbacks.EarlyStopping", "init_args": {"monitor": "val/loss"}}
        bar = {"class_path": "lightning.pytorch.callbacks.RichProgressBar"}
        scheduler = {"class_path": "lightning.pytorch.callbacks.GradientAccumulationScheduler", "init_args": {"x": 4}}
        for name, trainer in {
            "baseline": {"callbacks": [bar, stopping]},
            "mine": {"callbacks": [callback], "accumulate_grad_batches": 2},
            "clip": {"callbacks": [stopping, scheduler], "gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"},
            "copy": {"callbacks": [bar, stopping]},
        }.items():
            the_plan.settings[name] = {"trainer": trainer}
        for run in the_plan.study.runs:
            if run.method != "copy":
                fit = {**FIT, "optimizers": ["SGD(lr=0.1)", "Adam(lr=1)"] if run.method == "mine" else ["SGD(lr=0.1)"]}
                run.fit_file.write_text(json.dumps(fit))
        text = report(the_plan, found)
        assert text.index("## Methods as they were run") < text.index("## Metrics")
        for row in (
            "| baseline | none | none | 1 | `SGD(lr=0.1)` |",
            "| mine | `NoisyGradients(eps=1e-10, include=['*fc*'])` | none | 2 | `SGD(lr=0.1)` and `Adam(lr=1)` |",
            "| clip | none | value, 0.5 | 1, GradientAccumulationScheduler(x=4) | `SGD(lr=0.1)` |",
            "| copy | none | none | 1 | not recorded |",  # by an older version
        ):
            assert row in text
        assert "baseline and copy have the same settings: what differs between them is chance." in text
        assert "mine trains without EarlyStopping, which baseline has." in text
        assert "baseline trains without GradientAccumulationScheduler, which clip has." in text

    def test_one_seed(self, tmp_path):
        text = report(plan(tmp_path, seeds=(5,)), done(plan(tmp_path, seeds=(5,))))
        assert "| znorm | 1 | 0.920 | - | +0.060 | - | One seed, where it is better, cannot tell" in text

    def test_one_method(self, tmp_path):
        text = report(plan(tmp_path, methods=("baseline",)), done(plan(tmp_path, methods=("baseline",))))
        assert text.startswith("# baseline: exp.yaml\n")

    def test_several_methods(self, tmp_path):
        methods = ("a", "b", "c")
        assert "2 methods are compared, and each" in report(plan(tmp_path, methods), done(plan(tmp_path, methods)))

    def test_some_seeds_do_not_get_there(self, tmp_path):
        found = [m for m in done(plan(tmp_path)) if (m.method, m.seed, m.metric) != ("znorm", 1, "val/accuracy")]
        low = [Measurement("znorm-1", 1, "znorm", epoch, "val/accuracy", 0.1) for epoch in range(4)]
        assert "| znorm | - | - | 2 of 3 |" in report(plan(tmp_path), found + low)

    def test_nothing_done(self, tmp_path):
        failures = tuple(
            Outcome(run, "fit ended with exit code 1.\nValueError: x") for run in plan(tmp_path).study.runs
        )
        text = report(plan(tmp_path), [], failures)
        assert "0 of 6 runs are done" in text
        assert text.count("ValueError: x") == 6
        assert "None were logged" in text

    @pytest.mark.parametrize("seeds", [(0,), (0, 1)])
    def test_whichever_runs_are_done(self, tmp_path, seeds):
        """Each subset of a study's runs, with every other value that is no number: none ends in a traceback."""
        the_plan = plan(tmp_path, seeds=seeds)
        found, runs = done(the_plan), the_plan.study.runs
        tests = {run: run.test_file.read_text() for run in runs}
        for size in range(len(runs) + 1):
            for finished in combinations(runs, size):
                for run in runs:
                    run.test_file.unlink(missing_ok=True)
                    if run in finished:
                        run.test_file.write_text(tests[run])
                own = [m for m in found if m.run in {run.name for run in finished}]
                failures = tuple(Outcome(run, "fit ended with exit code 1") for run in runs if run not in finished)
                known = {name: {run.seed for run in finished if run.method == name} for name in the_plan.study.files}
                for odd in (None, math.nan, math.inf, -math.inf, 0.0, 1e308, -1.7e308):
                    values = own if odd is None else [dataclasses.replace(m, value=odd) for m in own[::2]] + own[1::2]
                    text = report(the_plan, values, failures)
                    assert f"{size} of {len(runs)} runs are done" in text
                    assert text.count("fit ended with exit code 1") == len(failures)
                    alone = bool(known["znorm"]) and not known["znorm"] & known["baseline"]
                    assert ("No seed is done under both methods." in text) == alone
                    rows = tuple(make_rows(the_plan, values))
                    lines = str(Table("test/accuracy", rows, failures, tmp_path)).splitlines()
                    shown = [name for name in known if known[name]]
                    assert [line.split()[0] for line in lines] == ["test/accuracy", *shown]
                    assert max(map(len, [*lines, *text.splitlines()])) < 500  # no number of 300 digits

    def test_diverged(self, tmp_path):
        found = [m for m in done(plan(tmp_path)) if m.metric != "test/accuracy"]
        for method, values in (("baseline", (0.5, 0.6)), ("znorm", (math.nan, 0.7))):
            found += [Measurement("", seed, method, 3, "test/accuracy", value) for seed, value in enumerate(values)]
        assert "| znorm | 2 | nan | - | nan | - | Not comparable: a value is not finite" in report(
            plan(tmp_path), found
        )

    def test_different_versions(self, tmp_path):
        found = done(plan(tmp_path))
        other = {**FIT, "versions": {**FIT["versions"], "torch": "2.7"}}
        plan(tmp_path).study.runs[0].fit_file.write_text(json.dumps(other))
        assert "not made with the same versions" in report(plan(tmp_path), found)

    def test_side_by_side(self, tmp_path):
        """Where runs slowed one another, their times are no costs of methods."""
        text = report(plan(tmp_path), done(plan(tmp_path)), alone=False)
        assert "Runs went on side by side and slowed one another" in text
        assert "| znorm | 200 |\n" in text
        assert "more than baseline" not in text

    def test_what_methods_have_in_common(self, tmp_path):
        found = done(plan(tmp_path))
        same = "all methods start from the same weights and see the same batches in the same order"
        assert same in report(plan(tmp_path), found)
        for run in plan(tmp_path).study.runs:
            run.fit_file.write_text(json.dumps({**FIT, "weights": f"{run.seed}" + "x" * (run.name == "znorm-1")}))
        text = report(plan(tmp_path), found)
        assert "Runs of the same seed have other weights than baseline under znorm; differences are" in text
        assert same not in text

    def test_a_method_that_changes_the_data(self, tmp_path):
        found = done(plan(tmp_path))
        changed = plan(tmp_path)
        changed.settings["znorm"]["data"] = {"batch_size": 8}
        assert "seed have other settings of the data under znorm; differences" in report(changed, found)

    def test_small_numbers_keep_their_digits(self, tmp_path):
        found = done(plan(tmp_path))
        found += [
            Measurement(run.name, run.seed, run.method, 3, "test/mse", 1e-9 * (2 + run.seed + len(run.method)))
            for run in plan(tmp_path).study.runs
        ]
        assert "| baseline | 3 | 0.0000000110 | 0.0000000010 | - | - |  |" in report(plan(tmp_path), found)


class TestFullDisk:
    @pytest.mark.parametrize("what", ["val-accuracy.png", "report.html", "report.md"])
    def test_the_rest_of_a_report_is_written(self, tmp_path, monkeypatch, what):
        """Half a file is written of one; the others are there, and the error names it."""
        the_plan = plan(tmp_path)
        found = done(the_plan)
        images = {"png": b"new", "svg": b"new"}
        monkeypatch.setattr("lightning_znorm.compare.report_curves.plot", lambda *args: images)
        names = [
            f"figures/{name}.{kind}" for name in ("train-loss", "val-accuracy", "gradient-norm") for kind in images
        ]
        files = {tmp_path / name for name in ("report.html", "report.md", *names)}
        for path in files:
            path.parent.mkdir(exist_ok=True)
            path.write_text("old")
        original = Path.open

        def full(path, mode="r", *args, **options):
            opened = original(path, mode, *args, **options)
            if "w" in mode and what in path.name:
                opened.write(b"half" if "b" in mode else "half")
                opened.write = raises
            return opened

        def raises(content):
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(Path, "open", full)
        with pytest.raises(OSError, match="No space left on device") as error:
            report(the_plan, found)
        monkeypatch.undo()
        assert Path(error.value.filename).name == what
        contents = {path: path.read_text() for path in files if path.is_file()}
        assert {path.name for path in files if contents.get(path, "old") == "old"} == {what}  # none is there in half
        assert not list(tmp_path.rglob(".*"))

    def test_a_run_that_could_not_be_read_is_left_out(self, tmp_path):
        the_plan = plan(tmp_path)
        found, lost = done(the_plan), the_plan.study.runs[0]
        text = report(the_plan, [m for m in found if m.run != lost.name], (Outcome(lost, "logs: Input/output error"),))
        assert "5 of 6 runs are done" in text
        assert "| baseline | 0 | 3 | 4 | 0.75 |" not in text


def test_html_needs_nothing_else(tmp_path):
    report(plan(tmp_path), done(plan(tmp_path)))
    html = (tmp_path / "report.html").read_text()
    assert html.count('<img src="data:image/svg+xml;base64,') == 3
    assert not re.findall(r"https?:|url\(|<script|<link|@import", html)
    assert "<code>val/accuracy</code>" in html


def test_table_in_a_terminal(tmp_path):
    the_plan = plan(tmp_path)
    table = Table("test/accuracy", tuple(make_rows(the_plan, done(the_plan))), (), tmp_path)
    assert str(table).splitlines()[:2] == ["test/accuracy", "baseline  0.8200 +- 0.0100"]
    assert (
        str(table)
        .splitlines()[2]
        .startswith("znorm     0.8400 +- 0.0200  +0.0200 (-0.0048 to +0.0448)  3 seeds cannot tell; if")
    )


class TestPlots:
    def test_methods_differ_without_colour(self):
        curves = {name: {0: {0: i, 1: i + 1}} for i, name in enumerate("abcdef")}
        image = plot(curves, list(curves), "loss")
        assert image["png"].startswith(b"\x89PNG")
        svg = image["svg"].decode()
        dashes = set(re.findall(r"stroke-dasharray: ([\d., ]+)[;\"]", svg))
        assert len(dashes) >= 4
        assert "2024" not in svg  # no date: the same image for the same numbers
        assert image == plot(curves, list(curves), "loss")

    def test_curves_are_means_over_seeds_from_the_first_epoch_on(self, monkeypatch):
        drawn = []
        monkeypatch.setattr(plots, "_label", lambda axes, ends: drawn.append((axes, ends)))
        plot({"a": {0: {0: 1.0, 1: 2.0, 2: 5.0}, 1: {0: 3.0, 1: 2.0}}}, ["a"], "loss")
        ((axes, ends),) = drawn
        low, high, line = axes.lines
        assert [list(line.get_xdata()), list(line.get_ydata())] == [[1, 2, 3], [2.0, 2.0, 5.0]]
        assert [list(edge.get_ydata()) for edge in (low, high)] == [[1.0, 2.0, 5.0], [3.0, 2.0, 5.0]]
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "loss")
        assert ends[0][:3] == (3, 5.0, "a")

    def test_a_method_looks_the_same_in_every_plot(self):
        curve = {0: {0: 1.0, 1: 2.0}}
        both = plot({"a": curve, "b": curve}, ["a", "b"], "x")["svg"].decode()
        alone = plot({"b": curve}, ["a", "b"], "x")["svg"].decode()
        assert "#d55e00" in both
        assert "#d55e00" in alone

    @pytest.mark.parametrize(
        "curves",
        [
            {},
            {"a": {0: {0: math.nan, 1: math.inf}}},
            {"a": {0: {3: 0.0}}},
            {"a": {0: {0: 1e308, 1: 1.0}, 1: {0: -1.7e308, 1: 5e-324}}},
            {"a": {0: {0: 3.4e38, 1: 1.0}, 1: {0: -3.4e38}}},
        ],
    )
    def test_hardly_anything_to_draw(self, curves):
        assert plot(curves, ["a"], "x")["png"]

    def test_long_names_leave_room_for_curves(self):
        """Else matplotlib warns that it has none left."""
        assert plot({"m" * 250: {0: {0: 1.0, 1: 2.0}}}, ["m" * 250], "y" * 300)["png"]

    def test_labels_keep_apart(self):
        for wanted in ([0, 0, 0, 0], [1, 2, 3, 30], [0, 10, 20], []):
            found = spaced(wanted, 5)
            assert len(found) == len(wanted)
            assert all(b - a > 5 - 1e-9 for a, b in pairwise(found))
            assert sum(found) == pytest.approx(sum(wanted))

    def test_size(self):
        from PIL import Image

        image = Image.open(io.BytesIO(plot({"a": {0: {0: 1.0}}}, ["a"], "x")["png"]))
        assert image.width > 900


def test_markdown():
    blocks = [Heading("H"), Points(["a", "b"]), Code("x"), Grid(("m", "n"), [("a|b", "1")], frozenset([1]))]
    assert to_markdown(blocks) == "## H\n\n- a\n- b\n\n```\nx\n```\n\n| m | n |\n| --- | --: |\n| a\\|b | 1 |\n"


def test_html_escapes():
    html = to_html([Text(f"a < b & {code('c<d>')}"), Code("<script>"), Grid(("<",), [(">",)])], "<title>")
    for raw in ("<script>", "a < b", "<d>", "<title><"):
        assert raw not in html
    assert "a &lt; b &amp; <code>c&lt;d&gt;</code>" in html
