"""Figures, of curves made up for them."""

import io
import math
import re

import pytest

from lightning_znorm.compare import plots
from lightning_znorm.compare.plots import forest, plot


class TestPlots:
    def test_methods_differ_without_colour(self):
        curves = {name: {0: {0: i, 1: i + 1}} for i, name in enumerate("abcdef")}
        image = plot(curves, list(curves), "loss")
        assert image["png"].startswith(b"\x89PNG")
        svg = image["svg"].decode()
        dashes = set(re.findall(r"stroke-dasharray: ([\d., ]+)[;\"]", svg))
        assert len(dashes) >= 4
        assert "2024" not in svg  # no date: the same image for the same numbers
        assert image == plot(curves, list(curves), "loss")

    def test_curves_are_means_over_seeds_from_the_first_epoch_on(self, monkeypatch):
        drawn = []
        monkeypatch.setattr(plots, "_add_legend", lambda figure, lines: drawn.append((figure.axes[0], lines)))
        plot({"a": {0: {0: 1.0, 1: 2.0, 2: 5.0}, 1: {0: 3.0, 1: 2.0}}}, ["a"], "loss")
        ((axes, lines),) = drawn
        low, high, line = axes.lines
        assert [list(line.get_xdata()), list(line.get_ydata())] == [[1, 2, 3], [2.0, 2.0, 5.0]]
        assert [list(edge.get_ydata()) for edge in (low, high)] == [[1.0, 2.0, 5.0], [3.0, 2.0, 5.0]]
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "loss")
        assert lines == {"a": line}

    def test_a_method_looks_the_same_in_every_plot(self):
        curve = {0: {0: 1.0, 1: 2.0}}
        both = plot({"a": curve, "b": curve}, ["a", "b"], "x")["svg"].decode()
        alone = plot({"b": curve}, ["a", "b"], "x")["svg"].decode()
        assert "#d55e00" in both
        assert "#d55e00" in alone

    @pytest.mark.parametrize(
        "curves",
        [
            {},
            {"a": {0: {0: math.nan, 1: math.inf}}},
            {"a": {0: {3: 0.0}}},
            {"a": {0: {0: 1e308, 1: 1.0}, 1: {0: -1.7e308, 1: 5e-324}}},
            {"a": {0: {0: 3.4e38, 1: 1.0}, 1: {0: -3.4e38}}},
        ],
    )
    def test_hardly_anything_to_draw(self, curves):
        assert plot(curves, ["a"], "x")["png"]

    def test_long_names_leave_room_for_curves(self):
        """Else matplotlib warns that it has none left."""
        assert plot({"m" * 250: {0: {0: 1.0, 1: 2.0}}}, ["m" * 250], "y" * 300)["png"]

    @pytest.mark.parametrize("names", [["baseline", "znorm"], ["_hidden", "$\\frac$", "c", "d", "e"]])
    def test_the_legend_names_each_method_beside_the_axes(self, monkeypatch, names):
        drawn = []
        original = plots._add_legend
        monkeypatch.setattr(plots, "_add_legend", lambda *args: (original(*args), drawn.append(args)))
        plot({name: {0: {0: 1.0 + i, 1: 2.0}} for i, name in enumerate(names)}, names, "loss")
        ((figure, lines),) = drawn
        (legend,) = figure.legends
        assert [text.get_text() for text in legend.get_texts()] == names
        for handle, line in zip(legend.get_lines(), lines.values(), strict=True):
            assert (handle.get_color(), handle.get_linestyle()) == (line.get_color(), line.get_linestyle())
            assert handle.get_marker() == line.get_marker()
        (axes,) = figure.axes
        assert legend.get_window_extent().x0 >= axes.get_window_extent().x1

    def test_size(self):
        from PIL import Image

        image = Image.open(io.BytesIO(plot({"a": {0: {0: 1.0}}}, ["a"], "x")["png"]))
        assert image.width > 900


DIFFERENCES = {"a": [0.1, -0.2, 0.3], "b": [0.4]}
INTERVALS = {"a": (-0.5, 0.6), "b": None}


class TestForest:
    @pytest.fixture
    def drawn(self, monkeypatch):
        """The axes of each figure."""
        found = []
        original = plots._images
        monkeypatch.setattr(plots, "_images", lambda figure: (found.append(figure.axes[0]), original(figure))[1])
        return found

    def test_a_dot_for_each_seed_and_the_interval_of_the_mean(self, drawn):
        image = forest(DIFFERENCES, INTERVALS, ["first", "a", "b"], "accuracy", "max")
        assert image["png"].startswith(b"\x89PNG")
        assert image == forest(DIFFERENCES, INTERVALS, ["first", "a", "b"], "accuracy", "max")
        zero, dots, line, ends, middle, one = (list(line.get_xdata()) for line in drawn[0].lines)
        assert zero == [0, 0]
        assert dots == [0.1, -0.2, 0.3]
        assert line == ends == [-0.5, 0.6]
        assert middle == pytest.approx([0.2 / 3])
        assert one == [0.4]  # one seed has no interval
        assert [text.get_text() for text in drawn[0].get_yticklabels()] == ["a", "b"]
        assert drawn[0].get_xlabel() == "accuracy: difference from first"
        low, high = drawn[0].get_ylim()
        assert low > high  # the first method is on top

    def test_zero_is_seen(self, drawn):
        forest({"a": [5.0, 5.1]}, {"a": (4.0, 6.0)}, ["first", "a"], "accuracy", "max")
        forest({"a": [-5.0, -5.1]}, {"a": (-6.0, -4.0)}, ["first", "a"], "accuracy", "max")
        for axes in drawn:
            low, high = axes.get_xlim()
            assert low <= 0 <= high

    @pytest.mark.parametrize(("mode", "left", "right"), [("max", "worse", "better"), ("min", "better", "worse")])
    def test_which_side_is_better(self, drawn, mode, left, right):
        forest(DIFFERENCES, INTERVALS, ["first", "a", "b"], "loss", mode)
        words = {text.get_text(): text.get_ha() for text in drawn[0].texts}
        assert words == {f"\u2190 {left}": "right", f"{right} \u2192": "left"}

    def test_a_method_looks_as_in_the_curves(self):
        names = ["first", "a"]
        image = forest({"a": [1.0]}, {"a": None}, names, "loss", "min")["svg"].decode()
        assert "#d55e00" in image
        assert "#d55e00" in plot({"a": {0: {0: 1.0, 1: 2.0}}}, names, "loss")["svg"].decode()

    @pytest.mark.parametrize(
        ("differences", "interval"),
        [
            ([], None),
            ([0.0, 0.0], (0.0, 0.0)),
            ([math.nan, 1.0], None),
            ([1e308, -1e308], (-math.inf, math.inf)),
            ([5e-324, 0.0], (0.0, 5e-324)),
            ([3.4e38, 1.0], (-1e39, 1e39)),
        ],
    )
    def test_hardly_anything_to_draw(self, differences, interval):
        assert forest({"a": differences}, {"a": interval}, ["first", "a"], "x", "max")["png"]

    def test_diverged_methods_are_named(self, drawn):
        forest({"a": [math.inf, 1.0]}, {"a": None}, ["first", "a"], "x", "max")
        assert "not finite: a run has diverged" in [text.get_text() for text in drawn[0].texts]

    @pytest.mark.parametrize("names", [["m" * 250, "n" * 250], ["_hidden", "$\\frac$"], list("abcdefghijk")])
    def test_names(self, drawn, names):
        values = {name: [0.1, 0.2] for name in names[1:]}
        intervals = dict.fromkeys(names[1:], (0.0, 0.3))
        assert forest(values, intervals, names, "y" * 300, "max")["png"]
        shown = [text.get_text() for text in drawn[0].get_yticklabels()]
        assert shown == [name if len(name) < 30 else f"{name[:27]}..." for name in names[1:]]
        assert max(map(len, shown)) <= 30
