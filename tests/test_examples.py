"""Every program in examples/ does what it says, and leaves no file behind."""

import copy
import math
import re
import runpy
import warnings
from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_znorm import MaskWriter, ScoreWriter
from lightning_znorm.tasks import SegmentationTask
from tests.fsdp import needs_fsdp2_on_cpu
from tests.gradients.reference import zscore
from tests.processes import run_python
from tests.trainers import trainer

EXAMPLES = Path(__file__).parents[1] / "examples"


def output_of(name: str, folder: Path, *python: str, arguments: Sequence[str | Path] = ()) -> str:
    finished = run_python(*python, EXAMPLES / name, *arguments, cwd=folder, timeout=120)
    assert finished.returncode == 0, finished.stdout
    assert list(folder.iterdir()) == []
    return finished.stdout


def numbers(pattern: str, output: str) -> list[float]:
    """Return the numbers that the groups of the pattern capture."""
    match = re.search(pattern, output)
    assert match, output
    return [float(group) for group in match.groups()]


def test_every_example_is_run_here() -> None:
    tests = Path(__file__).read_text(encoding="utf-8")
    assert [
        path.name for path in EXAMPLES.iterdir() if f'output_of("{path.name}"' not in tests and path.is_file()
    ] == []


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_every_example_finds_what_it_imports(name: str) -> None:
    """Import each example without training; tests of the full tier train."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # warnings of other packages about each other
        if name == "huggingface.py":
            pytest.importorskip("transformers", reason="needs transformers: pip install '.[test]'")
        assert "main" in runpy.run_path(str(EXAMPLES / name))


@pytest.mark.full
def test_own_lightning_module(tmp_path: Path) -> None:
    output = output_of("own_lightning_module.py", tmp_path)
    assert numbers(r"test accuracy\W+([\d.]+)", output)[0] > 0.93


# Lightning cannot be imported there, and is not needed.
WITHOUT_LIGHTNING = """
import runpy, sys
sys.modules.update(dict.fromkeys(["lightning", "pytorch_lightning", "lightning_fabric", "lightning_utilities"]))
runpy.run_path(sys.argv[1], run_name="__main__")
"""


@pytest.mark.full
def test_plain_pytorch(tmp_path: Path) -> None:
    output = output_of("plain_pytorch.py", tmp_path, "-c", WITHOUT_LIGHTNING)
    for way in ("call_before_each_step", "attach_to_the_optimizer", "attach_under_mixed_precision"):
        assert numbers(rf"{way}: test accuracy ([\d.]+)", output)[0] > 0.93


def test_plain_pytorch_ways_are_the_same_method() -> None:
    example = runpy.run_path(str(EXAMPLES / "plain_pytorch.py"))
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(128, 64, generator=generator), torch.randint(10, (128,), generator=generator)

    def plain(model: nn.Module, images: Tensor, labels: Tensor) -> None:
        optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
        for batch, targets in example["batches"](images, labels):
            optimizer.zero_grad()
            F.cross_entropy(model(batch), targets).backward()
            optimizer.step()

    def trained(train) -> Tensor:
        torch.manual_seed(0)
        model = nn.Linear(64, 10)
        train(model, images, labels)
        return model.weight.detach()

    called, attached, mixed = (
        trained(example[name])
        for name in ("call_before_each_step", "attach_to_the_optimizer", "attach_under_mixed_precision")
    )
    assert torch.equal(called, attached)
    # Half precision costs three digits; without the method, the mean distance is far larger.
    assert (mixed - called).abs().mean() < 0.1 * (trained(plain) - called).abs().mean()


@pytest.mark.full
def test_sam(tmp_path: Path) -> None:
    output = output_of("sam.py", tmp_path)
    accuracy = numbers(r"in_a_plain_loop: test accuracy ([\d.]+)", output)
    assert numbers(r"in_a_trainer: test accuracy ([\d.]+)", output) == accuracy
    assert accuracy[0] > 0.9


@pytest.mark.parametrize("way", ["in_a_plain_loop", "in_a_trainer"])
@pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers")
def test_sam_climbs_by_the_true_gradient_and_descends_by_the_z_score(way: str) -> None:
    example = runpy.run_path(str(EXAMPLES / "sam.py"))
    generator = torch.Generator().manual_seed(0)
    batches = [[torch.randn(8, 5, generator=generator), torch.randint(3, (8,), generator=generator)] for _ in range(2)]
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3))
    expected = copy.deepcopy(model).double()

    def grads_of(images: Tensor, labels: Tensor) -> list[Tensor]:
        loss = F.cross_entropy(expected(images.double()), labels)
        return list(torch.autograd.grad(loss, list(expected.parameters())))

    def move(directions: list[Tensor], length: float) -> None:
        with torch.no_grad():
            for param, direction in zip(expected.parameters(), directions, strict=True):
                param.add_(direction, alpha=length)

    for batch in batches:
        climb = grads_of(*batch)
        length = example["RADIUS"] / math.sqrt(sum(float(grad.square().sum()) for grad in climb))
        move(climb, length)
        descent = [zscore(grad) for grad in grads_of(*batch)]
        move(climb, -length)
        move(descent, -example["LEARNING_RATE"])
    start = [param.detach().clone() for param in model.parameters()]
    example[way](model, DataLoader(batches, batch_size=None))
    for param, exact, before in zip(model.parameters(), expected.parameters(), start, strict=True):
        torch.testing.assert_close(param.double(), exact, rtol=0, atol=1e-6)
        assert (param - before).abs().max() > 1e-3


@pytest.mark.full
def test_gan(tmp_path: Path) -> None:
    output = output_of("gan.py", tmp_path)
    before = numbers(r"before training: .* ([\d.]+) from .* ([\d.]+) from", output)
    after = numbers(r"after training: .* ([\d.]+) from .* ([\d.]+) from", output)
    assert len(before) == len(after) == 2
    assert all(end < 0.75 * start for start, end in zip(before, after, strict=True))


@pytest.mark.full
def test_ddp(tmp_path: Path) -> None:
    output = output_of("ddp.py", tmp_path)
    first, second = re.findall(r"process (\d) of 2: sum of the weights (-?\d+\.\d{12})", output)
    assert {first[0], second[0]} == {"0", "1"}
    assert first[1] == second[1]
    assert numbers(r"validation accuracy ([\d.]+)", output)[0] > 0.9


@needs_fsdp2_on_cpu
@pytest.mark.full
def test_fsdp2(tmp_path: Path) -> None:
    output = output_of("fsdp2.py", tmp_path)
    processes = re.findall(r"process (\d) of 2: holds (\d+) weights, test accuracy ([\d.]+)", output)
    assert sorted(rank for rank, _, _ in processes) == ["0", "1"]
    assert sum(int(weights) for _, weights, _ in processes) == 64 * 128 + 128 + 128 * 10 + 10
    assert len({accuracy for _, _, accuracy in processes}) == 1
    assert float(processes[0][2]) > 0.93


@needs_fsdp2_on_cpu
@pytest.mark.full
def test_fabric(tmp_path: Path) -> None:
    output = output_of("fabric.py", tmp_path)
    accuracies = dict(re.findall(r"(DDP|FSDP2), process 0 of 2: test accuracy ([\d.]+)", output))
    assert dict(re.findall(r"(DDP|FSDP2), process 1 of 2: test accuracy ([\d.]+)", output)) == accuracies
    # The steps are the same, except for rounding.
    assert float(accuracies["DDP"]) == pytest.approx(float(accuracies["FSDP2"]), abs=0.01)
    assert float(accuracies["DDP"]) > 0.93


@pytest.mark.full
def test_huggingface(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        pytest.importorskip("transformers", reason="needs transformers: pip install '.[test]'")
    output = output_of("huggingface.py", tmp_path)
    assert numbers(r"test accuracy ([\d.]+)", output)[0] > 0.9


@pytest.mark.full
def test_custom_method(tmp_path: Path) -> None:
    output = output_of("custom_method.py", tmp_path)
    assert numbers(r"norms of the gradients: ([\d.]+) to ([\d.]+)", output) == pytest.approx([1, 1], abs=2e-6)
    assert numbers(r"validation accuracy ([\d.]+)", output)[0] > 0.9


def test_dice_conventions(tmp_path: Path) -> None:
    """Two patients of two slices; in three of them something is predicted or true."""
    lines = [
        "image,patient,slice,class,dice,predicted_pixels,true_pixels",
        "a1,anna,1,0,0.5,4,4",  # both have two pixels
        "a2,anna,2,0,0.0,2,0",
        "b1,ben,1,0,1.0,10,10",
        "b2,ben,2,0,,0,0",
    ]
    scores = tmp_path / "scores.csv"
    scores.write_text("\n".join(lines), encoding="utf-8")
    (tmp_path / "empty").mkdir()
    output = output_of("dice_conventions.py", tmp_path / "empty", arguments=[scores])
    found = [float(line.rsplit(maxsplit=1)[1]) for line in output.splitlines()]
    assert found == [0.5, 0.7, 0.8, 0.75, 0.625]


def test_dice_conventions_of_a_prediction(tmp_path: Path) -> None:
    """The file of `predict` says the same as that of `test`, although it has lines for the background."""
    logits = torch.randn(4, 3, 12, 10, generator=torch.Generator().manual_seed(2))
    masks = logits.roll(1, dims=3).argmax(1, keepdim=True)
    logits[0, 2], masks[0, masks[0] == 2] = -99, 0
    masks[1, :, :4] = 255
    task = SegmentationTask(
        torch.nn.Identity(), num_classes=3, activation="softmax", class_names=["core", "rim"], ignore_index=255
    )
    batch = (logits, masks, {"name": list("abcd"), "patient": ["anna", "anna", "ben", "ben"]})
    loader = DataLoader([batch], collate_fn=lambda items: items[0])
    run = trainer(callbacks=[ScoreWriter(), MaskWriter()], default_root_dir=tmp_path)
    run.test(task, loader, verbose=False)
    run.predict(task, loader, return_predictions=False)
    (tmp_path / "empty").mkdir()
    tested, predicted = (
        output_of("dice_conventions.py", tmp_path / "empty", arguments=[scores])
        for scores in (tmp_path / "scores.csv", tmp_path / "masks" / "scores.csv")
    )
    assert tested == predicted
    assert len(predicted.splitlines()) == 5
    assert "nan" not in predicted
