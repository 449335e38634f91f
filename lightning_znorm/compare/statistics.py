"""Differences between methods with their intervals, the number of seeds that would suffice, and speed.

Every method is compared with the first one, seed by seed.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median, stdev

from lightning_znorm.compare.formatting import fixed, interval_text, signed
from lightning_znorm.compare.results import (
    STEP_SECONDS,
    STUDY_PREFIX,
    TRAIN_SECONDS,
    Measurement,
    curves,
    default_mode,
    mean,
    stage,
)
from lightning_znorm.compare.study import Outcome, Plan

_CONFIDENCE = 0.95
_ROUNDING = 1e-3  # relative variation of equal differences between float32 metrics
_MAX_SEEDS = 50


@dataclass(frozen=True)
class Row:
    """A metric under a method.

    Args:
        metric: Name of the metric.
        method: Name of the method.
        seeds: Seeds of the runs that are done.
        values: Value of the metric for each of these seeds.
        mean: Mean of the values.
        spread: Standard deviation of the values over the seeds; ``None`` for one seed.
        difference: Mean difference from the first method, over the seeds that both have; ``None`` for the first method.
        interval: 95 % confidence interval of the difference; ``None`` for fewer than two seeds.
        verdict: A sentence that says whether the seeds suffice to tell the method from the first.
    """

    metric: str
    method: str
    seeds: tuple[int, ...]
    values: tuple[float, ...]
    mean: float
    spread: float | None
    difference: float | None
    interval: tuple[float, float] | None
    verdict: str


@dataclass(frozen=True)
class Table:
    """The result of a study: every metric under every method.

    Args:
        metric: The metric that decides.
        rows: Every metric under every method; the metric that decides comes first.
        failures: Runs that failed. They are not in the rows.
        output: Folder with ``results.csv``, ``report.md`` and ``report.html``.
    """

    metric: str
    rows: tuple[Row, ...]
    failures: tuple[Outcome, ...]
    output: Path

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
        width = max((len(row.method) for row in rows), default=0)
        lines = [f"{row.method:<{width}}  {_numbers(row)}  {row.verdict}".rstrip() for row in rows]
        return "\n".join([self.metric, *lines])


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
    modes = dict([plan.monitor] if plan.monitor else []) | {plan.metric: plan.mode}
    for metric in _in_order(plan.metric, {measurement.metric for measurement in measurements}):
        found = curves(measurements, metric)
        values = {
            method: {seed: curve[max(curve)] for seed, curve in found.get(method, {}).items()}
            for method in plan.study.files
        }
        yield from compare_methods(metric, values, modes.get(metric) or default_mode(metric))


def compare_methods(metric: str, values: Mapping[str, Mapping[int, float]], mode: str | None) -> Iterator[Row]:
    """Compare every method with the first.

    Args:
        metric: Name of the metric.
        values: Value of the metric by method and seed.
        mode: Whether ``"max"`` or ``"min"`` of it is better; ``None`` if that is not known.
    """
    first: Mapping[int, float] = next(iter(values.values()), {})
    for i, (method, by_seed) in enumerate(values.items()):
        if not by_seed:
            continue
        seeds = tuple(sorted(by_seed))
        all_values = tuple(by_seed[seed] for seed in seeds)
        spread = standard_deviation(all_values) if len(seeds) > 1 and all(map(math.isfinite, all_values)) else None
        paired = [by_seed[seed] - first[seed] for seed in seeds if seed in first]
        difference = mean(paired) if i and paired else None
        interval = paired_interval(paired) if i else None
        verdict = judge(paired, interval, mode) if i else ""
        yield Row(metric, method, seeds, all_values, mean(all_values), spread, difference, interval, verdict)


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

    return float(t.ppf((1 + _CONFIDENCE) / 2, df=seeds - 1))


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


def seeds_needed(differences: Sequence[float]) -> int | None:
    """Return how many seeds would tell a difference of this mean and spread from zero; ``None`` if more than 50."""
    size, spread = abs(mean(differences)), standard_deviation(differences)
    numbers = range(len(differences) + 1, _MAX_SEEDS + 1)
    return next((n for n in numbers if t_quantile(n) * spread / math.sqrt(n) < size), None)


def judge(differences: Sequence[float], interval: tuple[float, float] | None, mode: str | None) -> str:
    """Return a sentence that says what paired differences tell.

    Args:
        differences: A difference for each seed that both methods have.
        interval: Their interval, as `paired_interval` returns it.
        mode: Whether ``"max"`` or ``"min"`` of the metric is better; ``None`` if that is not known.
    """
    n = len(differences)
    if not n:
        return "No seed is done under both methods."
    if not all(map(math.isfinite, differences)):
        return "Not comparable: a value is not finite, so a run has diverged."
    if not any(differences):
        return f"The same on {'the one seed' if n == 1 else f'each of {n} seeds'}."
    words = {"max": ("better", "worse"), "min": ("worse", "better"), None: ("higher", "lower")}[mode]
    word = words[0] if mean(differences) > 0 else words[1]
    if interval is None:
        return f"One seed, where it is {word}, cannot tell a difference from chance."
    if math.isclose(*interval, rel_tol=_ROUNDING):
        return (
            f"{word.capitalize()}, by the same amount on each of {n} seeds: too few different values for an interval."
        )
    if interval[0] > 0 or interval[1] < 0:
        return f"{word.capitalize()}: {n} seeds suffice to tell."
    more = seeds_needed(differences)
    advice = f"about {more} seeds would" if more else f"even {_MAX_SEEDS} seeds would not"
    return f"{n} seeds cannot tell; if differences stay of this size and spread, {advice}."


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
    """Order metrics: the one that decides, test, validation, others. What the study logs has its own sections."""
    order = ["test", "val", "train", None]
    shown = [metric for metric in metrics if not metric.startswith(STUDY_PREFIX) and not metric.endswith("_step")]
    return sorted(shown, key=lambda metric: (metric != decides, order.index(stage(metric)), metric))


def _numbers(row: Row) -> str:
    spread = "" if row.spread is None else f" +- {fixed(row.spread, 4)}"
    difference = "" if row.difference is None else f"  {signed(row.difference, 4)}"
    interval = "" if row.interval is None else f" ({interval_text(row.interval, 4)})"
    return f"{fixed(row.mean, 4)}{spread}{difference}{interval}"
