"""Tables and figures of the study of a rare class and one sigmoid output.

    python -m examples.imbalance.report                          tables of the results that come with this repository
    python -m examples.imbalance.report studies/imbalance DIR    your own, with figures and numbers, written to DIR

A study is a folder with ``results.csv``, as ``compare`` writes it. Differences are paired by seed, with 95 % intervals.
Verdicts are those of ``compare`` on the metric of the test: Holm's procedure for all methods of a study.
"""

import math
import sys
from collections.abc import Mapping
from pathlib import Path
from statistics import fmean

from examples.stability.report import Styles, Values, difference, draw_curves, keep, ratio, read
from lightning_znorm.compare.statistics import compare_methods, judge

RESULTS = Path(__file__).parent / "results"
KEPT = (
    *("train/loss", "train/probability", "train/mean_share"),
    *("val/loss", "val/dice_per_patient", "test/loss", "test/dice_per_patient"),
)
LAST_EPOCHS = 3
STYLES: Styles = {
    "baseline": ("#000000", "-", "o"),
    "gc": ("#009E73", (0, (6, 1.5, 1, 1.5)), "D"),
    "znorm": ("#D55E00", (0, (5, 1.5)), "s"),
    "znorm-weights": ("#E69F00", (0, (2, 2)), ">"),
    "znorm-but-output": ("#CC79A7", (0, (3, 1, 1, 1, 1, 1)), "v"),
    "znorm-adaptive": ("#0072B2", "-", "^"),
    "adaptive-rows": ("#56B4E9", (0, (8, 2)), "<"),
}


def main(source: Path | None = None, target: Path = RESULTS) -> None:
    for path in sorted(source.glob("*/results.csv")) if source else ():
        keep(path, target / f"{path.parent.name}.csv", KEPT)
    studies = {path.stem: read(path) for path in sorted(target.glob("*.csv"), key=lambda path: path.stem)}
    if source:
        for metric, label, log in (
            ("train/loss", "training loss", True),
            ("val/dice_per_patient", "Dice per patient, validation", False),
        ):
            values = {name: metrics[metric] for name, metrics in studies.items() if metric in metrics}
            if values:
                figure = draw_curves(label, values, STYLES, log=log)
                figure.savefig(target / f"{metric.partition('/')[2]}.png", dpi=110)
    for name, metrics in studies.items():
        print(f"\n### `{name}`\n\n{table(metrics)}\n\n{verdicts(metrics)}")
        if f"{name}-prior" in studies:
            print(f"\n### `{name}`, with `prior` against without\n\n{prior_table(metrics, studies[f'{name}-prior'])}")


def table(metrics: Mapping[str, Values]) -> str:
    """Return a table of the end of training, with each method compared to the baseline and to plain ZNorm.

    The training loss is the geometric mean over the last epochs and the seeds, and is compared as a ratio.
    """
    losses, score = _losses(metrics), _score(metrics)
    scores, probabilities, shares = (last(metrics[name]) for name in (score, "train/probability", "train/mean_share"))
    lines = [
        f"| method | seeds | train loss | of the baseline's | of ZNorm's | {score} | from the baseline's "
        "| from ZNorm's | mean probability | share of the mean |",
        f"| --- |{' --: |' * 9}",
    ]
    for method in (name for name in STYLES if name in losses):
        cells = [method, str(len(losses[method])), f"{10 ** fmean(losses[method].values()):.3g}"]
        cells += [ratio(losses, method, other) for other in ("baseline", "znorm")]
        cells += [f"{fmean(scores[method].values()):.3f}"]
        cells += [difference(scores, method, other) for other in ("baseline", "znorm")]
        cells += [f"{fmean(probabilities[method].values()):.4f}", f"{fmean(shares[method].values()):.2f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def verdicts(metrics: Mapping[str, Values]) -> str:
    """Return what the metric of the test tells about each method against the baseline, in the words of `compare`."""
    score = _score(metrics)
    values = last(metrics[score])
    in_order = {method: values[method] for method in STYLES if method in values}
    rows = judge(list(compare_methods(score, in_order)), "min" if score == "test/loss" else "max")
    return "\n".join(f"- {row.method}: {row.verdict}" for row in rows if row.verdict)


def prior_table(without: Mapping[str, Values], with_prior: Mapping[str, Values]) -> str:
    """Return a table of what a prior changes under each method, paired by seed."""
    score = _score(without)
    losses = [_losses(metrics) for metrics in (without, with_prior)]
    scores = [last(metrics[score]) for metrics in (without, with_prior)]
    lines = [
        f"| method | seeds | train loss, of that without | {score}, from that without |",
        "| --- | --: | --: | --: |",
    ]
    for method in (name for name in STYLES if name in losses[1]):
        sides = [{"without": values[0][method], "with": values[1][method]} for values in (losses, scores)]
        seeds = len(sides[0]["without"].keys() & sides[0]["with"].keys())
        cells = [method, str(seeds), ratio(sides[0], "with", "without"), difference(sides[1], "with", "without")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def _losses(metrics: Mapping[str, Values]) -> dict[str, dict[int, float]]:
    """Return the logarithm of the loss at the end of training, by method and seed."""
    return {
        method: {seed: _end(curve) for seed, curve in runs.items()} for method, runs in metrics["train/loss"].items()
    }


def _score(metrics: Mapping[str, Values]) -> str:
    """Return the metric of the test."""
    return "test/dice_per_patient" if "test/dice_per_patient" in metrics else "test/loss"


def _end(curve: Mapping[int, float]) -> float:
    """Return the logarithm of the end of a curve."""
    return fmean(math.log10(curve[epoch]) for epoch in sorted(curve)[-LAST_EPOCHS:])


def last(values: Values) -> dict[str, dict[int, float]]:
    """Return the value of the last epoch, by method and seed."""
    return {method: {seed: curve[max(curve)] for seed, curve in runs.items()} for method, runs in values.items()}


if __name__ == "__main__":
    main(*(Path(argument) for argument in sys.argv[1:]))
