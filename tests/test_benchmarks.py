"""Every benchmark runs, and prints a table whose figures agree with each other."""

import re
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torchmetrics.segmentation

from tests.processes import run_python

# tests/test_readme.py also finds the benchmarks that the README names.
pytestmark = pytest.mark.full


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
    assert [row[1] for row in table[:6]] == [
        "clip_grad_norm_",
        "zscore_grads_",
        "zscore_grads_, adaptive",
        "centralize_grads_",
        "obvious loop",
        "timm adaptive_clip_grad",
    ]
    clip = float(table[0][2])
    for model, _, milliseconds, ratio in table:
        assert model == "ResNet-56"
        assert float(ratio) == pytest.approx(float(milliseconds) / clip, rel=0.05, abs=0.02)


def test_training_step() -> None:
    arguments = ("--device", "cpu", "--eager", "--batch-size", "1", "--rounds", "1")
    table = rows(output_of("benchmarks.training_step", *arguments))
    assert [row[:2] for row in table] == [["32-true", "eager"], ["bf16-mixed", "eager"]]
    for without, with_znorm, added, alone, share in ([float(cell) for cell in row[2:]] for row in table):
        assert added == pytest.approx(100 * (with_znorm / without - 1), abs=0.02)
        assert share == pytest.approx(100 * alone / without, abs=0.02)


def test_lightning_step() -> None:
    arguments = ("--batch-size", "2", "--steps", "4", "--rounds", "1", "--threads", "1", "--profile")
    output = output_of("benchmarks.lightning_step", *arguments)
    table = [row for row in rows(output) if len(row) == 7]
    calls = {row[0]: float(row[1]) for row in rows(output) if len(row) == 3 and row[1][-1].isdigit()}
    assert calls["[Callback]ZNormCallback.on_before_optimizer_step"] > 0
    assert max(calls, key=lambda name: calls[name]) == "run_training_batch"
    assert [row[2] for row in table] == [
        "loop by hand",
        "Trainer without our parts",
        "Trainer with our task and data",
        "and with ZNormCallback",
    ]
    plain = table[1]
    for row in table:
        for milliseconds, ratio in ((3, 4), (5, 6)):
            expected = pytest.approx(float(row[milliseconds]) / float(plain[milliseconds]), rel=0.01)
            assert float(row[ratio].split()[0]) == expected


def test_fit() -> None:
    arguments = ("--batch-size", "2", "--steps", "4", "--rounds", "1", "--precisions", "32-true", "--modes", "eager")
    output = output_of("benchmarks.fit", *arguments)
    assert "bf16-mixed is left out" in output
    table = rows(output)
    assert [row[2:4] for row in table] == [
        [f"32-true, {memory_format}, eager", step]
        for memory_format in ("contiguous", "channels_last")
        for step in ("loop by hand", "fit", "fit with ZNormCallback")
    ]
    for number, (_, batch, _, _, milliseconds, ratio, _, images) in enumerate(table):
        by_hand = float(table[number - number % 3][4])
        assert float(ratio.split()[0]) == pytest.approx(float(milliseconds) / by_hand, rel=0.01)
        assert float(images) == pytest.approx(1e3 * int(batch) / float(milliseconds), rel=0.01)


@pytest.mark.gpu
def test_kernels_on_a_gpu() -> None:
    table = rows(output_of("benchmarks.kernels", "--device", "cuda", "--models", "ResNet-56", "--rounds", "3"))
    names = [row[2] for row in table]
    assert names[:2] == ["clip_grad_norm_", "zscore_grads_"]
    assert names[-1] == "centralize_grads_, in a graph"
    for _, _, _, milliseconds, _, of_floor, _, memory in table:
        assert float(of_floor) / float(table[0][5]) == pytest.approx(float(milliseconds) / float(table[0][3]), rel=0.1)
        assert float(memory) >= 0


def test_learning_rates() -> None:
    table = rows(
        output_of("benchmarks.learning_rates", "--epochs", "1", "--seeds", "0", "--rates", "1e-3", "--threads", "1")
    )
    assert [row[:2] for row in table] == [["Adam", "1e-03"], ["SGD, momentum 0.9", "1e-03"]]
    assert all(0 <= float(accuracy) <= 1 for row in table for accuracy in row[2:])


@pytest.mark.skipif(
    not hasattr(torchmetrics.segmentation, "HausdorffDistance"),
    reason="needs a newer torchmetrics: this has no Hausdorff distance",
)
def test_metrics() -> None:
    table = rows(output_of("benchmarks.metrics", "--images", "2", "--size", "32", "--rounds", "1", "--threads", "1"))
    values = {(masks, score): float(value) for masks, score, _, value in table}
    assert len(values) == len(table) == 19
    for masks in ("blobs", "noise"):
        ours = values[masks, "Hausdorff, lightning_znorm"]
        assert ours == values[masks, "Hausdorff, SciPy directed_hausdorff"] > 0
        assert values[masks, "HD95, lightning_znorm"] == pytest.approx(values[masks, "HD95, MONAI"], abs=2e-4)
        for others in ("MONAI", "torchmetrics"):
            assert values[masks, "Dice, lightning_znorm"] == pytest.approx(values[masks, f"Dice, {others}"], abs=2e-4)
    assert all(float(milliseconds) > 0 for _, _, milliseconds, _ in table)


@pytest.fixture
def averages() -> None:
    """Skip if gloo cannot average, which DTensor's own mean needs."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        dist.all_reduce(torch.ones(1), dist.ReduceOp.AVG)
    except RuntimeError as error:
        pytest.skip(f"needs a newer torch: the loop to compare with does not run ({error})")
    finally:
        dist.destroy_process_group()


@pytest.mark.usefixtures("averages")
def test_collectives(tmp_path: Path) -> None:
    arguments = ("--parameters", "3", "30", "--rounds", "2", "--processes", "2", "--plot", str(tmp_path / "curve.svg"))
    table = rows(output_of("benchmarks.collectives", *arguments))
    drawn = re.findall(r"<!-- (.*) -->", (tmp_path / "curve.svg").read_text())
    assert {"zscore_grads_", "DTensor by DTensor", "collectives", "milliseconds"} <= set(drawn)
    assert [row[:2] for row in table] == [
        [count, name]
        for count in ("3", "30")
        for name in ("zscore_grads_", "centralize_grads_", "DTensor by DTensor", "gathered one by one")
    ]
    # Our collectives do not grow with the number of parameters. Centralization works on rows, and these are whole.
    collectives = {(count, name): int(calls) for count, name, calls, _, _ in table}
    for count in (3, 30):
        assert collectives[str(count), "zscore_grads_"] == 2
        assert collectives[str(count), "centralize_grads_"] == 0
        assert collectives[str(count), "DTensor by DTensor"] >= count
        assert collectives[str(count), "gathered one by one"] == count
    for count in (3, 30):
        own = [row for row in table if row[0] == str(count)]
        for row in own:
            assert float(row[4]) == pytest.approx(float(row[3]) / float(own[0][3]), rel=0.05, abs=0.06)


def test_soak() -> None:
    output = output_of("benchmarks.soak", "--steps", "100", "--tensors", "30")
    table = rows(output)
    assert sorted(row[0] for row in table) == ["0", "1"]
    for _, steps, early, late, change, files in table:
        assert steps == "100"
        assert float(change) == pytest.approx(100 * (float(late) / float(early) - 1), abs=0.03)
        assert float(change) < 1
        assert len(set(files.split(", "))) == 1
    assert "Left behind: 0 files, 0 processes" in output


def test_large_gradient() -> None:
    arguments = ("--elements", "100001", "--dtypes", "bfloat16", "float16", "float32")
    errors = {row[1]: float(row[-1]) for row in rows(output_of("benchmarks.large_gradient", *arguments))}
    # Half a unit in the last place; in float32 also the errors of the subtraction and of the mean.
    assert errors["bfloat16"] <= 2**-8
    assert errors["float16"] <= 2**-11
    assert 0 < errors["float32"] < 1e-5


def test_activations() -> None:
    arguments = ("--networks", "unetpp", "attention_unet", "--threads", "1", "--size")
    small, large = (rows(output_of("benchmarks.activations", *arguments, size)) for size in ("32", "64"))
    assert [row[:2] for row in small] == [
        [network, precision] for network in ("unetpp", "attention_unet") for precision in ("32-true", "bf16-mixed")
    ]
    for (*_, image, once, weights, batch), (*_, of_large, once_of_large, _, _) in zip(small, large, strict=True):
        assert float(of_large) == pytest.approx(4 * float(image), rel=0.02)
        assert once_of_large == once
        assert float(batch) == pytest.approx((128 * float(image) + float(once) + float(weights)) / 1024, abs=0.1)
    full, half = float(small[0][2]), float(small[1][2])
    assert 0.4 * full < half < 0.7 * full


def test_scores() -> None:
    table = rows(output_of("benchmarks.scores", "--images", "2", "--batch-size", "2", "--size", "32", "--rounds", "1"))
    assert [row[:2] for row in table] == [
        [masks, scores] for masks in ("blobs", "noise") for scores in ("Dice alone", "all, and scores.csv")
    ]
    for (*_, alone, one), (*_, everything, ratio) in zip(table[::2], table[1::2], strict=True):
        assert float(one) == 1
        assert float(ratio) == pytest.approx(float(everything) / float(alone), rel=0.05)


def test_startup(tmp_path: Path) -> None:
    help_row, fit_row = rows(output_of("benchmarks.startup", "--rounds", "1", "--rows", "fit-help", "fit"))
    assert float(help_row[-1]) < 100 < float(fit_row[-1])  # MB
    (compared,) = rows(output_of("benchmarks.startup", "--rounds", "1", "--rows", "fit-help", "--against", "."))
    assert len([float(cell) for cell in compared[1:]]) == 6


def test_nonfinite() -> None:
    table = rows(output_of("benchmarks.nonfinite", "--rounds", "1", "--numel", "1024"))
    assert [row[0] for row in table[:2]] == ["zscore_grads_", "zscore_grads_, error_if_nonfinite"]
    assert float(table[0][2]) == 1.0


def test_sgd_steps() -> None:
    table = rows(
        output_of("benchmarks.sgd_steps", "--epochs", "1", "--seeds", "0", "--sizes", "0.1", "3", "--networks", "MLP",
                  "--threads", "1")
    )  # fmt: skip
    expected = [
        [method, momentum, size] for method in ("ZNorm", "SING") for momentum in ("0", "0.9") for size in ("0.1", "3")
    ]
    assert [row[1:4] for row in table] == expected
    for number in range(0, len(table), 2):
        (_, *small), (_, *large) = table[number : number + 2]
        assert float(large[3]) == pytest.approx(30 * float(small[3]), rel=0.1)
        assert 0 <= float(large[4]) < float(small[4]) <= 1
