"""Simulated studies hold the report to account: how often it errs, and whether its number of seeds suffices.

Each study has normal differences, and all methods share the noise of the first one, as in `compare`.
"""

import math

import numpy as np
import pytest
from scipy.special import stdtr

from lightning_znorm.compare.looks import FirstLook
from lightning_znorm.compare.power import COVERAGE, POWER, power, seeds_for_power, seeds_needed
from lightning_znorm.compare.statistics import LEVEL, compare_methods, holm, judge, p_value

pytestmark = pytest.mark.full

STUDIES = 20_000


def error(share: float) -> float:
    """Four standard errors of a share of the simulated studies."""
    return 4 * math.sqrt(share * (1 - share) / STUDIES)


def simulate(seeds: int, methods: int = 1, effect: float = 0.0) -> np.ndarray:
    """Return differences by study, method and seed, with a standard deviation of one."""
    random = np.random.default_rng([seeds, methods, round(1000 * effect)])
    first = random.normal(size=(STUDIES, 1, seeds))
    others = random.normal(size=(STUDIES, methods, seeds))
    return (others - first) / math.sqrt(2) + effect


def p_values(differences: np.ndarray) -> np.ndarray:
    """Return the p-values of paired t tests over the last axis, as `p_value` does one by one."""
    n = differences.shape[-1]
    statistics = differences.mean(-1) / differences.std(-1, ddof=1) * math.sqrt(n)
    found = 2 * stdtr(n - 1, -np.abs(statistics))
    sample = differences.reshape(-1, n)[:50]
    assert [p_value(list(one)) for one in sample] == pytest.approx(list(found.reshape(-1)[:50]))
    return found


def told(differences: np.ndarray) -> np.ndarray:
    """Return whether the report calls a method better or worse, by study and method."""
    methods = differences.shape[1]
    rows = [holm({str(i): p for i, p in enumerate(study)}, methods) for study in p_values(differences)]
    found = np.array([[adjusted[str(i)] < LEVEL for i in range(methods)] for adjusted in rows])
    for study in [*np.flatnonzero(found.any(1))[:20], *range(20)]:  # the report's own words
        by_method = {str(i): dict(enumerate(values)) for i, values in enumerate(differences[study])}
        first = dict.fromkeys(range(differences.shape[2]), 0.0)
        words = [row.verdict for row in judge(list(compare_methods("m", {"first": first, **by_method})), "max")]
        assert [word.startswith(("Better", "Worse")) for word in words[1:]] == list(found[study])
    return found


@pytest.mark.parametrize("methods", [1, 3, 6])
@pytest.mark.parametrize("seeds", [3, 10])
def test_a_study_without_an_effect_errs_in_five_percent_at_most(seeds, methods):
    share = told(simulate(seeds, methods)).any(1).mean()
    assert share <= LEVEL + error(LEVEL)
    if methods == 1:
        assert share >= LEVEL - error(LEVEL)
    else:  # without the adjustment, it would err more often
        assert (p_values(simulate(seeds, methods)) < LEVEL).any(1).mean() > LEVEL + 4 * error(LEVEL)


@pytest.mark.parametrize("methods", [1, 3])
@pytest.mark.parametrize("effect", [0.4, 0.8, 1.5])
def test_the_number_of_seeds_has_eighty_percent_power(effect, methods):
    seeds = seeds_for_power(effect, LEVEL / methods)
    for n in (seeds, seeds - 1):
        found = p_values(simulate(n, effect=effect)) < LEVEL / methods
        assert found.mean() == pytest.approx(power(effect, n, LEVEL / methods), abs=error(POWER))
    assert power(effect, seeds, LEVEL / methods) >= POWER > power(effect, seeds - 1, LEVEL / methods)
    # The level is that of Holm's strictest step, so each of several methods is told at least as often.
    assert told(simulate(seeds, methods, effect)).mean(0).min() >= POWER - error(POWER)


@pytest.mark.parametrize("effect", [0.0, 0.3, 0.7, 1.2])
@pytest.mark.parametrize("seeds", [4, 10])
def test_the_interval_holds_the_right_number_as_often_as_stated(seeds, effect):
    """Also without an effect, where no number of seeds is right: the interval has no end then."""
    right = seeds_for_power(effect)
    differences = simulate(seeds, effect=effect)[:, 0]
    found = [seeds_needed(list(study)) for study in differences]
    endless = math.inf
    held = [(one.low or endless) <= (right or endless) <= (one.high or endless) for one in found]
    # Numbers are rounded up to whole seeds, and all effects of more than 1000 seeds are one number.
    assert np.mean(held) >= COVERAGE - error(COVERAGE)
    if effect in (0.3, 0.7):
        assert np.mean(held) <= 0.9


def test_looking_again_after_each_seed_errs_too_often():
    """The rule of earlier versions, from 3 to 10 seeds, against the first look alone."""
    differences = simulate(10)[:, 0]
    looks = np.stack([p_values(differences[:, :seeds]) < LEVEL for seeds in range(3, 11)], axis=1)
    assert looks.any(1).mean() == pytest.approx(0.17, abs=0.01)

    first = FirstLook("m", (0, 1, 2), ("first", "other"))
    said = np.zeros(STUDIES, dtype=bool)
    for i, seeds in enumerate(range(3, 11)):
        if not first.why_exploratory("m", range(seeds), ("first", "other")):
            said |= looks[:, i]
    assert said.mean() <= LEVEL + error(LEVEL)
    assert said.mean() >= LEVEL - error(LEVEL)


def test_runs_that_end_one_after_the_other_are_one_look():
    """A report of some of the planned seeds has no verdict, so a report after each seed errs as often as one."""
    differences = simulate(6)[:, 0]
    said = np.zeros(STUDIES, dtype=bool)
    for done in range(2, 7):
        rows = compare_methods("m", {"first": dict.fromkeys(range(6), 0.0), "other": dict(enumerate(range(done)))})
        has_verdict = judge(list(rows), "max", seeds=range(6))[1].p_value is not None
        assert has_verdict == (done == 6)
        if has_verdict:
            said |= p_values(differences[:, :done]) < LEVEL
    assert said.mean() == pytest.approx(LEVEL, abs=error(LEVEL))
