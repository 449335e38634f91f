"""How soon a method is where the first one ends, and what its steps cost."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

from lightning_znorm.compare.results import STEP_SECONDS, TRAIN_SECONDS, Measurement, curves


@dataclass(frozen=True)
class Reach:
    """How soon a method reaches the first method's final value of a metric.

    Args:
        method: Name of the method.
        epochs: Epochs it took, for each seed that got there.
        seconds: Seconds of training it took, for each of these seeds.
        seeds: Number of seeds.
    """

    method: str
    epochs: tuple[int, ...]
    seconds: tuple[float, ...]
    seeds: int


def reaches(measurements: Sequence[Measurement], metric: str, mode: str, methods: Sequence[str]) -> list[Reach]:
    """For every method and seed, the first epoch whose value is at least as good as the first method's final one.

    Args:
        measurements: All that was logged.
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
    """Time of a training step by method and seed: the median over epochs, without the first if there are others."""
    found: dict[str, dict[int, float]] = {}
    for method, by_seed in curves(measurements, STEP_SECONDS).items():
        for seed, curve in by_seed.items():
            later = [curve[epoch] for epoch in sorted(curve)][1:] or list(curve.values())
            found.setdefault(method, {})[seed] = median(later)
    return found


def overheads(own: Mapping[int, float], first: Mapping[int, float]) -> list[float]:
    """By which share a method's steps take longer than the first method's, for each seed that both have."""
    return [own[seed] / first[seed] - 1 for seed in own if first.get(seed)]
