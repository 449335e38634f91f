"""How many seeds a new study needs, so that a paired t test tells a difference from chance with 80 % power."""

import math
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

POWER = 0.8
"""Share of studies with this many seeds that tell a difference of the assumed size."""
FEWEST_SEEDS = 4
"""Fewer seeds give no estimate and are not advised: with three, the interval of the effect size says next to nothing,
and the test rests on the assumption that differences have a normal distribution."""
MOST_SEEDS = 1000
COVERAGE = 0.8
"""Share of studies in which the interval of `SeedsNeeded` holds the right number."""
_LARGEST_EFFECT = 30.0  # any larger one takes the fewest seeds, and the distribution would overflow


@dataclass(frozen=True)
class SeedsNeeded:
    """The number of seeds for 80 % power, as estimated from the differences of a study.

    Args:
        seeds: The number if the difference has the estimated size; ``None`` for more than 1000.
        low: The number at the upper end of the 80 % confidence interval of the effect size; ``None`` likewise.
        high: The number at its lower end, which may be no effect at all; ``None`` likewise.
    """

    seeds: int | None
    low: int | None
    high: int | None


def power(effect: float, seeds: int, level: float = 0.05) -> float:
    """Return the probability that a two-sided paired t test tells a difference, with its right sign.

    Args:
        effect: Standardized effect size: the mean of the differences over their standard deviation, not negative.
        seeds: Number of seeds, two or more.
        level: Significance level of the test.

    Example:
        >>> round(power(1.0, 10), 3)  # the tables of Cohen (1988)
        0.803
    """
    from scipy.special import nctdtr, stdtrit

    df = seeds - 1
    critical = stdtrit(df, 1 - level / 2)
    missed = float(nctdtr(df, min(effect, _LARGEST_EFFECT) * math.sqrt(seeds), critical))
    return 1.0 if math.isnan(missed) else 1 - missed  # scipy gives NaN where next to nothing is missed


def seeds_for_power(effect: float, level: float = 0.05) -> int | None:
    """Return the smallest number of seeds, four or more, that has 80 % power.

    Args:
        effect: Standardized effect size.
        level: Significance level of the test.

    Returns:
        The number; ``None`` if it is more than 1000.

    Example:
        >>> seeds_for_power(1.0), seeds_for_power(0.0)
        (10, None)
    """

    def suffices(seeds: int) -> bool:
        return power(effect, seeds, level) >= POWER

    # Doubling stays near the number, where the distribution is known best.
    most = FEWEST_SEEDS
    while not suffices(most):
        if effect <= 0 or most == MOST_SEEDS:
            return None
        most = min(2 * most, MOST_SEEDS)
    numbers = range(FEWEST_SEEDS, most + 1)
    return numbers[bisect_left(numbers, True, lo=max(0, most // 2 - FEWEST_SEEDS), key=suffices)]


def seeds_needed(differences: Sequence[float], level: float = 0.05) -> SeedsNeeded | None:
    """Estimate how many seeds a new study needs for 80 % power.

    The interval is that of the standardized effect size, by the noncentral t distribution (Steiger and Fouladi 1997,
    Noncentrality interval estimation and the evaluation of statistical models). It takes for granted that the number
    of differences was chosen before they were seen.

    Args:
        differences: A difference for each seed, all finite.
        level: Significance level of the test in the new study.

    Returns:
        The estimate; ``None`` for fewer than four differences, or if they do not vary.
    """
    from scipy.special import nctdtrinc

    n = len(differences)
    statistic = abs(t_statistic(differences)) if n >= FEWEST_SEEDS else math.nan
    if math.isnan(statistic):
        return None
    root = math.sqrt(n)
    statistic = min(statistic, _LARGEST_EFFECT * root)
    tail = (1 - COVERAGE) / 2
    # The upper end is farther from zero than the lower end, so it needs the fewest seeds, whatever the true sign is.
    upper, lower = (float(nctdtrinc(n - 1, share, statistic)) / root for share in (tail, 1 - tail))
    return SeedsNeeded(*(seeds_for_power(effect, level) for effect in (statistic / root, upper, lower)))


def t_statistic(differences: Sequence[float]) -> float:
    """Return Student's t of two or more finite differences; NaN if they do not vary, or overflow.

    Example:
        >>> round(t_statistic([0.01, 0.02, 0.03]), 4)
        3.4641
    """
    import numpy as np

    values = np.asarray(differences, dtype=np.float64)
    largest = float(np.abs(values).max())
    if not 0 < largest < math.inf:
        return math.nan
    values = values / largest  # the same t, without an overflow
    spread = float(values.std(ddof=1))
    return float(values.mean()) / spread * math.sqrt(len(values)) if spread > 0 else math.nan
