"""Time functions in turn: if the machine slows down, it slows down all of them."""

import statistics
import time
from collections.abc import Callable, Mapping


def alternating_times(
    functions: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 3
) -> dict[str, list[float]]:
    """Return the seconds that each function took in each round, in which each of them runs once."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for round_index in range(warmup + rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if round_index >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def alternating_medians(
    functions: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 3
) -> dict[str, float]:
    """Return the median seconds of each function, over rounds in which each of them runs once."""
    times = alternating_times(functions, rounds, warmup)
    return {name: statistics.median(seconds) for name, seconds in times.items()}
