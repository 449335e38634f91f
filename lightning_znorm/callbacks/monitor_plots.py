"""The pictures of GradientMonitor, which can be read in print, in grey and by colour-blind readers."""

from collections.abc import Sequence
from functools import partial
from io import BytesIO
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_znorm.callbacks.monitor_history import GradientHistory

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

_DPI = 130
# Points; names of parameters are smaller than the other texts.
_TEXT, _NAME = 9, 7
_WIDTH = 8.0
# Inches of a labelled row, and the largest height of all rows of a picture.
_ROW, _MOST = 0.15, 9.0
_LABEL = r"standard deviation $\sigma$ of the gradient"
_ZERO = "0.75"
# Okabe and Ito's vermilion, unlike any colour of the map. A triangle says the same without colour.
_NOT_FINITE = "#D55E00"


def figures_of(history: GradientHistory, threshold: float) -> dict[str, "Figure"]:
    """Draw all pictures of a history, which must hold a step.

    Args:
        history: What was measured.
        threshold: The share of the mean that is marked.
    """
    return {
        "sigma_over_steps": heat_map(history),
        "sigma_by_depth": by_depth(history),
        "mean_share": mean_share(history, threshold),
        "znorm_change": znorm_change(history),
    }


def image_of(figure: "Figure") -> "Image":
    """Return a figure as an image in RGB."""
    from PIL import Image

    canvas: Any = figure.canvas
    canvas.draw()
    width, height = canvas.get_width_height()
    return Image.frombytes("RGBA", (width, height), bytes(canvas.buffer_rgba())).convert("RGB")


def heat_map(history: GradientHistory) -> "Figure":
    """Draw the deviation of each gradient over the steps: weights above, vectors (biases, scales) below, by depth."""
    from matplotlib.colors import LogNorm
    from matplotlib.ticker import LogFormatterMathtext

    sigma = history.sigma
    blocks = [(title, rows) for title, rows in _blocks(history) if rows]
    positive = sigma[sigma.isfinite() & (sigma > 0)]
    low, high = (float(positive.min()), float(positive.max())) if len(positive) else (1e-8, 1.0)
    # Outliers, such as biases whose true gradient is zero, would use up the colours.
    low = max(low, high * 1e-8)
    norm = LogNorm(low, max(high, low * 10))
    heights = [min(max(len(rows), 4) * _ROW, _MOST / len(blocks)) for _, rows in blocks]
    # In inches, because automatic layouts give the rows different heights.
    left, right, gap, bottom = 2.2, 1.0, 0.3, 0.7
    size = bottom + sum(heights) + gap * len(blocks)
    figure = _figure(size, layout=None)
    panels, top = [], size
    for height in heights:
        top -= gap + height
        panels.append(figure.add_axes((left / _WIDTH, top / size, 1 - (left + right) / _WIDTH, height / size)))
    for axes, height, (title, rows) in zip(panels, heights, blocks, strict=True):
        _cells(axes, history.steps, sigma[rows], norm)
        _name_rows(axes, [history.names[row] for row in rows], height)
        axes.set_title(title, loc="left", fontsize=_TEXT)
        axes.tick_params(axis="x", labelsize=_TEXT)
        if axes is not panels[-1]:
            axes.tick_params(labelbottom=False)
    panels[-1].set_xlabel("step", fontsize=_TEXT)
    mappable: Any = panels[0].collections[0]
    length = min(sum(heights), 3.5)
    position = (1 - 0.9 * right / _WIDTH, (size - gap - length) / size, 0.15 / _WIDTH, length / size)
    bar = figure.colorbar(mappable, cax=figure.add_axes(position), format=LogFormatterMathtext())
    bar.ax.tick_params(labelsize=_TEXT)
    bar.set_label(r"$\sigma$" if length < 2 else _LABEL, fontsize=_TEXT)
    _explain(figure, sigma)
    return figure


def by_depth(history: GradientHistory) -> "Figure":
    """Draw, from the first layer to the last, the range of the deviation over the steps, its start and its end.

    Only weights (tensors of two or more dimensions) are drawn, or all parameters if there are no weights.
    """
    rows = next(rows for _, rows in _blocks(history) if rows)
    sigma = history.sigma[rows].double()
    sigma = sigma.masked_fill(~(sigma.isfinite() & (sigma > 0)), torch.nan)
    ends = max(1, sigma.shape[1] // 10)
    figure = _figure(4.6)
    axes = figure.add_subplot()
    depth = list(range(1, len(rows) + 1))
    low, high = (sigma.nanquantile(q, dim=1).tolist() for q in (0.1, 0.9))
    axes.fill_between(depth, low, high, color="0.85", linewidth=0, label="10 to 90 % of the steps")
    marks: dict[str, Any] = {"linewidth": 1.4, "markersize": 4, "markerfacecolor": "white"}
    for part, label, style, colour, marker in (
        (sigma[:, :ends], "first tenth of the steps (median)", "--", "#0072B2", "o"),
        (sigma[:, -ends:], "last tenth of the steps (median)", "-", _NOT_FINITE, "s"),
    ):
        values = part.nanquantile(0.5, dim=1).tolist()
        axes.plot(depth, values, style, color=colour, marker=marker, label=label, **marks)
    if bool(sigma.isfinite().any()):
        axes.set_yscale("log")
    _name_depths(axes, [history.names[row] for row in rows])
    axes.set_xlabel("weights, from the input to the output", fontsize=_TEXT)
    axes.set_ylabel(_LABEL, fontsize=_TEXT)
    axes.legend(frameon=False, fontsize=_TEXT, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    return figure


def mean_share(history: GradientHistory, threshold: float) -> "Figure":
    """Draw the share of the mean in the squared gradient of each parameter, by depth, and a line at a threshold."""
    blocks = [(title, rows) for title, rows in _blocks(history) if rows]
    figure = _figure(1.0 + 2.9 * len(blocks))
    panels = figure.subplots(len(blocks), 1, squeeze=False)[:, 0]
    shares = history.mean_share
    for axes, (title, rows) in zip(panels, blocks, strict=True):
        depth = list(range(1, len(rows) + 1))
        values = shares[rows].tolist()
        axes.vlines(depth, 0, values, color="#0072B2", linewidth=1.4)
        axes.plot(depth, values, "o", color="#0072B2", markersize=4, markerfacecolor="white")
        label = f"above {threshold:g}, centring leaves little of the direction"
        axes.axhline(threshold, color=_NOT_FINITE, linestyle="--", linewidth=1, label=label)
        axes.set_ylim(0, 1.02)
        _name_depths(axes, [history.names[row] for row in rows])
        axes.set_title(title, loc="left", fontsize=_TEXT)
    panels[0].legend(
        handles=panels[0].get_lines()[1:], frameon=False, fontsize=_TEXT, loc="lower right", bbox_to_anchor=(1, 1)
    )
    figure.supylabel(r"share of the mean in the squared gradient, $\mu^2 / (\sigma^2 + \mu^2)$", fontsize=_TEXT)
    return figure


def znorm_change(history: GradientHistory) -> "Figure":
    """Draw what ZNorm would change of each layer's step, from the first layer to the last: its direction and its size.

    Only weights (tensors of two or more dimensions) are drawn, or all parameters if there are no weights.
    """
    from matplotlib.ticker import LogLocator

    rows = next(rows for _, rows in _blocks(history) if rows)
    depth = list(range(1, len(rows) + 1))
    figure = _figure(6.2)
    direction, size = figure.subplots(2, 1, sharex=True)
    for axes, values, colour in (
        (direction, history.cosine[rows], "#0072B2"),
        (size, history.relative_size[rows], _NOT_FINITE),
    ):
        values = values.double()
        values = values.masked_fill(~(values.isfinite() & (values >= 0)), torch.nan)
        low, middle, high = (values.nanquantile(q, dim=1).tolist() for q in (0.1, 0.5, 0.9))
        axes.fill_between(depth, low, high, color=colour, alpha=0.2, linewidth=0, label="10 to 90 % of the steps")
        marks: dict[str, Any] = {"marker": "o", "markersize": 4, "markerfacecolor": "white", "linewidth": 1.4}
        axes.plot(depth, middle, color=colour, label="median of the steps", **marks)
        _name_depths(axes, [history.names[row] for row in rows])
        axes.axhline(1, color="0.3", linestyle="--", linewidth=1, label="as without ZNorm", zorder=1)
    direction.set_ylim(0, 1.05)
    direction.tick_params(labelbottom=False)
    direction.set_ylabel("cosine of g and z", fontsize=_TEXT)
    direction.set_title("direction: the angle between the gradient g and its z-score z", loc="left", fontsize=_TEXT)
    if bool((history.relative_size[rows] > 0).any()):
        size.set_yscale("log")
        size.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        size.yaxis.set_major_formatter("{x:g}")
        size.yaxis.set_minor_formatter("")
    size.set_ylabel(r"$\frac{|z_l|\,/\,|g_l|}{|z|\,/\,|g|}$", fontsize=_TEXT + 4)
    title = "size: by how many times the layer's share of an SGD step grows (below 1: it shrinks)"
    size.set_title(title, loc="left", fontsize=_TEXT)
    size.set_xlabel("weights, from the input to the output", fontsize=_TEXT)
    figure.supxlabel(
        "Adam divides the size out again: under Adam, ZNorm changes the direction alone.",
        fontsize=_TEXT,
        style="italic",
    )
    _legend_above(figure, direction)
    return figure


def _legend_above(figure: "Figure", axes: Any) -> None:
    """Explain the lines of a panel, above all panels."""
    figure.legend(*axes.get_legend_handles_labels(), frameon=False, fontsize=_TEXT, loc="outside upper right", ncols=3)


def _blocks(history: GradientHistory) -> list[tuple[str, list[int]]]:
    weights = [row for row, ndim in enumerate(history.ndims) if ndim > 1]
    vectors = [row for row, ndim in enumerate(history.ndims) if ndim <= 1]
    return [("weights, from the input to the output", weights), ("biases and scales", vectors)]


def _cells(axes: Any, steps: Sequence[int], sigma: Tensor, norm: Any) -> None:
    """Draw a coloured cell for each row and step: grey for zero, vermilion for inf or NaN, white for no gradient."""
    from matplotlib.colors import ListedColormap

    edges = _edges(steps)
    tops = [row - 0.5 for row in range(len(sigma) + 1)]
    shown = sigma.masked_fill(~sigma.isfinite() | (sigma <= 0), torch.nan)
    # Values below the scale are drawn as its least value.
    cells = shown.clamp_min(norm.vmin).numpy()
    axes.pcolormesh(edges, tops, cells, norm=norm, cmap="viridis", rasterized=True)
    for where, colour in ((sigma == 0, _ZERO), (sigma.isinf(), _NOT_FINITE)):
        if bool(where.any()):
            mask = torch.ones_like(sigma).masked_fill(~where, torch.nan).numpy()
            axes.pcolormesh(edges, tops, mask, cmap=ListedColormap([colour]), vmin=0, vmax=1, rasterized=True)
    bad = sigma.isinf().any(0).nonzero().flatten().tolist()
    middles = [(edges[number] + edges[number + 1]) / 2 for number in bad]
    axes.plot(middles, [-0.5] * len(bad), "v", color=_NOT_FINITE, markersize=5, clip_on=False)
    axes.invert_yaxis()


def _edges(steps: Sequence[int]) -> list[float]:
    """Return the borders between steps, each in the middle of two."""
    middles = [(one + other) / 2 for one, other in pairwise(steps)]
    first = 2 * steps[0] - middles[0] if middles else steps[0] - 0.5
    last = 2 * steps[-1] - middles[-1] if middles else steps[-1] + 0.5
    return [first, *middles, last]


def _name_rows(axes: Any, names: Sequence[str], height: float) -> None:
    shown = _evenly_spaced(len(names), int(height / (0.8 * _ROW)) or 1)
    axes.set_yticks(shown)
    axes.set_yticklabels([_short(names[number]) for number in shown], fontsize=_NAME)


def _name_depths(axes: Any, names: Sequence[str]) -> None:
    """Name the parameters along the horizontal axis, at 1, 2 and so on."""
    axes.set_xlim(0.5, len(names) + 0.5)
    shown = _evenly_spaced(len(names), 30)
    axes.set_xticks([number + 1 for number in shown])
    axes.set_xticklabels([_short(names[number]) for number in shown], rotation=90, fontsize=_NAME)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(axis="y", labelsize=_TEXT)


def _evenly_spaced(count: int, most: int) -> list[int]:
    """Return evenly spaced numbers below ``count``, at most ``most`` of them."""
    return list(range(0, count, -(-count // most)))


def _short(name: str, most: int = 34) -> str:
    return name if len(name) <= most else f"…{name[1 - most :]}"


def _explain(figure: "Figure", sigma: Tensor) -> None:
    """Explain the colours that are not in the scale, if the picture has them."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    handles: list[Any] = []
    if bool((sigma == 0).any()):
        handles.append(Patch(color=_ZERO, label=r"$\sigma = 0$: constant, or too small to tell"))
    if bool(sigma.isinf().any()):
        marks: dict[str, Any] = {"marker": "v", "color": _NOT_FINITE, "linestyle": "", "markersize": 5}
        handles.append(Line2D([], [], label="inf or NaN", **marks))
    if handles:
        figure.legend(handles=handles, loc="lower left", ncols=2, fontsize=_TEXT, frameon=False)


def _figure(height: float, layout: Any = "constrained") -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, layout=layout)
    FigureCanvasAgg(figure)
    # So a notebook shows it. It can do so itself only if pyplot has been imported.
    shown: Any = figure
    shown._repr_png_ = partial(_png_of, figure)
    return figure


def _png_of(figure: "Figure") -> bytes:
    """Return a figure as a PNG file."""
    file = BytesIO()
    figure.savefig(file, format="png")
    return file.getvalue()
