"""Whether a method differs from the first: paired by seed, with an interval, and in words."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from lightning_znorm.compare.numbers import deviation, mean

_CONFIDENCE = 0.95
_ROUNDING = 1e-3  # by which the same difference of float32 metrics varies, relative to it
_MOST_SEEDS = 50


@dataclass(frozen=True)
class Row:
    """A metric under a method.

    Args:
        metric: Name of the metric.
        method: Name of the method.
        seeds: Seeds of the runs that are done.
        values: The metric's value for each of them.
        mean: Mean of the values.
        spread: Standard deviation of the values over the seeds; none for one seed.
        difference: Mean difference from the first method, over the seeds that both have; none for the first method.
        interval: Where the difference lies with 95 % confidence; none for fewer than two seeds.
        verdict: In words, whether the seeds suffice to tell the method from the first.
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


def compare_methods(metric: str, values: Mapping[str, Mapping[int, float]], mode: str | None) -> Iterator[Row]:
    """Compare every method with the first.

    Args:
        metric: Name of the metric.
        values: Of each method, the metric's value for each seed.
        mode: Whether ``"max"`` or ``"min"`` of it is better, if that is known.
    """
    first: Mapping[int, float] = next(iter(values.values()), {})
    for i, (method, own) in enumerate(values.items()):
        if not own:
            continue
        seeds = tuple(sorted(own))
        all_values = tuple(own[seed] for seed in seeds)
        spread = deviation(all_values) if len(seeds) > 1 and all(map(math.isfinite, all_values)) else None
        paired = [own[seed] - first[seed] for seed in seeds if seed in first]
        difference = mean(paired) if i and paired else None
        interval = paired_interval(paired) if i else None
        verdict = say(paired, interval, mode) if i else ""
        yield Row(metric, method, seeds, all_values, mean(all_values), spread, difference, interval, verdict)


def paired_interval(differences: Sequence[float]) -> tuple[float, float] | None:
    """The 95 % interval of the mean of paired differences (Student's t); none for fewer than two.

    Example:
        >>> low, high = paired_interval([1.0, 2.0, 3.0])
        >>> round(low, 3), round(high, 3)
        (-0.484, 4.484)
    """
    if len(differences) < 2 or not all(map(math.isfinite, differences)):
        return None
    middle = mean(differences)
    half = student(len(differences)) * deviation(differences) / math.sqrt(len(differences))
    return middle - half, middle + half


def student(seeds: int) -> float:
    """Student's t of a two-sided 95 % interval, for the differences of this many seeds.

    Example:
        >>> round(student(3), 2)
        4.3
    """
    from scipy.special import stdtrit

    return float(stdtrit(seeds - 1, (1 + _CONFIDENCE) / 2))


def seeds_needed(differences: Sequence[float]) -> int | None:
    """How many seeds would tell a difference of this mean and spread from zero; none if more than 50."""
    size, spread = abs(mean(differences)), deviation(differences)
    numbers = range(len(differences) + 1, _MOST_SEEDS + 1)
    return next((n for n in numbers if student(n) * spread / math.sqrt(n) < size), None)


def say(differences: Sequence[float], interval: tuple[float, float] | None, mode: str | None) -> str:
    """Say in words what paired differences tell."""
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
    advice = f"about {more} seeds would" if more else f"even {_MOST_SEEDS} seeds would not"
    return f"{n} seeds cannot tell; if differences stay of this size and spread, {advice}."
