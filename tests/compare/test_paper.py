"""The studies of the paper's tables: their files, and how results are printed beside the paper's figures."""

import csv
import re
import runpy
import shutil
import subprocess
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import yaml

from lightning_znorm.cli.config_files import shipped_configs
from lightning_znorm.compare.statistics import compare_methods
from lightning_znorm.data import CIFAR10DataModule

PAPER = Path(__file__).parents[2] / "examples" / "paper"
TABLES = runpy.run_path(str(PAPER / "tables.py"))


@pytest.mark.parametrize(
    ("table", "model", "method", "column", "value"),
    [  # the abstract's figures, and a corner of each table
        ("table1_cifar10", "ResNet-56", "baseline", "test_accuracy", 0.802),
        ("table1_cifar10", "ResNet-56", "znorm", "test_accuracy", 0.812),
        ("table1_cifar10", "VGG-16", "znorm", "test_accuracy", 0.835),
        ("table1_cifar10", "Xception", "znorm", "train_loss", 0.0562),
        ("table2_pcam", "ResNet-56", "znorm", "test_accuracy", 0.915),
        ("table3_lgg", "ResNet50-Unet", "baseline", "test_hausdorff", 2.767),
        ("table3_lgg", "Attention U-Net", "znorm", "test_f1", 0.894),
    ],
)
def test_reported(table, model, method, column, value):
    assert TABLES["read_reported"](table)[model, method][column] == value


@pytest.mark.parametrize(("table", "models"), [("table1_cifar10", 8), ("table2_pcam", 3), ("table3_lgg", 3)])
def test_reported_tables_are_whole(table, models):
    reported = TABLES["read_reported"](table)
    assert len(reported) == 6 * models
    assert set(Counter(model for model, _ in reported).values()) == {6}
    assert {model for model, _ in reported} <= set(TABLES["MODELS"].values())
    assert "arXiv 2408.01215" in (PAPER / "reported" / f"{table}.csv").read_text().splitlines()[0]


def studies() -> list[Path]:
    return sorted(PAPER.glob("*.sh"))


@pytest.mark.parametrize("script", studies(), ids=lambda path: path.name)
def test_scripts_name_files_that_exist(script, tmp_path):
    """Run each script with a stand-in for Python, which writes down what it is given."""
    stand_in = tmp_path / "python"
    stand_in.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/commands\n')
    stand_in.chmod(0o755)
    if shutil.which("sh") is None:
        pytest.skip("needs a shell of the name sh")
    command = ["sh", str(script), "--jobs", "6"]
    done = subprocess.run(command, env={"PATH": f"{tmp_path}:/usr/bin:/bin"}, cwd=tmp_path, check=False, timeout=60)
    assert done.returncode == 0
    commands = (tmp_path / "commands").read_text().splitlines()
    known = {*shipped_configs(), *(f"examples/paper/{path.name}" for path in PAPER.glob("*.yaml"))}
    for line in commands:
        files = re.findall(r"\S+\.yaml", line)
        assert set(files) <= known
        assert files[1].endswith("baseline.yaml")  # with which the others are compared
        assert line.startswith("-m lightning_znorm compare --config ")
        assert line.endswith(" --jobs 6")
    if script.name.startswith("table"):
        folder = script.stem.partition("_")[2]
        models = {name.split("/")[2].removesuffix(".yaml") for name in known if name.startswith(f"configs/{folder}/")}
        assert {re.search(rf"configs/{folder}/(\S+)\.yaml", line)[1] for line in commands} == models
        assert models <= set(TABLES["MODELS"])


def test_a_failed_study_does_not_end_the_script(tmp_path):
    stand_in = tmp_path / "python"
    stand_in.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/commands\nexit 1\n')
    stand_in.chmod(0o755)
    command = ["sh", str(PAPER / "table1_cifar10.sh")]
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin", "MODELS": "vgg16 resnet56"}
    assert subprocess.run(command, env=environment, cwd=tmp_path, check=False, timeout=60).returncode == 1
    assert len((tmp_path / "commands").read_text().splitlines()) == 2


def write_results(path: Path, values: dict[tuple[str, int], float], metric: str) -> None:
    path.parent.mkdir(parents=True)
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["run", "seed", "method", "epoch", "metric", "value"])
        for (method, seed), value in values.items():
            writer.writerow([f"{method}-{seed}", seed, method, 3, metric, 0.1])
            writer.writerow([f"{method}-{seed}", seed, method, 7, metric, value])


def test_ours_beside_theirs(tmp_path, capsys):
    values = {("znorm", seed): 0.81 + 0.01 * seed for seed in range(3)}
    values |= {("baseline", seed): 0.80 + 0.001 * seed for seed in range(3)}
    write_results(tmp_path / "table1_cifar10" / "resnet56" / "results.csv", values, "test/accuracy")
    write_results(tmp_path / "cifar10-10k" / "results.csv", values, "test/accuracy")
    TABLES["main"](tmp_path)
    out = capsys.readouterr().out
    assert "table1_cifar10, ResNet-56" in out
    assert "ResNet-56, reduced: ResNet-20, 9,000 training images and 6 epochs in place of" in out
    lines = [line.split() for line in out.splitlines() if line.strip().startswith("znorm")]
    # Reported 0.812 and 0.010 more than the baseline; ours 0.82 and 0.019, of 0.01, 0.019 and 0.028.
    assert lines[0][:6] == ["znorm", "0.8120", "+0.0100", "0.8200", "+-", "0.0100"]
    assert lines[0][6] == "+0.0190"
    assert (float(lines[0][7]), float(lines[0][9])) == pytest.approx((0.019 - 0.02236, 0.019 + 0.02236), abs=1e-4)
    assert lines[0] == lines[1]


def test_results_that_come_with_the_repository(capsys):
    found = list((PAPER / "results").rglob("results.csv"))
    assert found
    TABLES["main"](PAPER / "results")
    assert capsys.readouterr().out.count("test/accuracy") >= len(found)
    for results in found:
        report = (results.parent / "report.md").read_text(encoding="utf-8")
        assert "Failed runs" not in report
        for image in re.findall(r"!\[.*\]\((.*)\)", report):
            assert (results.parent / image).is_file()


@pytest.mark.parametrize("text", ["examples/paper/results/README.md", "README.md"])
def test_what_is_said_of_a_study_is_in_its_report(text):
    """Each figure, that is; and in the report each is one of results.csv."""
    root = PAPER.parents[1]
    said = (root / text).read_text(encoding="utf-8")
    if text == "README.md":
        said = said.partition("Measured so far:")[2].partition("\n\n")[0]
    numbers = {number.lstrip("+-") for number in re.findall(r"[-+]?\d\.\d{3}", said)}
    assert len(numbers) >= 3
    report = (PAPER / "results" / "cifar10-10k" / "report.md").read_text(encoding="utf-8")
    assert all(number in report for number in numbers - {"0.010"})  # the paper's own
    results = PAPER / "results" / "cifar10-10k" / "results.csv"
    for metric in ("test/accuracy", "train/loss"):
        for row in compare_methods(metric, TABLES["read_measured"](results, metric)):
            shown = f"| {row.method} | 3 | {row.mean:.3f} | {row.spread:.3f} | "
            if row.interval:
                shown += f"{row.difference:+.3f} | {row.interval[0]:+.3f} to {row.interval[1]:+.3f} |"
            assert shown in report


def test_which_checkpoints_were_tested():
    """Of the study that was run when `compare` tested last checkpoints and called them best."""
    folder = PAPER / "results" / "cifar10-10k"
    with (folder / "results.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["epoch"] for row in rows if row["metric"].startswith("test/")} == {"5"}
    for name in ("report.md", "report.html"):
        text = (folder / name).read_text(encoding="utf-8")
        assert "at the best" not in text
        assert "best.ckpt" not in text
        assert text.count("at the last checkpoint") == 2
        assert "last checkpoint (epoch 6 of 6)" in text
    accuracies = {}
    for row in rows:
        if row["metric"] == "val/accuracy":
            accuracies.setdefault(row["run"], {})[int(row["epoch"]) + 1] = float(row["value"])
    best = {run: max(curve, key=curve.get) for run, curve in accuracies.items()}
    assert {run: epoch for run, epoch in best.items() if epoch != 6} == {
        "baseline-0": 4,
        "baseline-1": 4,
        "znorm-0": 4,
        "znorm-2": 3,
    }
    said = " ".join((PAPER / "results" / "README.md").read_text(encoding="utf-8").split())
    assert "**Its tests are of the last checkpoints**" in said
    assert (
        "the fourth for the baseline with seeds 0 and 1 and for ZNorm with seed 0, the third for ZNorm with seed 2, "
        "and the last one for the other five runs" in said
    )


def test_subset(monkeypatch):
    images = np.arange(50_000, dtype=np.uint32).view(np.uint8).reshape(50_000, 4, 1, 1)
    labels = np.arange(50_000) % 10
    monkeypatch.setattr(CIFAR10DataModule, "load", lambda self, train: (images, labels))
    subset = runpy.run_path(str(PAPER / "subset.py"))["CIFAR10Subset"](root="data")
    parts = [subset.load(train=True) for _ in range(2)]
    assert len(parts[0][1]) == 10_000
    assert set(Counter(parts[0][1].tolist()).values()) == {1000}
    assert np.array_equal(parts[0][0], parts[1][0])
    assert len(np.unique(parts[0][0].reshape(10_000, 4), axis=0)) == 10_000
    assert len(subset.load(train=False)[1]) == 50_000  # all that there are


def test_reduced_experiment_is_labelled():
    config = yaml.safe_load((PAPER / "cifar10-10k.yaml").read_text())
    how = TABLES["REDUCED"]["cifar10-10k"][2]
    assert f"{config['trainer']['max_epochs']} epochs" in how
    assert config["model"]["init_args"]["model"] == "resnet20"
    assert "ResNet-20" in how
