"""Times several functions in turn, so that a machine that slows down slows all of them."""

import statistics
import time
from collections.abc import Callable, Mapping


def alternating_medians(
    functions: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 3
) -> dict[str, float]:
    """Median seconds of each function over rounds in which all take their turn."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for round_index in range(warmup + rounds):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            if round_index >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}
