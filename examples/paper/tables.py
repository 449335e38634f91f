"""Print the results of studies beside the figures that the paper reports.

    python examples/paper/tables.py              the results that come with this repository
    python examples/paper/tables.py studies      your own: studies/table1_cifar10/resnet56/results.csv and so on

The paper has one run for each figure, so its differences have no interval. Ours are paired by seed.
"""

import csv
import sys
from pathlib import Path

from lightning_znorm.compare.statistics import Row, compare_methods, judge

HERE = Path(__file__).parent
# Our metrics, with the column of the paper's tables, and whether more or less is better.
METRICS = {
    "test/accuracy": ("test_accuracy", "max"),
    "test/dice": ("test_f1", "max"),
    "test/tversky": ("test_tversky", "max"),
    "test/hausdorff": ("test_hausdorff", "min"),
    "train/loss": ("train_loss", "min"),
}
# The names of our config files, with the rows of the paper's tables.
MODELS = {
    "resnet56": "ResNet-56",
    "resnet101": "ResNet-101",
    "resnet152": "ResNet-152",
    "densenet121": "DenseNet-121",
    "densenet169": "DenseNet-169",
    "mobilenetv2": "MobileNetV2",
    "vgg16": "VGG-16",
    "xception": "Xception",
    "resnet50-unet": "ResNet50-Unet",
    "unetpp": "U-net++",
    "attention-unet": "Attention U-Net",
}
# Studies that are reduced versions of a row of the paper: table, row, and how the study is reduced.
REDUCED = {
    "cifar10-10k": (
        "table1_cifar10",
        "ResNet-56",
        "ResNet-20, 9,000 training images and 6 epochs in place of ResNet-56, 50,000 and 100",
    )
}

Reported = dict[tuple[str, str], dict[str, float]]
"""Figures by model and method."""


def read_reported(table: str) -> Reported:
    """Read one of the paper's tables."""
    lines = (HERE / "reported" / f"{table}.csv").read_text(encoding="utf-8").splitlines()
    rows = csv.DictReader(line for line in lines if not line.startswith("#"))
    return {(row.pop("model"), row.pop("method")): {key: float(value) for key, value in row.items()} for row in rows}


def read_measured(path: Path, metric: str) -> dict[str, dict[int, float]]:
    """Read the values of a metric in the last epoch from a study's results.csv, by method and seed."""
    last: dict[str, dict[int, tuple[int, float]]] = {}
    with path.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            if row["metric"] == metric:
                value = (int(row["epoch"]), float(row["value"]))
                by_seed = last.setdefault(row["method"], {})
                by_seed[int(row["seed"])] = max(by_seed.get(int(row["seed"]), value), value)
    methods = sorted(last, key=lambda method: method != "baseline")
    return {method: {seed: value for seed, (_, value) in last[method].items()} for method in methods}


def show(title: str, results: Path, reported: Reported, model: str) -> None:
    """Print a table for each metric of a study; the first one decides, and has words."""
    print(f"\n{title}")
    decides = True
    for metric, (column, mode) in METRICS.items():
        measured = read_measured(results, metric)
        if not measured or column not in next(iter(reported.values())):
            continue
        print(f"\n  {metric:<16} {'reported':>9} {'difference':>11}   {'ours':>17} {'difference':>11}   95 % interval")
        rows = list(compare_methods(metric, measured))
        for row in judge(rows, mode) if decides else rows:
            theirs = _theirs(reported, model, row.method, column)
            print(f"  {row.method:<16} {theirs}   {_ours(row)}   {row.verdict}".rstrip())
        decides = False


def _theirs(reported: Reported, model: str, method: str, column: str) -> str:
    own, first = reported.get((model, method), {}), reported.get((model, "baseline"), {})
    if column not in own:
        return f"{'-':>9} {'-':>11}"
    difference = "" if method == "baseline" else f"{own[column] - first[column]:+.4f}"
    return f"{own[column]:>9.4f} {difference:>11}"


def _ours(row: Row) -> str:
    spread = "" if row.spread is None else f" +- {row.spread:.4f}"
    difference = "" if row.difference is None else f"{row.difference:+.4f}"
    interval = "" if row.interval is None else f"{row.interval[0]:+.4f} to {row.interval[1]:+.4f}"
    return f"{f'{row.mean:.4f}{spread}':>17} {difference:>11}   {interval:<18}"


def main(folder: Path) -> None:
    """Print all studies in a folder."""
    for results in sorted(folder.rglob("results.csv")):
        study, table = results.parent.name, results.parent.parent.name
        if study in REDUCED:
            table, model, how = REDUCED[study]
            show(f"{model}, reduced: {how}. Levels are not comparable.", results, read_reported(table), model)
        elif study in MODELS:
            show(f"{table}, {MODELS[study]}", results, read_reported(table), MODELS[study])


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "results")
