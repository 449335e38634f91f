"""Figures, of curves made up for them."""

import io
import math
import re
from itertools import pairwise

import pytest

from lightning_znorm.compare import plots
from lightning_znorm.compare.plots import plot, spaced


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
        monkeypatch.setattr(plots, "_label", lambda axes, ends: drawn.append((axes, ends)))
        plot({"a": {0: {0: 1.0, 1: 2.0, 2: 5.0}, 1: {0: 3.0, 1: 2.0}}}, ["a"], "loss")
        ((axes, ends),) = drawn
        low, high, line = axes.lines
        assert [list(line.get_xdata()), list(line.get_ydata())] == [[1, 2, 3], [2.0, 2.0, 5.0]]
        assert [list(edge.get_ydata()) for edge in (low, high)] == [[1.0, 2.0, 5.0], [3.0, 2.0, 5.0]]
        assert (axes.get_xlabel(), axes.get_ylabel()) == ("epoch", "loss")
        assert ends[0][:3] == (3, 5.0, "a")

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

    def test_labels_keep_apart(self):
        for wanted in ([0, 0, 0, 0], [1, 2, 3, 30], [0, 10, 20], []):
            found = spaced(wanted, 5)
            assert len(found) == len(wanted)
            assert all(b - a > 5 - 1e-9 for a, b in pairwise(found))
            assert sum(found) == pytest.approx(sum(wanted))

    def test_size(self):
        from PIL import Image

        image = Image.open(io.BytesIO(plot({"a": {0: {0: 1.0}}}, ["a"], "x")["png"]))
        assert image.width > 900
