"""Figures: curves over epochs, and differences by method; readable in print, in grey and by colour-blind readers."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from io import BytesIO
from typing import Any, Literal

from lightning_znorm.compare.formatting import visible
from lightning_znorm.compare.results import mean

# The colours of Okabe and Ito without yellow, which is invisible on paper. Dashes and markers work without colour.
_COLOURS = ("#000000", "#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_DASHES: tuple[Any, ...] = ("-", (0, (5, 1.5)), (0, (1, 1.2)), (0, (6, 1.5, 1, 1.5)), (0, (3, 1, 1, 1, 1, 1)))
_MARKERS = "os^Dv<>PX*"
_SIZE = (7.2, 3.8)
_LARGEST = 1e100
"""Axes overflow for larger values."""
_LONGEST = 50
"""Letters of a name: longer ones would leave no room for the axes."""

_MOST_TICKS = 8
"""Values of a swept setting that all have their tick on the axis."""
_LONGEST_BESIDE = 30
"""Letters of a name beside the axes, in a legend or of a row."""

Curves = Mapping[str, Mapping[int, Mapping[int, float]]]
"""A value by method, seed and epoch."""


def plot(curves: Curves, methods: Sequence[str], label: str) -> dict[str, bytes]:
    """Draw the mean over seeds of each method, and a band from the lowest to the highest seed.

    Args:
        curves: A value by method, seed and epoch.
        methods: All methods of the study, so that each looks the same in every figure.
        label: Name of the values.

    Returns:
        The image, as ``"png"`` and as ``"svg"``.
    """
    from matplotlib.ticker import MaxNLocator

    def draw(axes: Any) -> dict[str, Any]:
        lines = {}
        for i, method in enumerate(methods):
            if finite := _finite(curves.get(method, {})):
                lines[method] = _draw(axes, finite, i)
        values = [
            value for by_seed in curves.values() for curve in _finite(by_seed).values() for value in curve.values()
        ]
        if values and min(values) > 0 and max(values) / min(values) > 50:
            axes.set_yscale("log")
        axes.set_xlabel("epoch")
        axes.set_ylabel(_shortened(label), parse_math=False)  # a name may hold a $
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        return lines

    return _drawn(draw)


def _drawn(
    draw: Callable[[Any], Mapping[str, Any]], size: tuple[float, float] = _SIZE, grid: Literal["x", "y"] = "y"
) -> dict[str, bytes]:
    """Return the image of axes on which a function draws lines, and returns each by its name for the legend.

    Args:
        draw: Draws on axes.
        size: Size of the figure, in inches.
        grid: Axis from which the lines of the grid start.
    """
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with rc_context({"svg.hashsalt": "lightning-znorm", "font.size": 9, "axes.unicode_minus": False}):
        figure = Figure(figsize=size, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        lines = draw(axes)
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis=grid, color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
        _add_legend(figure, lines)
        return _images(figure)


def _images(figure: Any) -> dict[str, bytes]:
    images = {}
    for kind, options in (("png", {"dpi": 130}), ("svg", {"metadata": {"Date": None}})):
        data = BytesIO()
        figure.savefig(data, format=kind, **options)
        images[kind] = data.getvalue()
    return images


def forest(
    differences: Mapping[str, Sequence[float]],
    intervals: Mapping[str, tuple[float, float] | None],
    methods: Sequence[str],
    label: str,
    mode: str,
) -> dict[str, bytes]:
    """Draw a forest plot: for each method a dot for each seed, and below them the mean with its interval.

    Args:
        differences: Differences from the first method by method, one for each seed.
        intervals: The interval of the mean by method; ``None`` where there is none.
        methods: All methods of the study, the first one first, so that each looks the same in every figure.
        label: Name of the metric.
        mode: Whether ``"max"`` or ``"min"`` of the metric is better.

    Returns:
        The image, as ``"png"`` and as ``"svg"``.
    """
    first, *others = methods

    def draw(axes: Any) -> dict[str, Any]:
        axes.axvline(0, color="0.35", linewidth=1)
        for row, method in enumerate(others):
            _draw_differences(axes, differences.get(method, ()), intervals.get(method), row, row + 1)
        axes.set_ylim(max(1, len(others)) - 0.4, -0.6)
        axes.set_yticks(range(len(others)))
        axes.set_yticklabels([_shortened(method, _LONGEST_BESIDE) for method in others])
        for text in axes.get_yticklabels():
            text.set_parse_math(False)  # a name may hold a $
        axes.tick_params(axis="y", length=0)
        low, high = axes.get_xlim()
        axes.set_xlim(min(low, 0), max(high, 0))
        name = _shortened(label, _LONGEST_BESIDE)
        axes.set_xlabel(f"{name}: difference from {_shortened(first, _LONGEST_BESIDE)}", parse_math=False)
        left, right = ("worse", "better") if mode == "max" else ("better", "worse")
        # The vertical line at zero parts the two sides.
        for words, shift, side in ((f"\u2190 {left}", -5, "right"), (f"{right} \u2192", 5, "left")):
            style: dict[str, Any] = {"fontsize": "small", "color": "0.25", "va": "bottom", "ha": side}
            axes.annotate(words, (0, 1), (shift, 2), ("data", "axes fraction"), "offset points", **style)
        axes.spines["left"].set_visible(False)
        return {}

    return _drawn(draw, (_SIZE[0], 1.1 + 0.55 * max(1, len(others))), grid="x")


def _draw_differences(
    axes: Any, differences: Sequence[float], interval: tuple[float, float] | None, row: int, i: int
) -> None:
    """Draw the differences of the method with a number, and their mean with its interval, on one row."""
    colour = _COLOURS[i % len(_COLOURS)]
    shown = [difference for difference in differences if abs(difference) < _LARGEST]
    if len(shown) < len(differences):
        place = {"transform": axes.get_yaxis_transform(), "va": "center", "backgroundcolor": "white"}
        axes.text(0.01, row, "not finite: a run has diverged", fontsize="small", color="0.25", **place)
        return
    # Dots that would cover one another lie side by side.
    heights = [row - 0.22 - 0.11 * (k % 3 - 1) for k in range(len(shown))]
    axes.plot(shown, heights, "o", color=colour, alpha=0.75, markersize=4, markeredgewidth=0)
    if interval is not None and all(abs(end) < _LARGEST for end in interval):
        axes.plot(interval, (row + 0.12, row + 0.12), color=colour, linewidth=1.8, solid_capstyle="butt")
        axes.plot(interval, (row + 0.12, row + 0.12), "|", color=colour, markersize=8, markeredgewidth=1.8)
        marker = _MARKERS[i % len(_MARKERS)]
        axes.plot([mean(shown)], [row + 0.12], marker, color=colour, markersize=6.5, markerfacecolor="white")


def _finite(by_seed: Mapping[int, Mapping[int, float]]) -> dict[int, dict[int, float]]:
    """Remove values that cannot be drawn, from runs that diverged."""
    curves = {
        seed: {e: value for e, value in curve.items() if abs(value) < _LARGEST} for seed, curve in by_seed.items()
    }
    return {seed: curve for seed, curve in curves.items() if curve}


def _draw(axes: Any, by_seed: Mapping[int, Mapping[int, float]], i: int) -> Any:
    """Draw the curve of the method with a number, and return its line."""
    epochs = sorted({epoch for curve in by_seed.values() for epoch in curve})
    values = [[curve[epoch] for curve in by_seed.values() if epoch in curve] for epoch in epochs]
    shown = [epoch + 1 for epoch in epochs]
    colour = _COLOURS[i % len(_COLOURS)]
    dashes = _DASHES[i % len(_DASHES)]
    if len(by_seed) > 1:
        low, high = [min(found) for found in values], [max(found) for found in values]
        axes.fill_between(shown, low, high, color=colour, alpha=0.12, linewidth=0)
        for edge in (low, high):
            axes.plot(shown, edge, color=colour, linestyle=dashes, linewidth=0.6, alpha=0.7)
    (line,) = axes.plot(
        shown,
        [mean(found) for found in values],
        color=colour,
        linestyle=dashes,
        linewidth=1.6,
        marker=_MARKERS[i % len(_MARKERS)],
        markersize=4.5,
        markerfacecolor="white",
        # At different epochs for each method, so that markers do not cover one another.
        markevery=(i % max(1, len(shown) // 8), max(1, len(shown) // 8)),
    )
    return line


def _add_legend(figure: Any, lines: Mapping[str, Any]) -> None:
    """Name the methods beside the axes, where the legend covers no curve; long names stand above them."""
    if not lines:
        return
    names = [_shortened(method) for method in lines]
    loc = "outside right upper" if max(map(len, names)) <= _LONGEST_BESIDE else "outside upper left"
    # matplotlib leaves out names that begin with an underscore, and reads $ as a formula. Names are set afterwards.
    labels = ["method"] * len(names)
    legend = figure.legend(
        list(lines.values()), labels, loc=loc, frameon=False, handlelength=4, labelspacing=0.25, borderaxespad=0
    )
    for text, name in zip(legend.get_texts(), names, strict=True):
        text.set_parse_math(False)
        text.set_text(name)


def _shortened(name: str, most: int = _LONGEST) -> str:
    shown = " ".join(visible(name).split())
    return shown if len(shown) <= most else f"{shown[: most - 3]}..."


@dataclass(frozen=True)
class SweptValue:
    """A method at one value of a swept setting.

    Args:
        value: The value.
        scores: The validation metric for each seed.
        chosen: Whether the method is compared at this value.
    """

    value: str
    scores: Sequence[float]
    chosen: bool


def plot_sweep(
    by_method: Mapping[str, Sequence[SweptValue]], values: Sequence[str], key: str, metric: str
) -> dict[str, bytes]:
    """Draw a metric over the values of a swept setting: for each method the mean over seeds, and a dot for each seed.

    The chosen value of each method has a filled marker. Numbers stand in order, on a logarithmic axis if they span a
    factor of ten or more; other values side by side.

    Args:
        by_method: The values of each method of the study.
        values: All values of the setting, in the order in which they were given.
        key: Name of the setting.
        metric: Name of the metric.

    Returns:
        The image, as ``"png"`` and as ``"svg"``.
    """
    numbers = read_numbers(values)
    places = dict(zip(values, numbers or map(float, range(len(values))), strict=True))

    def draw(axes: Any) -> dict[str, Any]:
        lines = {}
        for i, (method, found) in enumerate(by_method.items()):
            finite = [
                (places[swept.value], [score for score in swept.scores if abs(score) < _LARGEST], swept.chosen)
                for swept in found
            ]
            shown = sorted(entry for entry in finite if entry[1])
            if shown:
                lines[method] = _draw_swept(axes, shown, i)
        if numbers is None:
            axes.set_xticks(list(places.values()), [_shortened(value) for value in places], parse_math=False)
        else:
            if min(numbers) > 0 and max(numbers) / min(numbers) >= 10:
                axes.set_xscale("log")
            if len(values) <= _MOST_TICKS:
                axes.set_xticks(numbers, list(values), parse_math=False)
                axes.minorticks_off()
        axes.set_xlabel(_shortened(key), parse_math=False)
        axes.set_ylabel(_shortened(metric), parse_math=False)
        return lines

    return _drawn(draw)


def _draw_swept(axes: Any, shown: Sequence[tuple[float, list[float], bool]], i: int) -> Any:
    """Draw the method with a number over the places of its values, and return its line."""
    colour, marker = _COLOURS[i % len(_COLOURS)], _MARKERS[i % len(_MARKERS)]
    for place, scores, _ in shown:
        if len(scores) > 1:
            axes.plot([place] * len(scores), scores, ".", color=colour, alpha=0.45, markersize=4)
    (line,) = axes.plot(
        [place for place, _, _ in shown],
        [mean(scores) for _, scores, _ in shown],
        color=colour,
        linestyle=_DASHES[i % len(_DASHES)],
        linewidth=1.6,
        marker=marker,
        markersize=5,
        markerfacecolor="white",
    )
    for place, scores, is_chosen in shown:
        if is_chosen:
            axes.plot([place], [mean(scores)], marker, color=colour, markersize=8)
    return line


def read_numbers(values: Sequence[str]) -> list[float] | None:
    """Return values of a setting as numbers; ``None`` if one is no number, or not finite."""
    try:
        numbers = [float(value) for value in values]
    except ValueError:
        return None
    return numbers if all(map(math.isfinite, numbers)) else None
