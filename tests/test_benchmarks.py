"""Every benchmark runs, and prints a table whose figures agree with one another."""

import re
from pathlib import Path

import pytest

from tests.processes import run_python


def output_of(*arguments: str) -> str:
    process = run_python("-m", *arguments, timeout=120, cwd=Path(__file__).parents[1])
    assert process.returncode == 0, process.stdout
    return process.stdout


def rows(output: str) -> list[list[str]]:
    lines = re.findall(r"^\| (.*) \|$", output, flags=re.MULTILINE)[2:]
    return [[cell.strip() for cell in line.split(" | ")] for line in lines]


def test_data() -> None:
    output = output_of("benchmarks.data", "--images", "600", "--rounds", "1")
    table = rows(output)
    assert [name for name, _ in table] == [
        "lightning_znorm, uint8",
        "lightning_znorm, normalized",
        "torchvision, normalized, 0 workers",
        "torchvision, normalized, 2 workers",
    ]
    _, ours, *theirs = (int(figure) for _, figure in table)
    (ratio,) = re.findall(r"normalized: ([\d.]+) times torchvision's faster row", output)
    assert float(ratio) == pytest.approx(ours / max(theirs), rel=0.02, abs=0.06)


def test_kernels() -> None:
    table = rows(output_of("benchmarks.kernels", "--models", "ResNet-56", "--rounds", "3", "--threads", "1"))
    assert [row[1] for row in table[:4]] == ["clip_grad_norm_", "zscore_grads_", "centralize_grads_", "obvious loop"]
    clip = float(table[0][2])
    for model, _, milliseconds, ratio in table:
        assert model == "ResNet-56"
        assert float(ratio) == pytest.approx(float(milliseconds) / clip, rel=0.05, abs=0.02)


def test_learning_rates() -> None:
    table = rows(
        output_of("benchmarks.learning_rates", "--epochs", "1", "--seeds", "0", "--rates", "1e-3", "--threads", "1")
    )
    assert [row[:2] for row in table] == [["Adam", "1e-03"], ["SGD, momentum 0.9", "1e-03"]]
    assert all(0 <= float(accuracy) <= 1 for row in table for accuracy in row[2:])
