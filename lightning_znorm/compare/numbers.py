"""Numbers as a report shows them."""

import math
import sys
from collections.abc import Iterable
from datetime import timedelta
from statistics import median, stdev

_HUGE = 1e12
_LONGEST = timedelta.max.total_seconds() - 1


def mean(values: Iterable[float]) -> float:
    """Return the mean, infinite or no number where values of a run that has diverged make it so.

    Example:
        >>> mean([1.0, 2.0]), mean([math.inf, -math.inf]), mean([1e308, 1e308])
        (1.5, nan, 1e+308)
    """
    values = list(values)
    try:
        return math.fsum(values) / len(values)
    except (OverflowError, ValueError):  # too large a sum; infinities of both signs
        return sum(value / len(values) for value in values)


def deviation(values: Iterable[float]) -> float:
    """Return the standard deviation of two or more finite values, infinite where it is too large for a number.

    Example:
        >>> deviation([1.0, 3.0]) == math.sqrt(2), deviation([1.7e308, -1.7e308])
        (True, inf)
    """
    try:
        return stdev(values)
    except OverflowError:
        return math.inf


def decimals(differences: Iterable[float | None], values: Iterable[float]) -> int:
    """How many decimals show the middle one of differences to two digits, and values to no more than six.

    Example:
        >>> decimals([0.0123, None, 0.05], [0.9])
        3
    """
    small, large = _size(differences), _size(values)
    wanted = 4 if small is None else 1 - math.floor(math.log10(small))
    most = 6 if large is None else 5 - math.floor(math.log10(large))
    return max(2, min(wanted, most))


def fixed(value: float, digits: int) -> str:
    """A value with so many decimals; one that is huge, as of a run that diverges, by its power of ten.

    Example:
        >>> fixed(0.25, 3), fixed(1e30, 3)
        ('0.250', '1e+30')
    """
    return f"{value:.{digits}f}" if abs(value) < _HUGE else f"{value:.4g}"


def signed(value: float, digits: int) -> str:
    """A difference, with its sign.

    Example:
        >>> signed(-0.012, 2)
        '-0.01'
    """
    sign = "+" if value >= 0 and math.isfinite(value) else ""
    return sign + fixed(value, digits)


def clock(seconds: float) -> str:
    """A time, as people say it.

    Example:
        >>> clock(90)
        '0:01:30'
    """
    return str(timedelta(seconds=round(min(seconds, _LONGEST))))


def _size(numbers: Iterable[float | None]) -> float | None:
    """The middle one of numbers, without their signs."""
    sizes = [abs(number) for number in numbers if number is not None and math.isfinite(number) and number]
    return min(median(sizes), sys.float_info.max) if sizes else None
