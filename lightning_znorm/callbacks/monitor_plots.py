"""The pictures of GradientMonitor, which can be read in print, in grey and by colour-blind readers."""

from collections.abc import Sequence
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_znorm.callbacks.monitor_history import SigmaHistory

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from PIL.Image import Image

_DPI = 130
_WIDTH = 8.0
# Inches of a labelled row, and the largest height of all rows of a picture.
_ROW, _MOST = 0.15, 9.0
_LABEL = r"standard deviation $\sigma$ of the gradient"
_ZERO = "0.75"
# Okabe and Ito's vermilion, unlike any colour of the map. A triangle says the same without colour.
_NOT_FINITE = "#D55E00"


def heat_map(history: SigmaHistory) -> "Image":
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
        axes.set_title(title, loc="left", fontsize=8)
        if axes is not panels[-1]:
            axes.tick_params(labelbottom=False)
    panels[-1].set_xlabel("step")
    mappable: Any = panels[0].collections[0]
    length = min(sum(heights), 3.5)
    position = (1 - 0.9 * right / _WIDTH, (size - gap - length) / size, 0.15 / _WIDTH, length / size)
    bar = figure.colorbar(mappable, cax=figure.add_axes(position), format=LogFormatterMathtext())
    bar.ax.tick_params(labelsize=7)
    bar.set_label(r"$\sigma$" if length < 2 else _LABEL, fontsize=8)
    _explain(figure, sigma)
    return _picture(figure)


def by_depth(history: SigmaHistory) -> "Image":
    """Draw, from the first layer to the last, the range of the deviation over the steps, its start and its end.

    Only weights (tensors of two or more dimensions) are drawn, or all parameters if there are no weights.
    """
    rows = next(rows for _, rows in _blocks(history) if rows)
    sigma = history.sigma[rows].double()
    sigma = sigma.masked_fill(~(sigma.isfinite() & (sigma > 0)), torch.nan)
    ends = max(1, sigma.shape[1] // 10)
    figure = _figure(4.0)
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
    axes.set_xlabel("weights, from the input to the output")
    axes.set_ylabel(_LABEL)
    axes.legend(frameon=False, fontsize=8, loc="lower center", bbox_to_anchor=(0.5, 1.0), ncols=3)
    return _picture(figure)


def mean_share(history: SigmaHistory, threshold: float) -> "Image":
    """Draw the share of the mean in the squared gradient of each parameter, by depth, and a line at a threshold."""
    blocks = [(title, rows) for title, rows in _blocks(history) if rows]
    figure = _figure(1.2 + 2.2 * len(blocks))
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
        axes.set_title(title, loc="left", fontsize=8)
    panels[0].legend(
        handles=panels[0].get_lines()[1:], frameon=False, fontsize=7, loc="lower right", bbox_to_anchor=(1, 1)
    )
    figure.supylabel(r"share of the mean in the squared gradient, $\mu^2 / (\sigma^2 + \mu^2)$", fontsize=8)
    return _picture(figure)


def _blocks(history: SigmaHistory) -> list[tuple[str, list[int]]]:
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
    axes.set_yticklabels([_short(names[number]) for number in shown], fontsize=6)


def _name_depths(axes: Any, names: Sequence[str]) -> None:
    """Name the parameters along the horizontal axis, at 1, 2 and so on."""
    axes.set_xlim(0.5, len(names) + 0.5)
    shown = _evenly_spaced(len(names), 30)
    axes.set_xticks([number + 1 for number in shown])
    axes.set_xticklabels([_short(names[number]) for number in shown], rotation=90, fontsize=6)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="0.9", linewidth=0.6)
    axes.set_axisbelow(True)


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
        figure.legend(handles=handles, loc="lower left", ncols=2, fontsize=7, frameon=False)


def _figure(height: float, layout: Any = "constrained") -> "Figure":
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(_WIDTH, height), dpi=_DPI, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def _picture(figure: Any) -> "Image":
    from PIL import Image

    figure.canvas.draw()
    width, height = figure.canvas.get_width_height()
    return Image.frombytes("RGBA", (width, height), bytes(figure.canvas.buffer_rgba())).convert("RGB")
