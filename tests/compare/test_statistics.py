"""Paired differences, their intervals, what is said about them, speed, and the table in a terminal."""

import math

import numpy as np
import pytest
from measured import done, plan
from scipy.stats import ttest_rel

from lightning_znorm.compare.results import Measurement
from lightning_znorm.compare.statistics import (
    Table,
    compare_methods,
    judge,
    make_rows,
    overheads,
    paired_interval,
    reaches,
    seeds_needed,
    step_seconds,
    t_quantile,
)


@pytest.mark.parametrize(("seeds", "t"), [(2, 12.706), (3, 4.303), (5, 2.776), (10, 2.262), (30, 2.045)])
def test_student(seeds, t):
    assert t_quantile(seeds) == pytest.approx(t, abs=5e-4)  # the printed tables of two-sided 95 %


def test_interval_by_hand():
    # mean 0.02, standard deviation 0.01: half of the interval is 4.3027 * 0.01 / sqrt(3).
    low, high = paired_interval([0.01, 0.02, 0.03])
    assert (low, high) == pytest.approx((0.02 - 0.0248417, 0.02 + 0.0248417), abs=1e-6)


@pytest.mark.parametrize("seeds", [2, 3, 7])
def test_interval_is_that_of_a_paired_t_test(seeds):
    one, other = np.random.default_rng(seeds).normal(size=(2, seeds))
    expected = ttest_rel(one, other).confidence_interval(0.95)
    assert paired_interval(list(one - other)) == pytest.approx(tuple(expected))


def test_no_interval():
    assert paired_interval([]) is None
    assert paired_interval([0.1]) is None
    assert paired_interval([0.1, math.nan]) is None


def test_pairing_takes_the_seeds_spread_out():
    values = {"first": {0: 0.1, 1: 0.5, 2: 0.9}, "other": {0: 0.12, 1: 0.53, 2: 0.93}}
    first, other = compare_methods("m", values, "max")
    assert (first.difference, first.interval, first.verdict) == (None, None, "")
    assert first.spread == pytest.approx(0.4)
    assert other.difference == pytest.approx(0.08 / 3)
    assert other.interval[0] > 0
    assert other.verdict == "Better: 3 seeds suffice to tell."


def test_only_seeds_of_both_are_paired():
    values = {"first": {0: 1.0, 1: 2.0}, "other": {1: 3.0, 2: 9.0}, "none": {}}
    rows = list(compare_methods("m", values, "max"))
    assert [row.method for row in rows] == ["first", "other"]
    assert rows[1].difference == 1.0
    assert rows[1].mean == 6.0
    assert rows[1].interval is None
    assert next(iter(compare_methods("m", {"first": {}, "other": {0: 1.0}}, "max"))).verdict == (
        "No seed is done under both methods."
    )


@pytest.mark.parametrize(
    ("differences", "mode", "words"),
    [
        ([0.02, 0.021, 0.019], "max", "Better: 3 seeds suffice to tell."),
        ([0.02, 0.021, 0.019], "min", "Worse: 3 seeds suffice to tell."),
        ([-0.02, -0.021, -0.019], "min", "Better: 3 seeds suffice to tell."),
        ([-0.02, -0.021, -0.019], None, "Lower: 3 seeds suffice to tell."),
        (
            [0.01, 0.02, 0.03],
            "max",
            "3 seeds cannot tell; if differences stay of this size and spread, about 4 seeds would.",
        ),
        (
            [0.1, -0.1, 0.001],
            "max",
            "3 seeds cannot tell; if differences stay of this size and spread, even 50 seeds would not.",
        ),
        ([0.3], "max", "One seed, where it is better, cannot tell a difference from chance."),
        ([0.0], "max", "The same on the one seed."),
        ([0.0, 0.0], "max", "The same on each of 2 seeds."),
        ([0.5, 0.5], "max", "Better, by the same amount on each of 2 seeds: too few different values for an interval."),
        # The same, apart from the rounding of float32.
        (
            [float(np.float32(0.8)) - float(np.float32(0.7)), float(np.float32(0.9)) - float(np.float32(0.8))],
            "max",
            "Better, by the same amount on each of 2 seeds: too few different values for an interval.",
        ),
        ([0.5, math.nan], "max", "Not comparable: a value is not finite, so a run has diverged."),
    ],
)
def test_words(differences, mode, words):
    assert judge(differences, paired_interval(differences), mode) == words


def test_seeds_needed_suffice():
    differences = [0.01, 0.02, 0.03]
    n = seeds_needed(differences)
    # Differences of the same mean and standard deviation, but n of them.
    assert t_quantile(n) * 0.01 / math.sqrt(n) < 0.02 <= t_quantile(n - 1) * 0.01 / math.sqrt(n - 1)


class TestSpeed:
    def test_reaching_the_first_methods_end(self, tmp_path):
        first, other = reaches(done(plan(tmp_path)), "val/accuracy", "max", ["baseline", "znorm"])
        assert (first.epochs, first.seconds, first.seeds) == ((4, 4, 4), (4, 4, 4), 3)
        assert (other.epochs, other.seconds, other.seeds) == ((2, 2, 2), (4, 4, 4), 3)

    def test_not_reached(self):
        numbers = [("baseline", 0, 0.5), ("baseline", 1, 0.4), ("znorm", 0, 0.6), ("znorm", 1, 0.41)]
        found = [Measurement("", 0, method, epoch, "loss", value) for method, epoch, value in numbers]
        assert [reach.epochs for reach in reaches(found, "loss", "min", ["baseline", "znorm"])] == [(2,), ()]

    def test_time_per_step_leaves_the_first_epoch_out(self, tmp_path):
        steps = step_seconds(done(plan(tmp_path)))
        assert steps["baseline"] == pytest.approx({0: 0.1, 1: 0.1, 2: 0.1})
        assert overheads(steps["znorm"], steps["baseline"]) == pytest.approx([1.0] * 3)
        assert step_seconds([Measurement("", 0, "a", 0, "compare/step_seconds", 3.0)]) == {"a": {0: 3.0}}

    def test_overhead_is_paired(self):
        assert overheads({0: 2.0, 1: 10.0, 2: 5.0}, {0: 1.0, 1: 10.0}) == [1.0, 0.0]
        assert overheads({0: 1.0}, {}) == []


def test_table_in_a_terminal(tmp_path):
    the_plan = plan(tmp_path)
    table = Table("test/accuracy", tuple(make_rows(the_plan, done(the_plan))), (), tmp_path)
    assert str(table).splitlines()[:2] == ["test/accuracy", "baseline  0.8200 +- 0.0100"]
    assert (
        str(table)
        .splitlines()[2]
        .startswith("znorm     0.8400 +- 0.0200  +0.0200 (-0.0048 to +0.0448)  3 seeds cannot tell; if")
    )
