"""Numbers as a report shows them."""

import math
from collections.abc import Iterable
from datetime import timedelta
from statistics import median


def decimals(differences: Iterable[float | None], values: Iterable[float]) -> int:
    """How many decimals show the middle one of differences to two digits, and values to no more than six.

    Example:
        >>> decimals([0.0123, None, 0.05], [0.9])
        3
    """
    small, large = _sizes(differences), _sizes(values)
    wanted = 1 - math.floor(math.log10(median(small))) if small else 4
    most = 5 - math.floor(math.log10(median(large))) if large else 6
    return max(2, min(wanted, most))


def signed(value: float, digits: int) -> str:
    """A difference, with its sign.

    Example:
        >>> signed(-0.012, 2)
        '-0.01'
    """
    return f"{value:+.{digits}f}" if math.isfinite(value) else str(value)


def clock(seconds: float) -> str:
    """A time, as people say it.

    Example:
        >>> clock(90)
        '0:01:30'
    """
    return str(timedelta(seconds=round(seconds)))


def _sizes(numbers: Iterable[float | None]) -> list[float]:
    return [abs(number) for number in numbers if number is not None and math.isfinite(number) and number]
