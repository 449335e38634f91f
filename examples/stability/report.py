"""Tables and figures of the study of stability near convergence.

    python examples/stability/report.py                          tables of the results that come with this repository
    python examples/stability/report.py studies/stability DIR    your own, with figures and numbers, written to DIR

A study is a folder with ``results.csv``, as ``compare`` writes it. Differences are paired by seed, with 95 % intervals.
"""

import csv
import math
import re
import sys
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any, TypeAlias

from lightning_znorm.compare.statistics import paired_interval

RESULTS = Path(__file__).parent / "results"
LAST_EPOCHS = 5
KEPT = ("test/accuracy", "val/accuracy", "train/loss", "full/loss", "sigma/", "cosine/")
# As in the reports of `compare`: Okabe and Ito's colours, with dashes and markers that tell methods apart in grey.
Styles: TypeAlias = Mapping[str, tuple[str, Any, str]]
"""Colour, dashes and marker of each method."""

STYLES: Styles = {
    "baseline": ("#000000", "-", "o"),
    "znorm": ("#D55E00", (0, (5, 1.5)), "s"),
    "floor": ("#0072B2", (0, (1, 1.2)), "^"),
    "relative-eps": ("#009E73", (0, (6, 1.5, 1, 1.5)), "D"),
    "blend": ("#CC79A7", (0, (3, 1, 1, 1, 1, 1)), "v"),
    "geometric": ("#E69F00", (0, (2, 2)), ">"),
    "handover": ("#56B4E9", (0, (8, 2)), "<"),
    "znorm-adaptive": ("#882255", "-", "P"),
}

Values = dict[str, dict[int, dict[int, float]]]
"""Values by method, seed and epoch."""


def main(source: Path | None = None, target: Path = RESULTS) -> None:
    for path in sorted(source.glob("*/results.csv")) if source else ():
        keep(path, target / f"{path.parent.name}.csv")
    studies = {path.stem: read(path) for path in sorted(target.glob("*.csv"))}
    if source:
        draw(studies, target)
    for name, metrics in studies.items():
        print(f"\n## {name}\n\n{table(metrics)}")


def keep(source: Path, target: Path, kept: tuple[str, ...] = KEPT) -> None:
    """Copy metrics of a study in four digits: a row for each epoch of a run."""
    rows: dict[tuple[str, str, int], dict[str, str]] = defaultdict(dict)
    with source.open(newline="") as file:
        for row in csv.DictReader(file):
            if row["metric"].startswith(kept):
                run = (row["method"].removesuffix("-sgd"), row["seed"], int(row["epoch"]))
                rows[run][row["metric"]] = f"{float(row['value']):.4g}"
    metrics = sorted({metric for row in rows.values() for metric in row}, key=_by_depth)
    target.parent.mkdir(parents=True, exist_ok=True)
    with target.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["method", "seed", "epoch", *metrics])
        writer.writerows([*run, *(row.get(metric, "") for metric in metrics)] for run, row in rows.items())


def _by_depth(metric: str) -> tuple[Any, ...]:
    """Return a sort key that puts layers in their order in the network: by number, and the last one last."""
    kind, _, name = metric.partition("/")
    return kind, name.startswith("fc"), [int(number) for number in re.findall(r"\d+", name)], name


def read(path: Path) -> dict[str, Values]:
    """Read the values of a study, by metric, method, seed and epoch."""
    metrics: dict[str, Values] = {}
    with path.open(newline="") as file:
        for row in csv.DictReader(file):
            method, seed, epoch = row.pop("method"), int(row.pop("seed")), int(row.pop("epoch"))
            for metric, text in row.items():
                if text:
                    by_seed = metrics.setdefault(metric, {}).setdefault(method, defaultdict(dict))
                    by_seed[seed][epoch] = float(text)
    return metrics


def table(metrics: Mapping[str, Values]) -> str:
    """Return a table of the end of training, with each method compared to the baseline and to plain ZNorm.

    The training loss is the geometric mean over the last epochs and the seeds, and is compared as a ratio.
    """
    losses = {
        method: {seed: fmean(_logs(curve)[-LAST_EPOCHS:]) for seed, curve in by_seed.items()}
        for method, by_seed in metrics["train/loss"].items()
    }
    accuracies = {
        method: {seed: curve[max(curve)] for seed, curve in by_seed.items()}
        for method, by_seed in metrics["test/accuracy"].items()
    }
    lines = [
        "| method | seeds | train loss | of the baseline's | of ZNorm's | test accuracy | from the baseline's "
        "| from ZNorm's |",
        "| --- | --: | --: | --: | --: | --: | --: | --: |",
    ]
    for method in (name for name in STYLES if name in losses):
        cells = [method, str(len(losses[method])), f"{10 ** fmean(losses[method].values()):.2g}"]
        cells += [ratio(losses, method, other) for other in ("baseline", "znorm")]
        cells += [f"{fmean(accuracies[method].values()):.3f}"]
        cells += [difference(accuracies, method, other) for other in ("baseline", "znorm")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _logs(curve: Mapping[int, float]) -> list[float]:
    return [math.log10(curve[epoch]) for epoch in sorted(curve)]


def _paired(values: Mapping[str, Mapping[int, float]], method: str, other: str) -> list[float]:
    if method == other or other not in values:
        return []
    return [value - values[other][seed] for seed, value in sorted(values[method].items()) if seed in values[other]]


def ratio(values: Mapping[str, Mapping[int, float]], method: str, other: str) -> str:
    """Return how a method's values compare with another's as a ratio; they are logarithms, by method and seed."""
    differences = _paired(values, method, other)
    if not differences:
        return "-"
    interval = paired_interval(differences)
    ends = "" if interval is None else f" ({10 ** interval[0]:.2g} to {10 ** interval[1]:.2g})"
    return f"{10 ** fmean(differences):.2g}{ends}"


def difference(values: Mapping[str, Mapping[int, float]], method: str, other: str) -> str:
    """Return the difference of a method's values from another's; they are by method and seed."""
    differences = _paired(values, method, other)
    if not differences:
        return "-"
    interval = paired_interval(differences)
    ends = "" if interval is None else f" ({interval[0]:+.3f} to {interval[1]:+.3f})"
    return f"{fmean(differences):+.3f}{ends}"


def draw(studies: Mapping[str, Mapping[str, Values]], folder: Path) -> None:
    """Draw the figures: losses of all studies, and gradients of the studies that measured them."""
    losses = {name: metrics["train/loss"] for name, metrics in studies.items()}
    draw_curves("training loss", losses, log=True).savefig(folder / "loss.png", dpi=110)
    measured = {name: metrics for name, metrics in studies.items() if any("sigma/" in metric for metric in metrics)}
    if measured:
        cosines = {name: _mean_cosine(metrics) for name, metrics in measured.items()}
        draw_curves("cosine to the full gradient", cosines).savefig(folder / "cosine.png", dpi=110)
        adam = {name: metrics for name, metrics in measured.items() if "sgd" not in name}
        _draw_sigmas(adam).savefig(folder / "sigma.png", dpi=100)


def _mean_cosine(metrics: Mapping[str, Values]) -> Values:
    """Return the mean cosine over the layers."""
    layers = [values for name, values in metrics.items() if name.startswith("cosine/")]
    return {
        method: {
            seed: {epoch: fmean(layer[method][seed][epoch] for layer in layers) for epoch in curve}
            for seed, curve in by_seed.items()
        }
        for method, by_seed in layers[0].items()
    }


def _panels(count: int, columns: int = 3, **options: Any) -> tuple[Any, list[Any]]:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    columns = min(count, columns)
    rows = -(-count // columns)
    figure = Figure(figsize=(3.1 * columns, 2.5 * rows + 0.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(rows, columns, squeeze=False, **options).flat)
    for panel in panels[count:]:
        panel.set_axis_off()
    for panel in panels[:count]:
        panel.spines[["top", "right"]].set_visible(False)
        panel.grid(axis="y", color="0.9", linewidth=0.6)
        panel.tick_params(labelsize=8, labelbottom=True, labelleft=True)
        panel.set_xlabel("epoch", fontsize=8)
    return figure, panels


def draw_curves(label: str, studies: Mapping[str, Values], styles: Styles = STYLES, log: bool = False) -> Any:
    """Draw a panel for each study, with a line for each method."""
    figure, panels = _panels(len(studies), sharey=True)
    handles = {}
    for panel, (name, values) in zip(panels, studies.items(), strict=False):
        for i, method in enumerate(name for name in styles if name in values):
            epochs, means = _mean_curve(values[method].values(), log)
            colour, dashes, marker = styles[method]
            every = max(1, len(epochs) // 6)
            (handles[method],) = panel.plot(
                epochs, means, color=colour, linestyle=dashes, marker=marker, markersize=4, linewidth=1.4,
                markerfacecolor="white", markevery=(i % every, every), label=method,
            )  # fmt: skip
        panel.set_title(name, fontsize=9)
        if log:
            panel.set_yscale("log")
    panels[0].set_ylabel(label, fontsize=8)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=7, fontsize=8, frameon=False)
    return figure


def _mean_curve(curves: Iterable[Mapping[int, float]], log: bool) -> tuple[list[int], list[float]]:
    """Return epochs and the mean over the seeds, which is geometric on a logarithmic axis."""
    curves = list(curves)
    epochs = sorted(set.intersection(*(set(curve) for curve in curves)))
    columns = [[curve[epoch] for curve in curves] for epoch in epochs]
    means = [math.exp(fmean(map(math.log, column))) if log else fmean(column) for column in columns]
    return [epoch + 1 for epoch in epochs], means


def _draw_sigmas(shown: Mapping[str, Mapping[str, Values]]) -> Any:
    """Draw the deviation of each layer's gradient: baseline above, ZNorm below; deep layers are dark."""
    figure, panels = _panels(2 * len(shown), columns=len(shown), sharey=True)
    handles = {}
    for number, panel in enumerate(panels):
        method = ("baseline", "znorm")[number // len(shown)]
        name = list(shown)[number % len(shown)]
        layers = [values for metric, values in shown[name].items() if metric.startswith("sigma/")]
        for layer, values in enumerate(layers):
            epochs, means = _mean_curve(values[method].values(), log=True)
            style = {"color": str(0.8 * (1 - layer / (len(layers) - 1))), "linestyle": _DASHES[layer % len(_DASHES)]}
            (handles[f"layer {layer + 1}"],) = panel.plot(epochs, means, linewidth=1.3, **style)
        panel.set_title(f"{name}: {method}", fontsize=9)
        panel.set_yscale("log")
    for row in range(2):
        panels[row * len(shown)].set_ylabel("deviation of the gradient", fontsize=8)
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=9, fontsize=8, frameon=False)
    return figure


_DASHES: Sequence[Any] = ("-", (0, (5, 1.5)), (0, (1, 1.2)))


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
