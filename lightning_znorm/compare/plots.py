"""Figures: curves over epochs, readable in print, in grey and by colour-blind readers."""

from collections.abc import Mapping, Sequence
from io import BytesIO
from typing import Any

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
    from matplotlib import rc_context
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    with rc_context({"svg.hashsalt": "lightning-znorm", "font.size": 9, "axes.unicode_minus": False}):
        figure = Figure(figsize=_SIZE, layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        ends = []
        for i, method in enumerate(methods):
            finite = _finite(curves.get(method, {}))
            if finite:
                ends.append(_line(axes, finite, i, method))
        lines = [
            value for by_seed in curves.values() for curve in _finite(by_seed).values() for value in curve.values()
        ]
        if lines and min(lines) > 0 and max(lines) / min(lines) > 50:
            axes.set_yscale("log")
        axes.set_xlabel("epoch")
        axes.set_ylabel(_shortened(label), parse_math=False)  # a name may hold a $
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", color="0.9", linewidth=0.6)
        axes.set_axisbelow(True)
        figure.canvas.draw()
        _label(axes, ends)
        images = {}
        for kind, options in (("png", {"dpi": 130}), ("svg", {"metadata": {"Date": None}})):
            data = BytesIO()
            figure.savefig(data, format=kind, **options)
            images[kind] = data.getvalue()
    return images


def _finite(by_seed: Mapping[int, Mapping[int, float]]) -> dict[int, dict[int, float]]:
    """Remove values that cannot be drawn, from runs that diverged."""
    curves = {
        seed: {e: value for e, value in curve.items() if abs(value) < _LARGEST} for seed, curve in by_seed.items()
    }
    return {seed: curve for seed, curve in curves.items() if curve}


def _line(axes: Any, by_seed: Mapping[int, Mapping[int, float]], i: int, method: str) -> tuple[float, float, str, str]:
    epochs = sorted({epoch for curve in by_seed.values() for epoch in curve})
    values = [[curve[epoch] for curve in by_seed.values() if epoch in curve] for epoch in epochs]
    shown = [epoch + 1 for epoch in epochs]
    means = [mean(found) for found in values]
    colour = _COLOURS[i % len(_COLOURS)]
    dashes = _DASHES[i % len(_DASHES)]
    if len(by_seed) > 1:
        low, high = [min(found) for found in values], [max(found) for found in values]
        axes.fill_between(shown, low, high, color=colour, alpha=0.12, linewidth=0)
        for edge in (low, high):
            axes.plot(shown, edge, color=colour, linestyle=dashes, linewidth=0.6, alpha=0.7)
    axes.plot(
        shown,
        means,
        color=colour,
        linestyle=dashes,
        linewidth=1.6,
        marker=_MARKERS[i % len(_MARKERS)],
        markersize=4.5,
        markerfacecolor="white",
        # At different epochs for each method, so that markers do not cover one another.
        markevery=(i % max(1, len(shown) // 8), max(1, len(shown) // 8)),
    )
    return shown[-1], means[-1], method, colour


def _label(axes: Any, ends: list[tuple[float, float, str, str]]) -> None:
    """Write each method's name at the end of its curve, without overlap."""
    if not ends:
        return
    right = max(x for x, *_ in ends)
    placed = sorted((axes.transData.transform((x, y))[1], y, name, colour) for x, y, name, colour in ends)
    wanted = [height for height, *_ in placed]
    point = axes.figure.dpi / 72
    for (height, y, name, colour), free in zip(placed, spaced(wanted, 12 * point), strict=True):
        axes.annotate(
            _shortened(name),
            parse_math=False,
            xy=(right, y),
            xytext=(1.02, (free - height) / point),  # beside the axes, where nothing else is
            textcoords=("axes fraction", "offset points"),
            va="center",  # in black: some of the colours are too light for letters
            arrowprops={"arrowstyle": "-", "color": colour, "relpos": (0, 0.5), "shrinkA": 1, "shrinkB": 3},
        )


def _shortened(name: str) -> str:
    shown = " ".join(visible(name).split())
    return shown if len(shown) <= _LONGEST else f"{shown[: _LONGEST - 3]}..."


def spaced(wanted: Sequence[float], least: float) -> list[float]:
    """Move ascending numbers as little as it takes to keep them apart.

    Example:
        >>> spaced([1.0, 2.0, 9.0], least=3.0)
        [0.0, 3.0, 9.0]
    """
    groups: list[list[float]] = []
    for number in wanted:
        groups.append([number])
        while len(groups) > 1 and _ends(groups[-1], least)[0] - _ends(groups[-2], least)[1] < least:
            last = groups.pop()
            groups[-1] += last
    return [_ends(group, least)[0] + i * least for group in groups for i in range(len(group))]


def _ends(group: Sequence[float], least: float) -> tuple[float, float]:
    half = (len(group) - 1) * least / 2
    return mean(group) - half, mean(group) + half
