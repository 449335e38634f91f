"""Numbers as a report shows them."""

import math
from collections.abc import Iterable
from datetime import timedelta
from statistics import median


def fixed(scale: Iterable[float | None]) -> int:
    """How many decimals show the middle one of these numbers to two digits; four where there are none.

    Example:
        >>> fixed([0.0123, None, 0.05])
        3
    """
    sizes = [abs(value) for value in scale if value is not None and math.isfinite(value) and value]
    return min(6, max(2, 1 - math.floor(math.log10(median(sizes))))) if sizes else 4


def signed(value: float, digits: int) -> str:
    """A difference, with its sign.

    Example:
        >>> signed(-0.012, 2)
        '-0.01'
    """
    return f"{value:+.{digits}f}" if math.isfinite(value) else str(value)


def minutes(seconds: float) -> str:
    """A time, as people say it.

    Example:
        >>> minutes(90)
        '0:01:30'
    """
    return str(timedelta(seconds=round(seconds)))
