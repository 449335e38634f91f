"""The report of a study: its data, and the templates that write it as HTML and Markdown.

To add a section: a function in ``statistics``, a field of `ReportData`, and a block in ``templates/sections.j2``. There
each sentence stands once; ``report.html.j2`` and ``report.md.j2`` say how elements, such as tables, are written.
"""

import base64
import math
import re
import shlex
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from itertools import count
from pathlib import Path
from typing import Any, Literal, TypeAlias

from jinja2 import BaseLoader, Environment, FileSystemLoader, StrictUndefined, pass_context
from jinja2.runtime import Context
from markupsafe import Markup

from lightning_znorm.compare.advice import advise
from lightning_znorm.compare.files import with_path, write_text
from lightning_znorm.compare.formatting import (
    Code,
    Inline,
    clock,
    decimals,
    fixed,
    html,
    html_preformatted,
    interval_text,
    joined,
    markdown,
    markdown_in_brackets,
    markdown_line,
    markdown_preformatted,
    plain,
    relative_path,
    signed,
)
from lightning_znorm.compare.plots import Curves, SweptValue, forest, plot, plot_sweep
from lightning_znorm.compare.results import (
    GRADIENT_NORM,
    Evaluation,
    Measurement,
    curves,
    mean,
    read_fit,
    read_test,
    stage,
    train_loss,
)
from lightning_znorm.compare.runner import command_to_fit, command_to_test
from lightning_znorm.compare.settings import (
    as_call,
    changed_settings,
    class_name,
    gradient_callbacks,
    kept_callbacks,
    same_settings,
    settings_hash,
)
from lightning_znorm.compare.statistics import (
    Reach,
    Row,
    Table,
    family_size,
    first_and_last,
    overheads,
    paired_interval,
    reaches,
    standard_deviation,
    step_seconds,
)
from lightning_znorm.compare.study import Outcome, Plan, Run, short_key
from lightning_znorm.compare.sweep import Sweep, best_trial

Format: TypeAlias = Literal["html", "md"]
Cells: TypeAlias = tuple[Inline, ...]
"""A row of a table."""
TEMPLATES = Path(__file__).parent / "templates"
_LONGEST_NAME = 100
"""Bytes of a figure's file name, without its ending: the name of a metric may have any length."""


@dataclass(frozen=True)
class Figure:
    """An image.

    Args:
        name: Name of its files, without an ending.
        caption: What it shows.
        images: The image, as ``"png"`` and as ``"svg"``.
    """

    name: str
    caption: Inline
    images: dict[str, bytes] = field(repr=False)


@dataclass(frozen=True)
class MetricSection:
    """The table of a metric.

    Args:
        name: Name of the metric.
        is_tested: Whether it was measured in the test, and not in training.
        is_last_value: Whether its values are the last ones that were logged, as in validation, and not means.
        counts: Smallest and largest number of logged values that a value is the mean of.
        rows: A row for each method.
    """

    name: str
    is_tested: bool
    is_last_value: bool
    counts: tuple[int, int]
    rows: list[Cells]


@dataclass(frozen=True)
class NormSection:
    """The table and the figure of a gradient norm.

    Args:
        optimizer: The number of the optimizer whose gradients these are; empty if there is only one.
        rows: A row for each method.
        figure: The norm by epoch.
    """

    optimizer: str
    rows: list[Cells]
    figure: Figure


@dataclass(frozen=True)
class SweepSection:
    """How each method's values were chosen.

    Args:
        metric: The validation metric that chose.
        mode: Whether ``"max"`` or ``"min"`` of it is better.
        keys: The swept settings.
        chosen: For each method, the values at which it is compared.
        warnings: A sentence for each method whose values are not settled.
        rows: A row for each method at each point.
        figures: The metric over the values of each setting.
    """

    metric: str
    mode: str
    keys: list[str]
    chosen: list[tuple[str, str]]
    warnings: list[str]
    rows: list[Cells]
    figures: list[Figure]


@dataclass(frozen=True)
class ReportData:
    """Everything that the templates show.

    Args:
        title: Title of the report.
        sweep: In a sweep, how each method's values were chosen; ``None`` without one.
        untuned: Without a sweep, the optimizer settings that all methods ran with; empty if each has its own.
        advice: What to try if a method's usual learning rates lie elsewhere.
        methods: Names of the methods; the others are compared with the first.
        seeds: Seeds of the study.
        done: Number of runs that are done.
        total: Number of runs.
        metric: The metric that decides.
        mode: Whether ``"max"`` or ``"min"`` of it is better.
        monitor: Metric that chose the best checkpoints, and its mode; ``None`` if the last ones were tested.
        alone: Whether each run had the machine to itself, as far as the study knows.
        other_weights: Methods whose runs start from other weights than the first method's.
        knows_weights: Whether all runs have told which weights they started from. Sharded runs cannot.
        other_data: Methods whose settings of the data are not the first method's.
        verdicts: For each method, what the metric that decides tells.
        exploratory: Why there are no verdicts from a test any more, as the end of a sentence; empty if there are.
        unsettled: Why there are none yet, as the end of a sentence.
        compared: For how many methods p-values are adjusted.
        diverged: Methods that are not among these, because a value is not finite.
        forest: Figure of the differences of the metric that decides; ``None`` if there are none.
        values: For each method, the value of the metric that decides for each seed, with the difference.
        setups: For each method, what it does with gradients, its optimizers with their schedulers, and its precision.
        same_settings: Groups of methods with the same settings.
        missing_callbacks: A method, callbacks that it does not have, and a method that has them.
        failures: Runs that failed.
        metrics: Each metric under every method.
        reaches: Metrics, and how soon each method reaches the first method's last value.
        step_times: For each method, the time of a training step.
        curves: Figures of the training loss and the validation metric.
        gradient_norms: Gradient norms under every method.
        tests: For each run, which epoch was tested.
        environment: Names and values of what the runs ran on.
        training_time: Time of all trainings.
        has_several_versions: Whether the runs were made with different versions.
        changed_settings: For each method, settings that differ from the first method's.
        hashes: Hash of each method's settings.
        study_command: Command that runs the study.
        run_commands: Commands that run one run.
    """

    title: str
    sweep: SweepSection | None
    untuned: Inline
    advice: list[str]
    methods: list[str]
    seeds: Sequence[int]
    done: int
    total: int
    metric: str
    mode: str
    monitor: tuple[str, str] | None
    alone: bool
    other_weights: list[str]
    knows_weights: bool
    other_data: list[str]
    verdicts: list[tuple[str, str]]
    exploratory: str
    unsettled: str
    compared: int
    diverged: list[str]
    forest: Figure | None
    values: list[Cells]
    setups: list[Cells]
    same_settings: list[list[str]]
    missing_callbacks: list[tuple[str, list[str], str]]
    failures: Sequence[Outcome]
    metrics: list[MetricSection]
    reaches: list[tuple[str, list[Cells]]]
    step_times: list[Cells]
    curves: list[Figure]
    gradient_norms: list[NormSection]
    tests: list[Cells]
    environment: list[tuple[str, list[str]]]
    training_time: str
    has_several_versions: bool
    changed_settings: list[Cells]
    hashes: list[tuple[str, str]]
    study_command: str
    run_commands: str

    @property
    def figures(self) -> list[Figure]:
        """All figures."""
        first = [] if self.forest is None else [self.forest]
        swept = [] if self.sweep is None else self.sweep.figures
        return [*first, *swept, *self.curves, *(norm.figure for norm in self.gradient_norms)]


def build_report(
    plan: Plan,
    measurements: Sequence[Measurement],
    table: Table,
    command: str,
    alone: bool,
    sweep: Sweep | None = None,
) -> ReportData:
    """Collect what the report of a study shows.

    Args:
        plan: The study; of a sweep, the runs that are compared.
        measurements: Everything that was logged by the runs of the plan that are done.
        table: Every metric under every method, and the runs that failed.
        command: Command that runs the study.
        alone: Whether each run had the machine to itself, as far as the study knows.
        sweep: The result of the sweep, if there was one.
    """
    study, methods = plan.study, list(plan.study.files)
    first, *others = methods
    failed = {outcome.run.folder for outcome in table.failures}
    done = [run for run in study.runs if run.is_done and run.folder not in failed]
    fits = {run: fit for run in done if (fit := read_fit(run)) is not None}
    tests = {run: tested for run in done if (tested := read_test(run)) is not None}
    changes = {method: changed_settings(plan.settings[first], plan.settings[method]) for method in others}
    name_files = _FileNames()
    deciding = [row for row in table.rows if row.metric == table.metric]
    differences = _forest(plan, deciding)
    versions = sorted({", ".join(f"{k} {v}" for k, v in fit["versions"].items()) for fit in fits.values()})
    optimizers = {
        method: list(dict.fromkeys(name for run, fit in fits.items() if run.method == method for name in _used(fit)))
        for method in methods
    }
    return ReportData(
        title=_title(plan),
        sweep=None if sweep is None else _sweep_section(plan, sweep, name_files),
        untuned=_untuned(optimizers),
        advice=advise(plan, optimizers),
        methods=methods,
        seeds=study.seeds,
        done=sweep.done if sweep else len(fits),
        total=sweep.total if sweep else len(study.runs),
        metric=plan.metric,
        mode=plan.mode,
        monitor=plan.monitor,
        alone=alone,
        other_weights=[method for method in others if _starts_elsewhere(plan, fits, method)],
        knows_weights=all(fit.get("weights") is not None for fit in fits.values()),
        other_data=[method for method in others if any(key.startswith("data.") for key, *_ in changes[method])],
        verdicts=_verdicts(deciding),
        exploratory=plan.exploratory,
        unsettled=plan.unsettled,
        compared=family_size(deciding, len(others)),
        diverged=[row.method for row in deciding if row.has_diverged],
        forest=None if differences is None else name_files(differences),
        values=_values(plan, deciding),
        setups=[_setup(plan, fits, method) for method in methods],
        same_settings=same_settings(plan.settings),
        missing_callbacks=_missing_callbacks(plan),
        failures=table.failures,
        metrics=_metric_sections(table.rows, {name for tested in tests.values() for name in tested.metrics}),
        reaches=_reaches(plan, measurements),
        step_times=_step_times(step_seconds(measurements), methods, alone),
        curves=[name_files(figure) for figure in curve_figures(plan, measurements)],
        gradient_norms=[
            replace(norm, figure=name_files(norm.figure)) for norm in _gradient_norms(measurements, methods)
        ],
        tests=_tests(plan, fits, tests),
        environment=_environment(fits.values(), versions),
        training_time=clock(sweep.seconds if sweep else sum(fit["seconds"] for fit in fits.values())),
        has_several_versions=len(versions) > 1,
        changed_settings=[(method, *change) for method in others for change in changes[method]],
        hashes=[(name, settings_hash(settings)) for name, settings in plan.settings.items()],
        study_command=command,
        run_commands=_run_commands(plan),
    )


def render(report: ReportData, kind: Format, template: str | None = None, loader: BaseLoader | None = None) -> str:
    """Render a report.

    Args:
        report: Its data.
        kind: Its format.
        template: Name of the template; by default ``report.html.j2`` or ``report.md.j2``.
        loader: Where templates are found; by default in this package.
    """
    found = _templates(kind, loader or FileSystemLoader(TEMPLATES)).get_template(template or f"report.{kind}.j2")
    return found.render(report=report).strip("\n") + "\n"


def write_report(report: ReportData, folder: Path) -> None:
    """Write ``report.md`` with its figures, and ``report.html``.

    Args:
        report: The data of the report.
        folder: Where to write.

    Raises:
        OSError: If a file cannot be written. The error has its path, and all other files are written.
    """
    files: dict[Path, str | bytes] = {
        folder / "report.md": render(report, "md"),
        folder / "report.html": render(report, "html"),
    }
    for figure in report.figures:
        files |= {folder / "figures" / f"{figure.name}.{kind}": image for kind, image in figure.images.items()}
    failures = []
    for path, content in files.items():
        try:
            _write(path, content)
        except OSError as error:
            failures.append(error)
    if failures:
        raise failures[0]


def curve_figures(plan: Plan, measurements: Sequence[Measurement]) -> list[Figure]:
    """Draw the training loss and the validation metric by epoch.

    Args:
        plan: The study.
        measurements: Everything that was logged.
    """
    methods = list(plan.study.files)
    return [
        _figure(metric, (Code(metric), " by epoch"), curves(measurements, metric), methods)
        for metric, _ in _followed(plan, measurements)
    ]


def _templates(kind: Format, loader: BaseLoader) -> Environment:
    """Return an environment for templates in which every value is escaped, unless it is markup already."""
    write, preformatted = {
        "html": (html, html_preformatted),
        "md": (markdown, markdown_preformatted),
    }[kind]

    def inline(value: Any) -> Markup:
        if isinstance(value, Markup):
            return value
        return Markup(write(value if isinstance(value, tuple | str) else str(value)))

    @pass_context  # otherwise Jinja escapes constants such as `"results.csv" | code` when it compiles the template
    def code(context: Context, text: str) -> Code:
        return Code(text)

    def on_one_line(value: Any) -> Markup:
        line = re.sub(r"\s*\n\s*", " ", inline(value)).strip()
        return Markup(markdown_line(line) if kind == "md" else line)

    environment = Environment(
        loader=loader,
        autoescape=True,  # finalize has escaped all values by then, so it only keeps markup from being escaped again
        finalize=inline,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {
        "code": code,
        "plain": plain,
        "on_one_line": on_one_line,
        "preformatted": lambda text: Markup(preformatted(text)),
        "cell": lambda text: Markup(markdown(text, in_cell=True)),
        "in_brackets": lambda text: Markup(markdown_in_brackets(text)),
        "base64": lambda content: base64.b64encode(content).decode(),
    }
    return environment


def _write(path: Path, content: str | bytes) -> None:
    if isinstance(content, str):
        write_text(path, content)
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    except OSError as error:
        with suppress(OSError):  # half an image, or one of an older report
            path.unlink(missing_ok=True)
        raise with_path(error, path) from error


class _FileNames:
    """Gives every figure a file name of its own that every disk takes, also if it ignores the case of letters."""

    def __init__(self) -> None:
        self._taken: set[str] = set()

    def __call__(self, figure: Figure) -> Figure:
        short = figure.name.encode()[:_LONGEST_NAME].decode(errors="ignore")
        names = (short if i == 1 else f"{short}-{i}" for i in count(1))
        name = next(name for name in names if name.casefold() not in self._taken)
        self._taken.add(name.casefold())
        return replace(figure, name=name)


def _sweep_section(plan: Plan, sweep: Sweep, name_files: "_FileNames") -> SweepSection:
    study = plan.study
    digits = decimals([], [score for trial in sweep.trials for score in trial.validation.values()])
    rows: list[Cells] = []
    for trial in sweep.trials:
        scores = list(trial.validation.values())
        spread = standard_deviation(scores) if len(scores) > 1 and all(map(math.isfinite, scores)) else None
        rows.append(
            (
                trial.method,
                study.label(trial.point),
                str(len(scores)),
                fixed(trial.score, digits) if scores else "-",
                "-" if spread is None else fixed(spread, digits),
                fixed(mean(trial.values.values()), digits) if scores else "-",
                "chosen" if trial.chosen else "",
            )
        )
    figures = [name_files(_sweep_figure(plan, sweep, key, list(values))) for key, values in study.sweep]
    chosen = [(trial.method, study.label(trial.point)) for trial in sweep.trials if trial.chosen]
    return SweepSection(sweep.metric, sweep.mode, study.swept, chosen, sweep.warnings, rows, figures)


def _sweep_figure(plan: Plan, sweep: Sweep, key: str, values: list[str]) -> Figure:
    """Draw the metric over the values of a setting, each with the best values of the others."""
    by_method: dict[str, list[SweptValue]] = {}
    for method in plan.study.files:
        for value in values:
            trials = [trial for trial in sweep.trials if trial.method == method and dict(trial.point)[key] == value]
            best = best_trial(trials, sweep.mode)
            swept = SweptValue(value, list(best.validation.values()), any(trial.chosen for trial in trials))
            by_method.setdefault(method, []).append(swept)
    short = short_key(key, plan.study.swept)
    caption: Inline = (
        *(Code(sweep.metric), " over ", Code(short)),
        ": mean over seeds, and a dot for each. Filled: chosen. Values that are not finite are left out.",
    )
    if len(plan.study.sweep) > 1:
        caption = (*caption, " Each value stands with the best values of the other settings.")
    return Figure(f"sweep-{short}", caption, plot_sweep(by_method, values, short, sweep.metric))


def _used(fit: Mapping[str, Any]) -> list[str]:
    """Return the optimizers that a run recorded."""
    return list(fit.get("optimizers") or [])


def _untuned(optimizers: Mapping[str, Sequence[str]]) -> Inline:
    """Return the optimizers that all methods ran with; empty if they differ, or were not recorded."""
    found = [tuple(names) for names in optimizers.values() if names]
    return joined(" and ", map(Code, found[0])) if found and len({*found}) == 1 else ""


def _title(plan: Plan) -> str:
    first, *others = plan.study.files
    what = f"{', '.join(others)} against {first}" if others else first
    return f"{what}: {' + '.join(plan.study.configs) or 'an experiment of flags'}"


def _starts_elsewhere(plan: Plan, fits: Mapping[Run, dict[str, Any]], method: str) -> bool:
    """Return whether a run of a method began with other weights than the first method's run of the same seed."""
    first = next(iter(plan.study.files))
    weights = {(run.method, run.seed): fit.get("weights") for run, fit in fits.items()}
    pairs = [((method, seed), (first, seed)) for seed in plan.study.seeds]
    return any(weights[one] != weights[other] for one, other in pairs if one in weights and other in weights)


def _setup(plan: Plan, fits: Mapping[Run, dict[str, Any]], method: str) -> Cells:
    """Return what a method does with gradients, and its optimizers, as its runs had them."""
    settings, trainer = plan.settings[method], plan.settings[method]["trainer"]
    found = [fit for run, fit in fits.items() if run.method == method]
    by_code = [fit.get("methods", {}) for fit in found]
    added = dict.fromkeys(name for methods in by_code for name in methods.get("added", []))
    attached = dict.fromkeys(name for methods in by_code for name in methods.get("attached", []))
    callbacks: list[Inline] = [Code(as_call(entry)) for entry in gradient_callbacks(settings)]
    callbacks += [(Code(name), ", added by code") for name in added]
    callbacks += [f"a method attached to {name}" for name in attached]
    clip = trainer.get("gradient_clip_val")
    clipping = f"{trainer.get('gradient_clip_algorithm') or 'norm'}, {clip}" if clip else "none"
    schedulers = [entry for entry in kept_callbacks(settings) if class_name(entry) == "GradientAccumulationScheduler"]
    batches = ", ".join([str(trainer.get("accumulate_grad_batches") or 1), *map(as_call, schedulers)])
    optimizers = dict.fromkeys(joined(" and ", map(Code, fit["optimizers"])) for fit in found if fit.get("optimizers"))
    recorded = [fit["schedulers"] for fit in found if "schedulers" in fit]
    rates = dict.fromkeys(joined(" and ", map(Code, schedules)) or "none" for schedules in recorded)
    return (
        method,
        joined("; then ", callbacks) or "none",
        clipping,
        batches,
        joined("; ", optimizers) or "not recorded",
        joined("; ", rates) or "not recorded",
        str(trainer.get("precision") or "32-true"),
    )


def _missing_callbacks(plan: Plan) -> list[tuple[str, list[str], str]]:
    """Find the methods whose files replace callbacks of the experiment."""
    first, *others = plan.study.files
    known = _other_callbacks(plan.settings[first])
    found = []
    for method in others:
        names = _other_callbacks(plan.settings[method])
        for one, other, missing in ((method, first, known - names), (first, method, names - known)):
            if missing:
                found.append((one, sorted(missing), other))
    return found


def _other_callbacks(settings: dict[str, Any]) -> set[str]:
    """Return the classes of the callbacks that do not transform gradients."""
    transforms = gradient_callbacks(settings)
    return {class_name(entry) for entry in kept_callbacks(settings) if entry not in transforms}


def _verdicts(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Return method and verdict of the rows of the metric that decides."""
    digits = _decimals(rows)
    found = []
    for row in rows:
        if row.verdict:
            interval = "" if row.interval is None else f" ({interval_text(row.interval, digits)})"
            difference = "" if row.difference is None else f"{signed(row.difference, digits)}{interval}. "
            found.append((row.method, f"{difference}{row.verdict}"))
    return found


def _forest(plan: Plan, rows: Sequence[Row]) -> Figure | None:
    """Draw the differences of the metric that decides, if there are any."""
    paired = {row.method: row.paired for row in rows if row.paired}
    if not paired:
        return None
    methods = list(plan.study.files)
    shown = ": mean with its 95 % interval, and a dot for each seed."
    caption = ("Difference of ", Code(plan.metric), f" from {methods[0]}{shown}")
    intervals = {row.method: row.interval for row in rows}
    return Figure("differences", caption, forest(paired, intervals, methods, plan.metric, plan.mode))


def _values(plan: Plan, rows: Sequence[Row]) -> list[Cells]:
    """Return the value of the metric that decides for each method and seed, with the difference in parentheses."""
    digits = _decimals(rows)
    cells: list[Cells] = []
    for row in rows:
        differences = dict(zip(row.seeds, row.differences, strict=False))  # the first method has none
        shown = {}
        for seed, value in zip(row.seeds, row.values, strict=True):
            difference = differences.get(seed)
            shown[seed] = fixed(value, digits) + ("" if difference is None else f" ({signed(difference, digits)})")
        cells.append((row.method, *(shown.get(seed, "-") for seed in plan.study.seeds)))
    return cells


def _metric_sections(rows: Sequence[Row], tested: set[str]) -> list[MetricSection]:
    sections = []
    for metric in dict.fromkeys(row.metric for row in rows):
        own = [row for row in rows if row.metric == metric]
        digits = _decimals(own)
        counts = [count for row in own for count in row.counts]
        cells = [_cells(row, digits) for row in own]
        is_last_value = stage(metric) == "val"
        sections.append(MetricSection(metric, metric in tested, is_last_value, (min(counts), max(counts)), cells))
    return sections


def _cells(row: Row, digits: int) -> Cells:
    spread = "-" if row.spread is None else fixed(row.spread, digits)
    difference = "-" if row.difference is None else signed(row.difference, digits)
    interval = "-" if row.interval is None else interval_text(row.interval, digits)
    return (row.method, str(len(row.seeds)), fixed(row.mean, digits), spread, difference, interval)


def _decimals(rows: Sequence[Row]) -> int:
    """Return the decimals that suit the numbers of a metric."""
    return decimals([number for row in rows for number in (row.spread, row.difference)], [row.mean for row in rows])


def _followed(plan: Plan, measurements: Iterable[Measurement]) -> list[tuple[str, str]]:
    """Return the training loss and the validation metric, with their modes."""
    logged = {measurement.metric for measurement in measurements}
    loss = train_loss(logged)
    found = [(loss, "min")] if loss else []
    if plan.monitor and plan.monitor[0] in logged and plan.monitor[0] != loss:
        found.append(plan.monitor)
    return found


def _reaches(plan: Plan, measurements: Sequence[Measurement]) -> list[tuple[str, list[Cells]]]:
    found = []
    for metric, mode in _followed(plan, measurements):
        rows = [_reach(reach) for reach in reaches(measurements, metric, mode, list(plan.study.files)) if reach.seeds]
        if rows:
            found.append((metric, rows))
    return found


def _reach(reach: Reach) -> Cells:
    get_there = f"{len(reach.epochs)} of {reach.seeds}"
    if len(reach.epochs) < reach.seeds:  # a mean over the lucky seeds would mislead
        return reach.method, "-", "-", get_there
    return reach.method, f"{mean(reach.epochs):.1f}", f"{mean(reach.seconds):.4g}", get_there


def _step_times(steps: Mapping[str, Mapping[int, float]], methods: Sequence[str], alone: bool) -> list[Cells]:
    rows: list[Cells] = []
    for method in methods:
        if method in steps:
            time = f"{1000 * mean(steps[method].values()):.4g}"
            extra = [] if method == methods[0] else overheads(steps[method], steps.get(methods[0], {}))
            interval = paired_interval(extra)
            ends = "-" if interval is None else " to ".join(f"{end:+.1%}" for end in interval)
            costs = (f"{mean(extra):+.1%}" if extra else "-", ends) if alone else ()
            rows.append((method, time, *costs))
    return rows


def _gradient_norms(measurements: Sequence[Measurement], methods: Sequence[str]) -> list[NormSection]:
    names = sorted({m.metric for m in measurements if m.metric.startswith(GRADIENT_NORM)})
    sections = []
    for name in names:
        ends = first_and_last(measurements, name, methods)
        rows: list[Cells] = [(method, f"{first:.4g}", f"{last:.4g}") for method, (first, last) in ends.items()]
        optimizer = name.removeprefix(GRADIENT_NORM).removeprefix("-")
        label = f"gradient norm of optimizer {optimizer}" if optimizer else "gradient norm"
        caption = f"{label.capitalize()} by epoch, before the method"
        sections.append(NormSection(optimizer, rows, _figure(label, (caption,), curves(measurements, name), methods)))
    return sections


def _figure(label: str, what: tuple[str, ...], found: Curves, methods: Sequence[str]) -> Figure:
    several = max(map(len, found.values()), default=1) > 1
    band = " Line: mean over seeds; band: from the lowest seed to the highest." if several else ""
    name = re.sub(r"[^\w.]+", "-", label).strip("-.") or "figure"
    return Figure(name, (*what, f".{band}"), plot(found, methods, label))


def _tests(plan: Plan, fits: Mapping[Run, dict[str, Any]], tests: Mapping[Run, Evaluation]) -> list[Cells]:
    methods = list(plan.study.files)
    rows: list[Cells] = []
    for run in sorted(tests, key=lambda run: methods.index(run.method)):
        tested = tests[run]
        value = "-" if tested.value is None else f"{tested.value:.4g}"
        row = (run.method, str(run.seed), str(tested.epoch + 1), str(fits[run]["epochs"]))
        rows.append((*row, value) if plan.monitor else row)
    return rows


def _environment(fits: Iterable[dict[str, Any]], versions: list[str]) -> list[tuple[str, list[str]]]:
    found = list(fits)
    if not found:
        return []
    keys = ("device", "threads", "parameters", "epochs")
    values = [(key.capitalize(), sorted({str(fit[key]) for fit in found})) for key in keys]
    return [*values, ("Versions", versions)]


def _run_commands(plan: Plan) -> str:
    """Return the commands of the last run, as the study runs it, and as a user would type it."""
    run = plan.study.runs[-1]
    commands = (command_to_fit(run)[:3], command_to_test(run, plan.monitored))
    by_study = [f"python -m lightning_znorm {shlex.join(map(relative_path, args))}" for args in commands]
    by_hand = [*plan.study.fit_args(run.method), "--seed_everything", str(run.seed)]
    return "\n".join([*by_study, "", f"python -m lightning_znorm {shlex.join(by_hand)}"])
