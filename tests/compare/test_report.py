"""The report, of measurements made up for it."""

import dataclasses
import errno
import json
import math
import re
import shutil
from dataclasses import dataclass, fields, replace
from itertools import combinations
from pathlib import Path

import pytest
from jinja2 import ChoiceLoader, DictLoader, FileSystemLoader, UndefinedError
from measured import FIT, done, plan
from written import written

from lightning_znorm.compare.looks import FirstLook
from lightning_znorm.compare.report import TEMPLATES, ReportData, build_report, render, write_report
from lightning_znorm.compare.results import Measurement
from lightning_znorm.compare.statistics import Table, first_and_last, make_rows
from lightning_znorm.compare.study import Outcome, Plan


def data(plan: Plan, measurements: list[Measurement], failures: tuple[Outcome, ...], alone: bool) -> ReportData:
    table = Table(plan.metric, tuple(make_rows(plan, measurements)), failures, plan.study.output)
    return build_report(plan, measurements, table, "the command", alone)


def report(plan: Plan, measurements: list[Measurement], failures: tuple[Outcome, ...] = (), alone: bool = True) -> str:
    plan.study.output.mkdir(parents=True, exist_ok=True)
    write_report(data(plan, measurements, failures, alone), plan.study.output)
    return (plan.study.output / "report.md").read_text()


class TestReport:
    @pytest.fixture(autouse=True)
    def _quick(self, monkeypatch):
        """What figures look like is another test's."""
        for figure in ("plot", "forest"):
            monkeypatch.setattr(f"lightning_znorm.compare.report.{figure}", lambda *args: {"png": b"", "svg": b""})

    def test_numbers(self, tmp_path):
        text = report(plan(tmp_path), done(plan(tmp_path)))
        # Differences 0.01, 0.02, 0.03.
        assert "| baseline | 3 | 0.820 | 0.010 | - | - |\n" in text
        assert "| znorm | 3 | 0.840 | 0.020 | +0.020 | -0.005 to +0.045 |\n" in text
        assert "- znorm: +0.020 (-0.005 to +0.045). 3 seeds cannot tell (p = 0.074)." in text
        assert "| znorm | 2.0 | 4 | 3 of 3 |" in text
        assert "| znorm | 200 | +100.0% | +100.0% to +100.0% |" in text
        assert "| baseline | 10 | 2.5 |" in text
        assert "| znorm | trainer.lr | 0 | 1 |" in text
        assert "Training alone took 0:00:48, all runs together." in text
        assert "A method is called better or worse if the p-value" in text
        assert "Holm" not in text

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
            "mine": {"callbacks": [callback], "accumulate_grad_batches": 2, "precision": "bf16-mixed"},
            "clip": {"callbacks": [stopping, scheduler], "gradient_clip_val": 0.5, "gradient_clip_algorithm": "value"},
            "copy": {"callbacks": [bar, stopping]},
        }.items():
            the_plan.settings[name] = {"trainer": trainer}
        for run in the_plan.study.runs:
            if run.method != "copy":
                optimizers, schedulers = ["SGD(lr=0.1)"], []
                if run.method == "mine":
                    optimizers, schedulers = [*optimizers, "Adam(lr=1)"], ["StepLR(step_size=2) every epoch"]
                fit = {**FIT, "optimizers": optimizers, "schedulers": schedulers}
                run.fit_file.write_text(json.dumps(fit))
        text = report(the_plan, found)
        assert text.index("## Methods as they were run") < text.index("## Metrics")
        for row in (
            "| baseline | none | none | 1 | `SGD(lr=0.1)` | none | 32-true |",
            "| mine | `NoisyGradients(eps=1e-10, include=['*fc*'])` | none | 2 "
            "| `SGD(lr=0.1)` and `Adam(lr=1)` | `StepLR(step_size=2) every epoch` | bf16-mixed |",
            "| clip | none | value, 0.5 | 1, GradientAccumulationScheduler(x=4) | `SGD(lr=0.1)` | none | 32-true |",
            "| copy | none | none | 1 | not recorded | not recorded | 32-true |",  # by an older version
        ):
            assert row in text
        assert "baseline and copy have the same settings: what differs between them is chance." in text
        assert "mine trains without EarlyStopping, which baseline has." in text
        assert "baseline trains without GradientAccumulationScheduler, which clip has." in text

    def test_one_seed(self, tmp_path):
        text = report(plan(tmp_path, seeds=(5,)), done(plan(tmp_path, seeds=(5,))))
        assert "| znorm | 1 | 0.920 | - | +0.060 | - |\n" in text
        assert "- znorm: +0.060. One seed cannot tell a difference from chance." in text

    def test_one_method(self, tmp_path):
        text = report(plan(tmp_path, methods=("baseline",)), done(plan(tmp_path, methods=("baseline",))))
        assert text.startswith("# baseline: exp.yaml\n")
        assert "p-value" not in text
        assert "differences.png" not in text

    def test_several_methods(self, tmp_path):
        methods = ("a", "b", "c")
        the_plan = plan(tmp_path, methods)
        found = done(the_plan)
        text = report(the_plan, found)
        assert "p is adjusted by Holm's procedure for 2 methods, so that" in text
        assert "- c: +0.040 (-0.010 to +0.090). 3 seeds cannot tell (adjusted p = 0.148)." in text
        assert "level of 0.05 / 2, the strictest of Holm's procedure" in text
        diverged = [replace(m, value=math.nan) if (m.method, m.seed) == ("b", 1) else m for m in found]
        text = report(the_plan, diverged)
        assert "b cannot be tested, and p is not adjusted for it." in text
        assert "3 seeds cannot tell (p = 0.074)." in text

    def test_exploratory(self, tmp_path):
        looked = replace(plan(tmp_path), first_look=FirstLook("test/accuracy", (0, 1)))
        text = report(looked, done(looked))
        why = "Exploratory, no verdict: seeds were added after a first look at seeds 0, 1."
        assert f"- znorm: +0.020 (-0.005 to +0.045). {why}" in text
        assert "A test counts only at the first look" in text
        assert "A method is called better" not in text

    def test_values_per_seed(self, tmp_path):
        the_plan = plan(tmp_path)
        found = done(the_plan)
        text = report(the_plan, [m for m in found if (m.method, m.seed) != ("znorm", 1)])
        assert "| method | seed 0 | seed 1 | seed 2 |\n| --- | --: | --: | --: |" in text
        assert "| baseline | 0.810 | 0.820 | 0.830 |" in text
        assert "| znorm | 0.820 (+0.010) | - | 0.860 (+0.030) |" in text

    def test_in_which_order(self, tmp_path):
        """What is asked first comes first: the verdict, the differences, the curves, the values."""
        text = report(plan(tmp_path), done(plan(tmp_path)))
        marks = ("cannot tell", "differences.png", "## Curves", "train-loss.png", "## Values per", "## Methods as they")
        assert sorted(marks, key=text.index) == list(marks)

    def test_how_many_logged_values_a_number_is_the_mean_of(self, tmp_path):
        the_plan = plan(tmp_path)

        def sentence(metric, counts):
            found = [replace(m, count=counts[m.seed % 2]) if m.metric == metric else m for m in done(the_plan)]
            shutil.rmtree(tmp_path / "runs")
            done(the_plan)
            text = report(the_plan, found)
            shutil.rmtree(tmp_path / "runs")
            return text.split(f"### `{metric}`")[1].split("\n\n")[1]

        assert sentence("train/loss", (23, 23)).startswith("Each run's value is the mean of 23 logged numbers, each of")
        assert sentence("train/loss", (23, 22)).startswith("Each run's value is the mean of 22 to 23 logged numbers,")
        assert sentence("train/loss", (1, 1)).startswith(
            "Each run's value is the mean of 1 logged number, which is its"
        )
        assert sentence("val/accuracy", (1, 1)) == "Each run's value is the last number that was logged."
        assert sentence("test/accuracy", (1, 1)) == "Each run's value is the number that its test logged."

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
        text = report(plan(tmp_path), found)
        assert "| znorm | 2 | nan | - | nan | - |\n" in text
        assert "- znorm: nan. Not comparable: a value is not finite, so a run has diverged." in text

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

    def test_norms_of_several_optimizers_are_told_apart(self, tmp_path):
        found = done(plan(tmp_path))
        norms = [one for one in found if one.metric == "compare/gradient_norm"]
        two = [replace(one, metric=f"{one.metric}-{number}") for one in norms for number in (0, 1)]
        assert "Optimizer" not in report(plan(tmp_path), found)
        text = report(plan(tmp_path), [*(one for one in found if one not in norms), *two])
        for number in (0, 1):
            table = text.split(f"\nOptimizer {number}:\n")[1]
            assert table.strip().startswith("| method | first epoch | last epoch |")
            assert f"Gradient norm of optimizer {number} by epoch" in table

    def test_what_methods_have_in_common(self, tmp_path):
        found = done(plan(tmp_path))
        same = "all methods start from the same weights and see the same batches in the same order"

        def report_with(weights):
            for run in plan(tmp_path).study.runs:
                run.fit_file.write_text(json.dumps({**FIT, "weights": weights(run)}))
            return report(plan(tmp_path), found)

        assert same in report_with(lambda run: f"{run.seed}")
        # Sharded runs, of which each process has a part of the weights.
        text = report_with(lambda run: None)
        assert same not in text
        assert "start from the same weights is not known, because weights were sharded" in text
        text = report_with(lambda run: f"{run.seed}" + "x" * (run.name == "znorm-1"))
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
        assert "| baseline | 3 | 0.0000000110 | 0.0000000010 | - | - |\n" in report(plan(tmp_path), found)


NAMES = ("differences", "train-loss", "val-accuracy", "gradient-norm")


class TestFullDisk:
    @pytest.mark.parametrize("what", ["val-accuracy.png", "report.html", "report.md"])
    def test_the_rest_of_a_report_is_written(self, tmp_path, monkeypatch, what):
        """Half a file is written of one; the others are there, and the error names it."""
        the_plan = plan(tmp_path)
        found = done(the_plan)
        images = {"png": b"new", "svg": b"new"}
        for figure in ("plot", "forest"):
            monkeypatch.setattr(f"lightning_znorm.compare.report.{figure}", lambda *args: images)
        names = [f"figures/{name}.{kind}" for name in NAMES for kind in images]
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
    assert html.count('<img src="data:image/svg+xml;base64,') == 4
    assert not re.findall(r"https?:|url\(|<script|<link|@import", html)
    assert "<code>val/accuracy</code>" in html


ELEMENTS = """
{% call heading(2) %}H{% endcall %}
{% call points() %}
{% call point() %}a{% endcall %}
{% call point() %}b{% endcall %}
{% endcall %}
{{ code_block("x") -}}
{{ table(["m", "n"], [["a|b", "1"]], numbers=[1]) -}}
"""


def test_markdown():
    text = "## H\n\n- a\n- b\n\n```\nx\n```\n\n| m | n |\n| --- | --: |\n| a\\|b | 1 |\n"
    assert written("md", ELEMENTS) == text


def test_html_escapes():
    content = """
{% call paragraph() %}{{ report.text }} {{ report.name | code }}{% endcall %}
{{ code_block(report.script) -}}
{{ table(["<"], [[">"]]) -}}
"""
    html = written("html", content, "<title>", text="a < b &", name="c<d>", script="<script>")
    for raw in ("<script>", "a < b", "<d>", "<title><"):
        assert raw not in html
    assert "a &lt; b &amp; <code>c&lt;d&gt;</code>" in html


@pytest.mark.parametrize("kind", ["html", "md"])
def test_a_value_that_is_missing_is_an_error(kind):
    with pytest.raises(UndefinedError, match="has no attribute 'speeed'"):
        written(kind, "{% call paragraph() %}{{ report.speeed }}{% endcall %}")


def test_every_field_of_the_report_data_is_shown():
    shown = (TEMPLATES / "sections.j2").read_text(encoding="utf-8")
    assert [field.name for field in fields(ReportData) if f"report.{field.name}" not in shown] == []


class TestNewSection:
    """A section takes a function of the measurements, a field of the report data, and a block in sections.j2."""

    @dataclass(frozen=True)
    class Extended(ReportData):
        ends: dict[str, tuple[float, float]]

    BLOCK = """
{% call heading(2) %}Final {{ "train/loss" | code }}{% endcall %}
{% for method, (first, last) in report.ends.items() %}
{% call paragraph() %}{{ method }} ends at {{ last }}.{% endcall %}
{% endfor %}
"""

    def test_in_both_formats(self, tmp_path, monkeypatch):
        for figure in ("plot", "forest"):
            monkeypatch.setattr(f"lightning_znorm.compare.report.{figure}", lambda *args: {"png": b"", "svg": b""})
        the_plan = plan(tmp_path, methods=("base_line_", "z<norm>"))
        found = done(the_plan)
        known = data(the_plan, found, (), True)
        ends = first_and_last(found, "train/loss", known.methods)
        extended = self.Extended(**{field.name: getattr(known, field.name) for field in fields(known)}, ends=ends)
        sections = (TEMPLATES / "sections.j2").read_text(encoding="utf-8") + self.BLOCK
        loader = ChoiceLoader([DictLoader({"sections.j2": sections}), FileSystemLoader(TEMPLATES)])
        before, text = render(known, "md"), render(extended, "md", loader=loader)
        assert text.startswith(before)
        assert text.removeprefix(before).startswith("\n## Final `train/loss`\n\nbase_line\\_ ends at 0.0")
        assert "\n\nz\\<norm> ends at " in text
        html = render(extended, "html", loader=loader)
        assert "<h2>Final <code>train/loss</code></h2>\n<p>base_line_ ends at 0.0" in html
        assert "<p>z&lt;norm&gt; ends at " in html
