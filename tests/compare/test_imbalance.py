"""The study of a rare class and one sigmoid output: its data, networks, candidate, measurements, files and tables."""

import csv
import re
import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from examples.imbalance import report
from examples.imbalance.candidates import AdaptiveRows
from examples.imbalance.data import RareDigits, SmallLGG
from examples.imbalance.measure import Measure
from examples.imbalance.network import BatchNormUNet
from lightning_znorm.cli import main
from lightning_znorm.cli.config_files import shipped_configs
from lightning_znorm.data import DigitsDataModule
from lightning_znorm.functional import transform_grads_
from lightning_znorm.tasks import SegmentationTask
from tests.gradients.reference import wide
from tests.medical import write_lgg
from tests.trainers import trainer

ROOT = Path(__file__).parents[2]
IMBALANCE = ROOT / "examples" / "imbalance"
EXPERIMENTS = sorted(IMBALANCE.glob("*.yaml"))


class TestData:
    def test_slices_are_means_of_what_their_pixels_cover(self, tmp_path: Path) -> None:
        written = write_lgg(tmp_path, size=192)
        data = SmallLGG(root=tmp_path, val_fraction=0.2, test_fraction=0.2)
        data.setup("fit")
        data.setup("test")
        for part in (data.train_set, data.val_set, data.test_set):
            for number, row in enumerate(part.rows):
                pixels, mask = written[data.test_set.cases["name"][row]]
                image, small_mask = part[number]
                means = pixels.reshape(96, 2, 96, 2, 3).mean(axis=(1, 3)).transpose(2, 0, 1)
                assert np.abs(image.numpy() - means).max() <= 1  # of rounding
                shares = (mask / 255).reshape(96, 2, 96, 2).mean(axis=(1, 3))
                assert np.array_equal(small_mask[0].numpy(), shares >= 0.5)

    def test_one_digit_is_rare_in_each_set_and_the_others_stay(self) -> None:
        data, all_digits = RareDigits(), DigitsDataModule()
        for train, count in ((True, 1437), (False, 360)):
            images, labels = data.load(train)
            assert labels.mean() == pytest.approx(0.02, abs=0.002)
            everything, digits = all_digits.load(train)
            assert len(digits) == count
            assert np.array_equal(images[labels == 0], everything[digits != 8])
            rare = everything[digits == 8]
            assert np.array_equal(images[labels == 1], rare[: int(labels.sum())])


@pytest.mark.parametrize("size", [16, 96])
def test_network_keeps_the_size(size: int) -> None:
    network = BatchNormUNet()
    assert network(torch.zeros(2, 3, size, size)).shape == (2, 1, size, size)
    assert network.output.bias.shape == (1,)


@pytest.mark.parametrize("ratio", [0.0, 1.0, 100.0])
def test_candidate_matches_its_definition(ratio: float) -> None:
    generator = torch.Generator().manual_seed(0)
    grad = torch.randn(4, 3, 3, 3, generator=generator, dtype=torch.float64)
    grad += ratio * torch.tensor([1.0, -1.0, 0.0, 0.1], dtype=torch.float64).view(4, 1, 1, 1)
    weight = nn.Parameter(torch.zeros_like(grad))
    weight.grad = grad.clone()
    transform_grads_(weight, AdaptiveRows())
    means = grad.mean(dim=(1, 2, 3), keepdim=True)
    variance = (grad - means).square().mean()
    r = variance / (variance + means.square())
    expected = (grad - r * means) / (variance + (1 - r).square() * means.square()).sqrt()
    torch.testing.assert_close(wide(weight.grad), expected, rtol=0, atol=1e-9)
    assert float((weight.grad * grad).sum()) > 0


def test_candidate_divides_a_vector_by_its_root_mean_square() -> None:
    bias = nn.Parameter(torch.zeros(2))
    bias.grad = torch.tensor([3.0, 4.0])
    transform_grads_(bias, AdaptiveRows())
    torch.testing.assert_close(bias.grad, torch.tensor([3.0, 4.0]) / 12.5**0.5)


class Constant(nn.Module):
    """Marks all pixels brighter than 1, by logits of +-3."""

    def __init__(self) -> None:
        super().__init__()
        self.output = nn.Conv2d(3, 1, 1)

    def forward(self, images: Tensor) -> Tensor:
        return torch.where(images[:, :1] > 1, 3.0, -3.0) + 0 * self.output(images)


class Slices(LightningDataModule):
    """Four slices of 2x2 pixels of the patients a, b, a and c, of whom c has no tumour and no mark."""

    def __init__(self) -> None:
        super().__init__()
        marked = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]).view(4, 1, 2, 2)
        truth = torch.tensor([[1, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0]]).view(4, 1, 2, 2)
        self.samples = [
            ((2.0 * each).expand(3, 2, 2), mask.float(), {"patient": patient})
            for each, mask, patient in zip(marked, truth, "abac", strict=True)
        ]

    def train_dataloader(self) -> DataLoader:
        return DataLoader(self.samples, batch_size=2)

    val_dataloader = test_dataloader = train_dataloader


@pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:The number of training batches")
def test_measurements_by_hand() -> None:
    task = SegmentationTask(Constant(), optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.0))
    run = trainer(callbacks=[Measure(output="model.output")], num_sanity_val_steps=0)
    # The output weight's gradient is zero: give it one of which the mean holds a half.
    task.model.output.weight.register_hook(lambda grad: torch.tensor([0.0, 2.0, 1.0]).view_as(grad) + 1)
    data = Slices()
    run.fit(task, datamodule=data)
    # Of patient a, 1 of 2 marked pixels is right, and 3 are true; of b, none. c counts not at all.
    assert float(run.callback_metrics["val/dice_per_patient"]) == pytest.approx((2 * 1 / (2 + 3) + 0) / 2)
    sigmoid = 1 / (1 + np.exp(-3.0))
    assert float(run.callback_metrics["train/probability"]) == pytest.approx((3 * sigmoid + 13 * (1 - sigmoid)) / 16)
    assert float(run.callback_metrics["train/mean_share"]) == pytest.approx(4 / ((1 + 9 + 4) / 3))
    assert not task.model._forward_hooks
    run.test(task, datamodule=data, verbose=False)
    assert float(run.callback_metrics["test/dice_per_patient"]) == pytest.approx(0.2)


@pytest.mark.full
@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda path: path.stem)
def test_experiments_run_under_every_method(experiment: Path, monkeypatch, tmp_path: Path) -> None:
    monkeypatch.syspath_prepend(str(ROOT))
    monkeypatch.chdir(tmp_path)
    flags = [
        *("--trainer.accelerator", "cpu", "--trainer.max_epochs", "1", "--trainer.check_val_every_n_epoch", "1"),
        *("--trainer.limit_train_batches", "2", "--trainer.log_every_n_steps", "1"),
        *("--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "logs"),
        *("--trainer.enable_progress_bar", "false", "--trainer.enable_checkpointing", "false"),
        *("--model.init_args.prior", "auto"),
    ]
    if experiment.stem != "digits":
        write_lgg(tmp_path)
        flags += [
            "--data.init_args.root",
            ".",
            "--data.init_args.val_fraction",
            "0.2",
            "--data.init_args.batch_size",
            "4",
        ]
    own = [*(IMBALANCE / "methods").glob("*.yaml"), *(IMBALANCE / "methods" / experiment.stem).glob("*.yaml")]
    assert len(own) == 2
    for method in own:
        main(["fit", "--config", str(experiment), "--config", str(method), *flags])
    tables = []
    for path in sorted(Path("logs").rglob("metrics.csv")):
        with path.open(newline="") as file:
            tables.append({name: float(value) for row in csv.DictReader(file) for name, value in row.items() if value})
    assert len(tables) == 2
    for logged in tables:
        assert 0 <= logged["train/mean_share"] <= 1
        assert 0 < logged["train/probability"] < 1
        assert ("val/dice_per_patient" in logged) == (experiment.stem != "digits")


def test_script_names_files_that_exist(tmp_path: Path) -> None:
    """Run it with a stand-in for Python, which writes down what it is given."""
    if shutil.which("sh") is None:
        pytest.skip("needs a shell of the name sh")
    stand_in = tmp_path / "python"
    stand_in.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/commands\n')
    stand_in.chmod(0o755)
    environment = {"PATH": f"{tmp_path}:/usr/bin:/bin"}
    command = ["sh", str(IMBALANCE / "study.sh"), "--jobs", "2"]
    assert subprocess.run(command, env=environment, cwd=tmp_path, check=False, timeout=60).returncode == 0
    commands = (tmp_path / "commands").read_text().splitlines()
    assert len(commands) == 2 * len(EXPERIMENTS)
    known = {*(path.relative_to(ROOT).as_posix() for path in IMBALANCE.rglob("*.yaml")), *shipped_configs()}
    for line in commands:
        assert set(re.findall(r"\S+\.yaml", line)) <= known
        assert line.partition("--methods ")[2].split()[0] == "configs/methods/baseline.yaml"
        assert line.endswith(" --jobs 2")
    assert sum("prior auto" in line for line in commands) == len(EXPERIMENTS)


def test_report(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for study, factor in (("unet", 1.0), ("unet-prior", 0.5)):
        folder = tmp_path / "studies" / study
        folder.mkdir(parents=True)
        with (folder / "results.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["run", "seed", "method", "epoch", "metric", "value"])
            for method, loss, dice in (("baseline", 0.2, 0.5), ("znorm", 0.8, 0.4)):
                for seed in range(3):
                    run = [f"{method}-{seed}", seed, method]
                    for epoch in range(8):
                        writer.writerow([*run, epoch, "train/loss", factor * loss * (seed + 1)])
                        writer.writerow([*run, epoch, "train/probability", 0.01])
                        writer.writerow([*run, epoch, "train/mean_share", 0.99])
                    for epoch in (3, 7):
                        writer.writerow([*run, epoch, "val/dice_per_patient", dice])
                    writer.writerow(
                        [*run, 3, "test/dice_per_patient", factor * dice + 0.01 * seed]
                    )  # of the best epoch
    report.main(tmp_path / "studies", tmp_path / "results")
    printed = capsys.readouterr().out
    assert {path.name for path in (tmp_path / "results").iterdir()} == {
        "unet.csv",
        "unet-prior.csv",
        "loss.png",
        "dice_per_patient.png",
    }
    row, of_prior, _ = [line for line in printed.splitlines() if line.startswith("| znorm ")]
    cells, prior_cells = ([cell.strip() for cell in line.split("|")[1:-1]] for line in (row, of_prior))
    # 0.8 times the cube root of 6, four times the baseline's on each seed, and 0.1 less Dice.
    expected = "znorm|3|1.45|4 (4 to 4)|-|0.410|-0.100 (-0.100 to -0.100)|-|0.0100|0.99"
    assert cells == expected.split("|")
    assert prior_cells == ["znorm", "3", "0.5 (0.5 to 0.5)", "-0.200 (-0.200 to -0.200)"]


def test_tables_in_the_documentation_are_those_of_the_results(capsys: pytest.CaptureFixture[str]) -> None:
    report.main()
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith(("| ", "- "))]
    assert printed
    text = (ROOT / "docs" / "imbalance.md").read_text(encoding="utf-8")
    assert [line for line in printed if line not in text] == []
    for image in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (ROOT / "docs" / image).is_file()
