"""Paired differences, their intervals, what is said about them, speed, and the table in a terminal."""

import math
from dataclasses import replace

import numpy as np
import pytest
from measured import done, plan
from scipy.optimize import brentq
from scipy.stats import nct, t, ttest_1samp, ttest_rel

from lightning_znorm.compare.looks import FirstLook
from lightning_znorm.compare.power import SeedsNeeded, power, seeds_for_power, seeds_needed, t_statistic
from lightning_znorm.compare.results import Measurement
from lightning_znorm.compare.statistics import (
    Table,
    compare_methods,
    holm,
    judge,
    look_at,
    make_rows,
    overheads,
    p_value,
    paired_interval,
    reaches,
    step_seconds,
    t_quantile,
)


@pytest.mark.parametrize(("seeds", "quantile"), [(2, 12.706), (3, 4.303), (5, 2.776), (10, 2.262), (30, 2.045)])
def test_student(seeds, quantile):
    assert t_quantile(seeds) == pytest.approx(quantile, abs=5e-4)  # the printed tables of two-sided 95 %


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


@pytest.mark.parametrize("seeds", [2, 3, 7])
def test_p_value_is_that_of_a_paired_t_test(seeds):
    for scale in (1e-9, 1.0, 1e9):
        differences = list(scale * np.random.default_rng(seeds).normal(0.5, size=seeds))
        p = p_value(differences)
        assert p == pytest.approx(ttest_1samp(differences, 0).pvalue)
        low, high = paired_interval(differences)
        assert (p < 0.05) == (low > 0 or high < 0)


@pytest.mark.parametrize("differences", [[], [0.1], [0.1, math.nan], [0.0, 0.0], [0.5, 0.5]])
def test_no_p_value(differences):
    assert p_value(differences) is None


def test_huge_differences_are_not_told():
    assert p_value([1.7e308, -1.7e308]) == 1.0


def test_holm_by_hand():
    """The example of Holm's paper is of this form: the smallest p-value counts three times, the next one twice."""
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}, 3) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.9, "b": 0.02}, 2) == pytest.approx({"b": 0.04, "a": 0.9})
    assert holm({"a": 0.6, "b": 0.7}, 2) == {"a": 1.0, "b": 1.0}
    assert holm({"a": 0.02}, 3) == pytest.approx({"a": 0.06})  # two whose p-values are not known yet
    assert holm({}, 0) == {}


def judged(values: dict, mode: str = "max", **options) -> dict:
    return {row.method: row for row in judge(list(compare_methods("m", values)), mode, **options)}


def against_zero(*differences, **options):
    """The row of a method with these differences."""
    first = {"first": dict.fromkeys(range(len(differences)), 0.0)}
    return judged({**first, "other": dict(enumerate(differences))}, **options)["other"]


def test_pairing_takes_the_seeds_spread_out():
    values = {"first": {0: 0.1, 1: 0.5, 2: 0.9}, "other": {0: 0.12, 1: 0.53, 2: 0.93}}
    rows = judged(values)
    first, other = rows["first"], rows["other"]
    assert (first.difference, first.interval, first.verdict, first.p_value) == (None, None, "", None)
    assert first.spread == pytest.approx(0.4)
    assert other.difference == pytest.approx(0.08 / 3)
    assert other.differences == pytest.approx((0.02, 0.03, 0.03))
    assert other.interval[0] > 0
    assert other.p_value == pytest.approx(ttest_1samp([0.02, 0.03, 0.03], 0).pvalue)
    assert other.verdict == "Better: p = 0.015 with 3 seeds."


def test_only_seeds_of_both_are_paired():
    values = {"first": {0: 1.0, 1: 2.0}, "other": {1: 3.0, 2: 9.0}, "none": {}}
    rows = list(compare_methods("m", values))
    assert [row.method for row in rows] == ["first", "other"]
    assert rows[1].differences == (1.0, None)
    assert rows[1].difference == 1.0
    assert rows[1].mean == 6.0
    assert rows[1].interval is None
    assert judged({"first": {}, "other": {0: 1.0}})["other"].verdict == "No seed is done under both methods."


def test_numbers_alone_have_no_words():
    rows = list(compare_methods("m", {"first": {0: 1.0, 1: 2.0}, "other": {0: 3.0, 1: 4.1}}, {"other": {0: 5, 1: 6}}))
    assert [(row.verdict, row.p_value) for row in rows] == [("", None), ("", None)]
    assert [row.counts for row in rows] == [(1, 1), (5, 6)]


@pytest.mark.parametrize(
    ("differences", "mode", "words"),
    [
        ([0.02, 0.021, 0.019], "max", "Better: p < 0.001 with 3 seeds."),
        ([0.02, 0.021, 0.019], "min", "Worse: p < 0.001 with 3 seeds."),
        ([-0.02, -0.021, -0.019], "min", "Better: p < 0.001 with 3 seeds."),
        (
            [0.01, 0.02, 0.03],
            "max",
            "3 seeds cannot tell (p = 0.074). With 4 or more, the report estimates how many would.",
        ),
        (
            [0.1, -0.1, 0.001, 0.0],
            "max",
            "4 seeds cannot tell (p = 0.995). A new study needs more than 1000 seeds for 80 % power (80 % interval: 21 "
            "to more than 1000).",
        ),
        (
            [0.01, 0.02, 0.03, 0.0],
            "max",
            "4 seeds cannot tell (p = 0.103). A new study needs 8 seeds for 80 % power (80 % interval: 5 to 167).",
        ),
        ([0.3], "max", "One seed cannot tell a difference from chance."),
        ([0.0], "max", "The same on the one seed."),
        ([0.0, 0.0], "max", "The same on each of 2 seeds."),
        ([0.5, 0.5], "max", "Differs by the same amount on each of 2 seeds: too few different values for a test."),
        # The same, apart from the rounding of float32.
        (
            [float(np.float32(0.8)) - float(np.float32(0.7)), float(np.float32(0.9)) - float(np.float32(0.8))],
            "max",
            "Differs by the same amount on each of 2 seeds: too few different values for a test.",
        ),
        ([0.5, math.nan], "max", "Not comparable: a value is not finite, so a run has diverged."),
    ],
)
def test_words(differences, mode, words):
    row = against_zero(*differences, mode=mode)
    assert row.verdict == words
    assert (row.p_value is None) == ("p " not in words)


def test_a_told_difference_says_what_a_new_study_needs():
    verdict = against_zero(0.02, 0.03, 0.01, 0.025).verdict
    assert verdict.startswith("Better: p = 0.016 with 4 seeds. A new study needs 4 seeds for 80 % power (80 %")


class TestSeveralMethods:
    FIRST = dict.fromkeys(range(3), 0.0)
    SURE, LIKELY = {0: 0.02, 1: 0.021, 2: 0.019}, {0: 0.01, 1: 0.016, 2: 0.013}

    def test_p_values_are_adjusted(self):
        unsure = {0: 0.01, 1: 0.02, 2: 0.03}
        rows = judged({"first": self.FIRST, "sure": self.SURE, "likely": self.LIKELY, "unsure": unsure})
        raw = {name: p_value(rows[name].paired) for name in ("sure", "likely", "unsure")}
        assert [rows[name].p_value for name in raw] == pytest.approx(
            [3 * raw["sure"], 2 * raw["likely"], max(2 * raw["likely"], raw["unsure"])]
        )
        assert rows["sure"].verdict == "Better: adjusted p = 0.002 with 3 seeds."

    def test_an_interval_may_exclude_zero_though_the_seeds_cannot_tell(self):
        likely = {0: 0.01, 1: 0.02, 2: 0.02}
        alone = judged({"first": self.FIRST, "likely": likely})["likely"]
        assert alone.verdict.startswith("Better: p = 0.038")
        beside = judged({"first": self.FIRST, "likely": likely, "other": {0: 0.1, 1: -0.1, 2: 0.0}})["likely"]
        assert beside.interval == alone.interval
        assert beside.verdict.startswith("3 seeds cannot tell (adjusted p = 0.075)")

    def test_a_method_that_diverged_is_no_comparison(self):
        rows = judged({"first": self.FIRST, "likely": self.LIKELY, "diverged": {0: 1.0, 1: math.nan, 2: 1.0}})
        assert rows["likely"].p_value == p_value(rows["likely"].paired)
        assert rows["likely"].verdict.startswith("Better: p =")

    def test_a_method_that_is_not_done_counts(self):
        """Else the first report would call a method better, and a later one, with the same runs of it, would not."""
        now = judged({"first": self.FIRST, "likely": self.LIKELY}, compared=2)["likely"]
        later = judged({"first": self.FIRST, "likely": self.LIKELY, "sure": self.SURE})["likely"]
        assert now.p_value == 2 * p_value(now.paired)
        assert later.p_value <= now.p_value


class TestSeedsNeeded:
    @pytest.mark.parametrize(("effect", "seeds", "expected"), [(0.5, 34, 0.808), (1.0, 10, 0.803), (0.2, 199, 0.803)])
    def test_printed_tables(self, effect, seeds, expected):
        """Of G*Power, for a two-sided paired t test at 0.05."""
        assert power(effect, seeds) == pytest.approx(expected, abs=1.5e-3)
        assert seeds_for_power(effect) == seeds

    @pytest.mark.parametrize("level", [0.05, 0.05 / 6])
    def test_the_number_is_the_smallest_that_suffices(self, level):
        for effect in (0.13, 0.3, 0.9, 1.7):
            n = seeds_for_power(effect, level)
            critical = [t.isf(level / 2, df=seeds - 1) for seeds in (n, n - 1)]
            powers = [nct.sf(critical[i], n - i - 1, effect * math.sqrt(n - i)) for i in (0, 1)]
            assert powers[0] >= 0.8
            assert powers[1] < 0.8

    @pytest.mark.parametrize("level", [0.05, 0.05 / 10])
    def test_a_larger_effect_needs_no_more_seeds(self, level):
        found = [seeds_for_power(effect, level) or 1001 for effect in np.geomspace(0.08, 100, 2000)]
        assert found == sorted(found, reverse=True)
        assert (found[0], found[-1]) == (1001, 4)
        assert power(20.0, 1000, level) == 1.0

    def test_tiny_and_huge_effects(self):
        assert [seeds_for_power(effect) for effect in (0.0, -1.0, 5e-324, 0.08)] == [None] * 4
        assert seeds_for_power(0.09) == 971
        assert [seeds_for_power(effect) for effect in (3.0, 1e3, 1e300, math.inf)] == [4] * 4

    def test_ends_are_those_of_the_noncentral_t_interval(self):
        differences = [0.01, 0.02, 0.03, 0.0, 0.015]
        found = seeds_needed(differences)
        statistic = t_statistic(differences)
        assert statistic == pytest.approx(ttest_1samp(differences, 0).statistic)
        for seeds, share in ((found.low, 0.1), (found.high, 0.9)):
            effect = brentq(lambda noncentrality, p=share: nct.cdf(statistic, 4, noncentrality) - p, -5, 20) / 5**0.5
            assert seeds == seeds_for_power(effect)
        assert found == seeds_needed([-difference for difference in differences])
        assert found.low < found.seeds < found.high

    @pytest.mark.parametrize("differences", [[0.1, 0.2, 0.3], [0.0] * 4, [0.25] * 5, []])
    def test_nothing_to_estimate_it_from(self, differences):
        assert seeds_needed(differences) is None

    @pytest.mark.parametrize("scale", [1e-300, 1.0, 1e307])
    def test_any_scale(self, scale):
        assert seeds_needed([scale * x for x in (1.0, 2.0, 3.0, 0.0)]) == SeedsNeeded(8, 5, 167)

    def test_no_effect_is_within_reach(self):
        assert seeds_needed([1.0, -1.0, 1.0, -1.0]) == SeedsNeeded(None, 22, None)
        assert seeds_needed([1.0, 1.0 + 1e-9, 1.0, 1.0]) == SeedsNeeded(4, 4, 4)
        many = [1.0, -1.0] * 1000
        assert seeds_needed(many) == SeedsNeeded(None, None, None)
        assert against_zero(*many).verdict.endswith("A new study needs more than 1000 seeds for 80 % power.")


class TestOneTest:
    """A study has one test: of all planned seeds, at the first look."""

    def test_no_verdict_before_all_planned_seeds_are_done(self):
        row = against_zero(0.02, 0.021, 0.019, seeds=range(4))
        assert row.verdict == "3 of 4 seeds are done under both methods: no verdict before all are."
        assert row.p_value is None
        assert row.interval[0] > 0

    def test_exploratory(self):
        row = against_zero(0.02, 0.021, 0.019, exploratory="seeds were added")
        assert (row.verdict, row.p_value) == ("Exploratory, no verdict: seeds were added.", None)
        assert row.interval[0] > 0

    def test_the_plan_decides(self, tmp_path):
        """Words are for the metric that decides; they are exploratory if the plan is."""
        the_plan = plan(tmp_path)
        found = done(the_plan)
        words = {row.metric: row.verdict for row in make_rows(the_plan, found) if row.method == "znorm"}
        assert [metric for metric in words if words[metric]] == ["test/accuracy"]
        looked = replace(the_plan, first_look=FirstLook("test/accuracy", (0, 1)))
        row = next(row for row in make_rows(looked, found) if row.method == "znorm")
        assert row.verdict == "Exploratory, no verdict: seeds were added after a first look at seeds 0, 1."

    def test_numbers_of_masks_are_not_compared(self, tmp_path):
        the_plan = plan(tmp_path)
        plain = done(the_plan)
        counts = ["val/masks_counted", "test/patients_left_out", "test/masks_foreground/dataloader_idx_1"]
        found = [replace(one, metric=count) for one in plain if one.metric == "test/accuracy" for count in counts]
        found += plain
        metrics = {row.metric for row in make_rows(the_plan, found)}
        assert metrics == {row.metric for row in make_rows(the_plan, plain)}
        deciding = replace(the_plan, metric="val/masks_counted")
        assert "val/masks_counted" in {row.metric for row in make_rows(deciding, found)}

    @pytest.mark.parametrize(
        ("look", "why"),
        [
            (FirstLook("test/accuracy", (2, 1, 0), ("baseline",)), ""),
            (FirstLook(None, (0, 1, 2)), ""),  # of an older version
            (FirstLook("val/accuracy", (0, 1, 2)), "the first look was at another metric, val/accuracy"),
            (FirstLook(None, (0, 1, 2, 3)), "seeds were changed after a first look at seeds 0, 1, 2, 3"),
            (FirstLook(None, None), "the record of the study was lost, so its first look is not known"),
            (
                FirstLook(None, (0, 1, 2), ("znorm", "baseline")),
                "methods were compared with znorm at the first look",
            ),
            (
                FirstLook(None, (0, 1, 2), ("baseline", "znorm", "gc", "sing")),
                "methods were left out after the first look: gc, sing",
            ),
        ],
    )
    def test_why_a_look_is_exploratory(self, tmp_path, look, why):
        assert replace(plan(tmp_path), first_look=look).exploratory == why

    def test_what_is_a_first_look(self, tmp_path):
        the_plan = plan(tmp_path)
        found = done(the_plan)
        rows = list(make_rows(the_plan, found))
        look = FirstLook("test/accuracy", (0, 1, 2), ("baseline", "znorm"))
        assert look_at(the_plan, rows) == look
        partly = list(make_rows(the_plan, [one for one in found if one.seed < 2]))
        assert look_at(the_plan, partly) == look  # at all that are planned, though there is no verdict yet
        assert look_at(the_plan, list(make_rows(the_plan, [one for one in found if one.seed < 1]))) is None
        assert look_at(the_plan, []) is None
        # Methods may be added, and are then a part of it.
        earlier = replace(look, methods=("baseline",))
        assert look_at(replace(the_plan, first_look=earlier), rows) == look
        # An exploratory look changes nothing.
        other = replace(look, seeds=(0, 1))
        assert look_at(replace(the_plan, first_look=other), rows) == other


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
        .startswith("znorm     0.8400 +- 0.0200  +0.0200 (-0.0048 to +0.0448)  3 seeds cannot tell (p = 0.074). With 4")
    )
