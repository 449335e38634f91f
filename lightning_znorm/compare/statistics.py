"""Differences between methods with their intervals, what the metric that decides tells, and speed.

Every method is compared with the first one, seed by seed, because the seeds themselves vary much more (Bouthillier et
al. 2021, Accounting for variance in machine learning benchmarks).
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from statistics import median, stdev

from lightning_znorm.compare.formatting import fixed, interval_text, p_text, signed
from lightning_znorm.compare.looks import FirstLook
from lightning_znorm.compare.power import FEWEST_SEEDS, MOST_SEEDS, SeedsNeeded, seeds_needed
from lightning_znorm.compare.results import (
    STEP_SECONDS,
    STUDY_PREFIX,
    TRAIN_SECONDS,
    Measurement,
    curves,
    is_count,
    last_counts,
    mean,
    stage,
)
from lightning_znorm.compare.study import Outcome, Plan, short_key

LEVEL = 0.05
"""Significance level: how often a study of methods without any effect may call one of them better or worse."""
_ROUNDING = 1e-3  # relative variation of equal differences between float32 metrics


@dataclass(frozen=True)
class Row:
    """A metric under a method.

    Attributes:
        metric: Name of the metric.
        method: Name of the method.
        seeds: Seeds of the runs that are done.
        values: Value of the metric for each of these seeds.
        mean: Mean of the values.
        spread: Standard deviation of the values over the seeds; ``None`` for one seed.
        difference: Mean difference from the first method, over the seeds that both have; ``None`` for the first method.
        interval: 95 % confidence interval of the difference; ``None`` for fewer than two seeds.
        verdict: What the seeds tell about the method, in words; empty for the first method, and for all metrics but the
            one that decides.
        p_value: p-value of the paired t test, adjusted for all methods that are compared (Holm); ``None`` where there
            is no verdict from a test.
        differences: Difference from the first method for each of the seeds, ``None`` where the first method lacks the
            seed; empty for the first method.
        counts: For each of the seeds, how many logged values its value is the mean of.

    Example:
        A study makes the rows. This one has the numbers of a study with three seeds:

        >>> from lightning_znorm.compare import Row
        >>> row = Row(
        ...     metric="test/accuracy",
        ...     method="znorm",
        ...     seeds=(0, 1, 2),
        ...     values=(0.97, 0.98, 0.96),
        ...     mean=0.97,
        ...     spread=0.01,
        ...     difference=0.005,
        ...     interval=(-0.02, 0.03),
        ...     differences=(0.01, 0.01, -0.005),
        ... )
        >>> f"{row.method}: {row.difference:+.3f}, 95 % interval from {row.interval[0]} to {row.interval[1]}"
        'znorm: +0.005, 95 % interval from -0.02 to 0.03'
    """

    metric: str
    method: str
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    mean: float
    spread: float | None
    difference: float | None
    interval: tuple[float, float] | None
    verdict: str = ""
    p_value: float | None = None
    differences: tuple[float | None, ...] = ()
    counts: tuple[int, ...] = ()

    @property
    def paired(self) -> list[float]:
        """The differences, over the seeds that both methods have."""
        return [difference for difference in self.differences if difference is not None]

    @property
    def has_diverged(self) -> bool:
        """Whether a difference is not finite."""
        return not all(map(math.isfinite, self.paired))


@dataclass(frozen=True)
class Table:
    """The result of a study: every metric under every method. ``print(table)`` prints the metric that decides.

    Attributes:
        metric: The metric that decides.
        rows: Every metric under every method; the metric that decides comes first.
        failures: Runs that failed. They are not in the rows. Each has ``run.name``, ``error`` (why it failed, with the
            end of its log), ``seconds`` (how long it took) and ``notes`` (a sentence about each damaged file that was
            set aside).
        output: Folder with ``results.csv``, ``report.md`` and ``report.html``.
        chosen: In a sweep, the values at which each method is compared, by swept setting.

    Example:
        `lightning_znorm.compare.run` returns such a table:

        >>> from pathlib import Path
        >>> from lightning_znorm.compare import Row, Table
        >>> baseline = Row("test/accuracy", "baseline", (0, 1), (0.96, 0.98), 0.97, 0.014, None, None)
        >>> znorm = Row("test/accuracy", "znorm", (0, 1), (0.97, 0.99), 0.98, 0.014, 0.01, (0.01, 0.01))
        >>> table = Table("test/accuracy", (baseline, znorm), (), Path("studies/digits"))
        >>> table.row("znorm").difference, table.failures
        (0.01, ())
    """

    metric: str
    rows: tuple[Row, ...]
    failures: tuple[Outcome, ...]
    output: Path
    chosen: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    def row(self, method: str, metric: str | None = None) -> Row:
        """Return the row of a method.

        Args:
            method: Name of the method.
            metric: Name of the metric; by default the one that decides.

        Raises:
            KeyError: If there is no such row.
        """
        metric = metric or self.metric
        for row in self.rows:
            if (row.method, row.metric) == (method, metric):
                return row
        raise KeyError(f"{metric} of {method}")

    def __str__(self) -> str:
        rows = [row for row in self.rows if row.metric == self.metric]
        names = [" ".join([row.method, *self._chosen(row.method)]) for row in rows]
        width = max(map(len, names), default=0)
        lines = [
            f"{name:<{width}}  {_numbers(row)}  {row.verdict}".rstrip() for name, row in zip(names, rows, strict=True)
        ]
        return "\n".join([self.metric, *lines])

    def _chosen(self, method: str) -> list[str]:
        values = self.chosen.get(method, {})
        return [f"{short_key(key, values)}={value}" for key, value in values.items()]


@dataclass(frozen=True)
class Reach:
    """How soon a method reaches the first method's final value of a metric.

    Args:
        method: Name of the method.
        epochs: Epochs it took, for each seed that got there.
        seconds: Seconds of training it took, for each of these seeds.
        seeds: Number of all seeds.
    """

    method: str
    epochs: tuple[int, ...]
    seconds: tuple[float, ...]
    seeds: int


def make_rows(plan: Plan, measurements: Sequence[Measurement]) -> Iterator[Row]:
    """Compare every metric under every method: test metrics as they are, others in the last epoch.

    Args:
        plan: The study.
        measurements: Everything that was logged by the runs that are done.
    """
    for metric in _in_order(plan.metric, {measurement.metric for measurement in measurements}):
        found = curves(measurements, metric)
        values = {
            method: {seed: curve[max(curve)] for seed, curve in found.get(method, {}).items()}
            for method in plan.study.files
        }
        rows = list(compare_methods(metric, values, last_counts(measurements, metric)))
        if metric == plan.metric:
            rows = judge(rows, plan.mode, plan.study.seeds, len(values) - 1, plan.exploratory, plan.unsettled)
        yield from rows


def compare_methods(
    metric: str, values: Mapping[str, Mapping[int, float]], counts: Mapping[str, Mapping[int, int]] | None = None
) -> Iterator[Row]:
    """Compare every method with the first, in numbers. `judge` adds words.

    Args:
        metric: Name of the metric.
        values: Value of the metric by method and seed.
        counts: By method and seed, how many logged values a value is the mean of; by default one.
    """
    first: Mapping[int, float] = next(iter(values.values()), {})
    for i, (method, by_seed) in enumerate(values.items()):
        if not by_seed:
            continue
        seeds = tuple(sorted(by_seed))
        all_values = tuple(by_seed[seed] for seed in seeds)
        spread = standard_deviation(all_values) if len(seeds) > 1 and all(map(math.isfinite, all_values)) else None
        differences = tuple(by_seed[seed] - first[seed] if seed in first else None for seed in seeds) if i else ()
        paired = [difference for difference in differences if difference is not None]
        yield Row(
            metric,
            method,
            seeds,
            all_values,
            mean(all_values),
            spread,
            difference=mean(paired) if paired else None,
            interval=paired_interval(paired),
            differences=differences,
            counts=tuple((counts or {}).get(method, {}).get(seed, 1) for seed in seeds),
        )


def judge(
    rows: Sequence[Row],
    mode: str,
    seeds: Collection[int] | None = None,
    compared: int | None = None,
    exploratory: str = "",
    unsettled: str = "",
) -> list[Row]:
    """Say what the metric that decides tells about each method, with the p-values behind it.

    A method is called better or worse if its p-value, adjusted for all methods that are compared, is below 0.05. There
    is no such verdict before all planned seeds are done: whoever stops at those that look well errs more often.

    Args:
        rows: Every method under one metric, the first method first.
        mode: Whether ``"max"`` or ``"min"`` of the metric is better.
        seeds: The seeds that were planned; by default those of the rows.
        compared: Number of methods that are compared with the first, also of those without a row; by default the rows'.
        exploratory: Why there is no verdict any more, as the end of a sentence; empty if there is one.
        unsettled: Why there is none yet, as the end of a sentence.
    """
    planned = {seed for row in rows for seed in row.seeds} if seeds is None else set(seeds)
    others = [row for row in rows if row.differences]
    size = family_size(others, len(others) if compared is None else compared)
    p_values = {row.method: p for row in others if (p := _p_value(row, len(planned))) is not None}
    tested = {} if exploratory or unsettled else p_values
    adjusted = holm(tested, size)
    judged = []
    for row in rows:
        words = _words(row, len(planned), exploratory, unsettled) if row.differences else ""
        if (p := adjusted.get(row.method)) is not None:
            words = _verdict(row, p, mode, size)
        judged.append(replace(row, verdict=words, p_value=p))
    return judged


def family_size(rows: Sequence[Row], compared: int) -> int:
    """Return for how many methods p-values are adjusted: all that are compared, without those that diverged."""
    return compared - sum(row.has_diverged for row in rows)


def look_at(plan: Plan, rows: Sequence[Row]) -> FirstLook | None:
    """Return the first look at a study, if this is it or if it was before; methods that were added are added to it.

    A sweep that is not settled has no verdict, so it is not a look.

    Args:
        plan: The study.
        rows: Its rows. A look sees an interval of the metric that decides, be it of some of the planned seeds.
    """
    methods = tuple(plan.study.files)
    if plan.first_look is None:
        has_interval = any(row.metric == plan.metric and row.interval is not None for row in rows)
        is_look = has_interval and not plan.unsettled
        return FirstLook(plan.metric, tuple(plan.study.seeds), methods, plan.study.sweep) if is_look else None
    if plan.exploratory or not plan.first_look.methods:
        return plan.first_look
    return replace(plan.first_look, methods=tuple(dict.fromkeys((*plan.first_look.methods, *methods))))


def p_value(differences: Sequence[float]) -> float | None:
    """Return the two-sided p-value of a paired t test.

    Args:
        differences: A difference for each seed.

    Returns:
        The p-value; ``None`` for fewer than two differences, if one is not finite, or if they do not vary.

    Example:
        >>> round(p_value([0.01, 0.02, 0.03]), 4)
        0.0742
    """
    from scipy.stats import t

    interval = paired_interval(differences)
    if interval is None or _is_point(interval):
        return None
    if not all(map(math.isfinite, interval)):
        return 1.0
    half = (interval[1] - interval[0]) / 2
    statistic = abs(mean(differences)) / half * t_quantile(len(differences))
    return float(2 * t.sf(statistic, df=len(differences) - 1))


def holm(p_values: Mapping[str, float], size: int) -> dict[str, float]:
    """Adjust p-values for several comparisons by Holm's step-down procedure.

    Holm 1979, A simple sequentially rejective multiple test procedure. If methods have no effect, the probability that
    any of their adjusted p-values is below 0.05 is at most 0.05, however the comparisons depend on one another: here
    all have the first method in common.

    Args:
        p_values: p-value by method.
        size: Number of comparisons, with those whose p-value is not known: they count as the largest.

    Example:
        >>> holm({"a": 0.03, "b": 0.01, "c": 0.04}, 3)
        {'b': 0.03, 'a': 0.06, 'c': 0.06}
    """
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, (method, p) in enumerate(sorted(p_values.items(), key=lambda item: item[1])):
        largest = max(largest, min(1.0, (size - rank) * p))
        adjusted[method] = largest
    return adjusted


def paired_interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """Return the 95 % confidence interval of the mean of paired differences (Student's t).

    Args:
        differences: A difference for each seed.

    Returns:
        The interval; ``None`` for fewer than two differences, or if one is not finite.

    Example:
        >>> low, high = paired_interval([1.0, 2.0, 3.0])
        >>> round(low, 3), round(high, 3)
        (-0.484, 4.484)
    """
    if len(differences) < 2 or not all(map(math.isfinite, differences)):
        return None
    middle = mean(differences)
    half = t_quantile(len(differences)) * standard_deviation(differences) / math.sqrt(len(differences))
    return middle - half, middle + half


def t_quantile(seeds: int) -> float:
    """Return the quantile of Student's t for a two-sided 95 % interval of the differences of this many seeds.

    Example:
        >>> round(t_quantile(3), 2)
        4.3
    """
    from scipy.stats import t

    return float(t.ppf(1 - LEVEL / 2, df=seeds - 1))


def standard_deviation(values: Sequence[float]) -> float:
    """Return the standard deviation of two or more finite values; infinite if it is too large for a float.

    Example:
        >>> standard_deviation([1.0, 3.0]) == math.sqrt(2), standard_deviation([1.7e308, -1.7e308])
        (True, inf)
    """
    try:
        return stdev(values)
    except OverflowError:
        return math.inf


def reaches(measurements: Sequence[Measurement], metric: str, mode: str, methods: Sequence[str]) -> list[Reach]:
    """Find, for every method and seed, the first epoch that is at least as good as the first method's last epoch.

    Args:
        measurements: Everything that was logged.
        metric: A metric that is logged every epoch.
        mode: Whether ``"max"`` or ``"min"`` of it is better.
        methods: Names of the methods, the first one first.
    """
    values, clocks = curves(measurements, metric), curves(measurements, TRAIN_SECONDS)
    sign = 1 if mode == "min" else -1
    found = []
    for method in methods:
        epochs, seconds, seeds = [], [], 0
        for seed, curve in values.get(method, {}).items():
            reference = values.get(methods[0], {}).get(seed)
            if not reference:
                continue
            seeds += 1
            goal = sign * reference[max(reference)]
            first = next((epoch for epoch in sorted(curve) if sign * curve[epoch] <= goal), None)
            if first is not None:
                epochs.append(first + 1)
                seconds.append(clocks.get(method, {}).get(seed, {}).get(first, float("nan")))
        found.append(Reach(method, tuple(epochs), tuple(seconds), seeds))
    return found


def step_seconds(measurements: Sequence[Measurement]) -> dict[str, dict[int, float]]:
    """Return the time of a training step by method and seed: the median over epochs, without the first of several."""
    found: dict[str, dict[int, float]] = {}
    for method, by_seed in curves(measurements, STEP_SECONDS).items():
        for seed, curve in by_seed.items():
            later = [curve[epoch] for epoch in sorted(curve)][1:] or list(curve.values())
            found.setdefault(method, {})[seed] = median(later)
    return found


def overheads(by_seed: Mapping[int, float], first: Mapping[int, float]) -> list[float]:
    """Return by which share a method's steps take longer than the first method's, for each seed that both have."""
    return [by_seed[seed] / first[seed] - 1 for seed in by_seed if first.get(seed)]


def first_and_last(
    measurements: Sequence[Measurement], metric: str, methods: Sequence[str]
) -> dict[str, tuple[float, float]]:
    """Return a metric in the first and in the last epoch, as means over seeds, for each method that logged it.

    Args:
        measurements: Everything that was logged.
        metric: Name of the metric.
        methods: Names of the methods.
    """
    found = curves(measurements, metric)
    ends = {}
    for method in methods:
        if by_seed := found.get(method, {}).values():
            first, last = (mean(curve[pick(curve)] for curve in by_seed) for pick in (min, max))
            ends[method] = first, last
    return ends


def _in_order(decides: str, metrics: Collection[str]) -> list[str]:
    """Order metrics: the one that decides, test, validation, others.

    What the study logs has its own sections. Numbers of masks and patients have no better and worse.
    """
    order = ["test", "val", "train", None]
    shown = [
        metric
        for metric in metrics
        if metric == decides or not (metric.startswith(STUDY_PREFIX) or metric.endswith("_step") or is_count(metric))
    ]
    return sorted(shown, key=lambda metric: (metric != decides, order.index(stage(metric)), metric))


def _p_value(row: Row, planned: int) -> float | None:
    """Return the p-value of a method that all planned seeds are done of."""
    return p_value(row.paired) if len(row.paired) == planned else None


def _is_point(interval: tuple[float, float]) -> bool:
    """Return whether an interval is as narrow as the rounding of its ends: the differences are the same."""
    return math.isclose(*interval, rel_tol=_ROUNDING)


def _words(row: Row, planned: int, exploratory: str, unsettled: str) -> str:
    """Say why there is no verdict on a method."""
    n = len(row.paired)
    if not n:
        return "No seed is done under both methods."
    if row.has_diverged:
        return "Not comparable: a value is not finite, so a run has diverged."
    if exploratory:
        return f"Exploratory, no verdict: {exploratory}."
    if unsettled:
        return f"No verdict yet: {unsettled}."
    if n < planned:
        return f"{n} of {planned} seeds are done under both methods: no verdict before all are."
    if not any(row.paired):
        return f"The same on {'the one seed' if n == 1 else f'each of {n} seeds'}."
    if n == 1:
        return "One seed cannot tell a difference from chance."
    return f"Differs by the same amount on each of {n} seeds: too few different values for a test."


def _verdict(row: Row, p: float, mode: str, size: int) -> str:
    """Say what the test tells about a method."""
    n = len(row.paired)
    shown = f"{'adjusted ' if size > 1 else ''}{p_text(p)}"
    if p < LEVEL:
        words = f"{'Better' if (mean(row.paired) > 0) == (mode == 'max') else 'Worse'}: {shown} with {n} seeds."
    else:
        words = f"{n} seeds cannot tell ({shown})."
        if n < FEWEST_SEEDS:
            return f"{words} With {FEWEST_SEEDS} or more, the report estimates how many would."
    needed = seeds_needed(row.paired, LEVEL / size)
    return f"{words} {_needed_text(needed)}" if needed else words


def _needed_text(needed: SeedsNeeded) -> str:
    if needed.low is None:
        return f"A new study needs more than {MOST_SEEDS} seeds for 80 % power."
    seeds, low, high = (
        f"more than {MOST_SEEDS}" if number is None else str(number)
        for number in (needed.seeds, needed.low, needed.high)
    )
    return f"A new study needs {seeds} seeds for 80 % power (80 % interval: {low} to {high})."


def _numbers(row: Row) -> str:
    spread = "" if row.spread is None else f" +- {fixed(row.spread, 4)}"
    difference = "" if row.difference is None else f"  {signed(row.difference, 4)}"
    interval = "" if row.interval is None else f" ({interval_text(row.interval, 4)})"
    return f"{fixed(row.mean, 4)}{spread}{difference}{interval}"
