"""The study of stability near convergence: its candidates, what it measures, its files and what it prints."""

import csv
import re
import runpy
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch import Trainer
from torch import Tensor, nn

from examples.stability.candidates import Blend, Candidate, Floor, Geometric, Handover, RelativeEps
from examples.stability.measure import Measure
from examples.stability.network import Plain, Residual
from lightning_znorm.cli import main
from lightning_znorm.cli.config_files import shipped_configs
from lightning_znorm.tasks import ClassificationTask
from tests.cifar10 import put_in_place_of_cifar10

STABILITY = Path(__file__).parents[2] / "examples" / "stability"
EXPERIMENTS = sorted(STABILITY.glob("*-*.yaml"))
METHODS = sorted((STABILITY / "methods").glob("*.yaml"))
REPORT = runpy.run_path(str(STABILITY / "report.py"))

GRADIENTS = [torch.tensor([[4.0, -2.0, 1.0, 5.0]]).double() * scale for scale in (1.0, 3.0, 0.1)]


def steps(candidate: Candidate, lrs: tuple[float, float, float] = (1.0, 1.0, 1.0)) -> list[Tensor]:
    """What an optimizer is given in three steps."""
    parameter = nn.Parameter(torch.zeros(1, 4).double())
    single = nn.Parameter(torch.zeros(1).double())
    optimizer = torch.optim.SGD([parameter, single], lr=1.0)
    found = []
    for gradient, lr in zip(GRADIENTS, lrs, strict=True):
        optimizer.param_groups[0] |= {"lr": lr, "initial_lr": 1.0}
        parameter.grad, single.grad = gradient.clone(), torch.tensor([7.0]).double()
        candidate.on_before_optimizer_step(None, None, optimizer)
        assert single.grad.item() == 7.0  # a single element has no deviation
        found.append(parameter.grad)
    return found


# Of the first gradient: mean 2, deviation sqrt(7.5). The running means of three deviations that are 1, 3 and 0.1 times
# as large are 1, 2 and 4.1 / 3 times as large.
MEAN, SIGMA = 2.0, 7.5**0.5
Z = (GRADIENTS[0] - MEAN) / SIGMA
RUNNING = [1.0, 2.0, 4.1 / 3]


def test_floor_takes_the_larger_of_deviation_and_history():
    expected = [Z, Z, Z * 0.1 / RUNNING[2]]
    for found, own in zip(steps(Floor()), expected, strict=True):
        torch.testing.assert_close(found, own)


def test_geometric_goes_half_way_to_the_history():
    expected = [Z * (scale / running) ** 0.5 for scale, running in zip((1, 3, 0.1), RUNNING, strict=True)]
    for found, own in zip(steps(Geometric()), expected, strict=True):
        torch.testing.assert_close(found, own)


def test_relative_eps_bounds_the_amplification():
    expected = [Z * scale / (scale + 0.5 * running) for scale, running in zip((1, 3, 0.1), RUNNING, strict=True)]
    for found, own in zip(steps(RelativeEps(eps=0.5)), expected, strict=True):
        torch.testing.assert_close(found, own)


def test_blend_trusts_z_where_steps_agree():
    for found in steps(Blend(beta=0.5)):  # the z-scores are all the same: no noise
        torch.testing.assert_close(found, Z)
    parameter = nn.Parameter(torch.zeros(1, 4).double())
    optimizer = torch.optim.SGD([parameter], lr=1.0)
    blend = Blend(beta=0.5)
    for sign in (1, -1):
        parameter.grad = sign * GRADIENTS[0]
        blend.on_before_optimizer_step(None, None, optimizer)
    # The average is (0.25 Z - 0.5 Z) / 0.75: its square is a ninth of that of Z.
    torch.testing.assert_close(parameter.grad, -Z / 9 - 8 / 9 * GRADIENTS[0] / SIGMA)


def test_handover_follows_the_learning_rate():
    found = steps(Handover(), lrs=(1.0, 0.25, 0.0))
    torch.testing.assert_close(found[0], Z)
    torch.testing.assert_close(found[1], 0.25 * Z + 0.75 * GRADIENTS[1] / (RUNNING[1] * SIGMA))
    torch.testing.assert_close(found[2], GRADIENTS[2] / (RUNNING[2] * SIGMA))


@pytest.mark.parametrize("network", [Plain, Residual])
def test_networks(network):
    assert network()(torch.zeros(2, 3, 8, 8)).shape == (2, 10)


@pytest.fixture
def here(monkeypatch, tmp_path):
    """A folder to work in; the experiments' paths are those of the repository's root."""
    monkeypatch.syspath_prepend(str(STABILITY.parents[1]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def flags(root: Path) -> list[str]:
    return [
        *("--data.init_args.root", str(root), "--data.init_args.batch_size", "5", "--trainer.accelerator", "cpu"),
        *("--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2", "--trainer.limit_val_batches", "1"),
        *("--trainer.log_every_n_steps", "1", "--trainer.logger", "CSVLogger", "--trainer.logger.save_dir", "logs"),
        *("--trainer.enable_progress_bar", "false", "--trainer.enable_checkpointing", "false"),
    ]


@pytest.mark.full
@pytest.mark.parametrize("number", range(len(EXPERIMENTS)))
def test_experiments_and_methods_run(number, here, monkeypatch):
    experiment, method = EXPERIMENTS[number], METHODS[number % len(METHODS)]
    root = put_in_place_of_cifar10(here, monkeypatch, images_per_batch=200)  # of which 20 to train on
    main(["fit", "--config", str(experiment), "--config", str(method), *flags(root)])
    with next(Path("logs").rglob("metrics.csv")).open(newline="") as file:
        logged = {name: float(value) for row in csv.DictReader(file) for name, value in row.items() if value}
    layers = [name.removeprefix("sigma/") for name in logged if name.startswith("sigma/")]
    assert len(layers) == (9 if "plain" in experiment.name else 8)
    assert all(logged[f"sigma/{layer}"] > 0 and -1 <= logged[f"cosine/{layer}"] <= 1 for layer in layers)
    assert logged["full/loss"] > 0


def test_every_method_is_run():
    assert len(EXPERIMENTS) >= len(METHODS)


class Line(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(2, 2, bias=False)
        nn.init.zeros_(self.fc.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(x)


def test_measure_by_hand(monkeypatch):
    """Two batches of one sample: gradients of cross entropy at zero weights are (p - y) x."""
    samples = [(torch.tensor([[1.0, 2.0]]), torch.tensor([0])), (torch.tensor([[3.0, 0.0]]), torch.tensor([1]))]

    class TrainSet:
        def __len__(self):
            return 2

        def __getitems__(self, numbers):
            return samples[numbers[0]]

    class Data:
        batch_size = 1
        train_set = TrainSet()

        def on_after_batch_transfer(self, batch, _):
            return batch

    task = ClassificationTask(Line(), num_classes=2)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    trainer.datamodule = Data()
    found = {}
    monkeypatch.setattr(task, "log_dict", found.update)
    measure = Measure(epochs=[0])
    measure.on_train_epoch_start(trainer, task)
    gradients = torch.tensor([[-0.5, -1.0], [0.5, 1.0]]), torch.tensor([[1.5, 0.0], [-1.5, 0.0]])
    for gradient in gradients:
        task.model.fc.weight.grad = gradient
        measure.on_before_optimizer_step(trainer, task, None)
    measure.on_train_epoch_end(trainer, task)
    full = (gradients[0] + gradients[1]).flatten() / 2
    cosines = [torch.dot(g.flatten(), full) / g.norm() / full.norm() for g in gradients]
    assert found["cosine/fc.weight"].item() == pytest.approx(sum(cosines).item() / 2)
    assert found["sigma/fc.weight"].item() == pytest.approx((0.625**0.5 + 1.125**0.5) / 2)
    assert found["full/loss"].item() == pytest.approx(torch.tensor(2.0).log().item())
    assert set(found) == {"cosine/fc.weight", "sigma/fc.weight", "full/loss"}


@pytest.mark.parametrize("script", sorted(STABILITY.glob("*.sh")), ids=lambda path: path.name)
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
    own = {path.relative_to(STABILITY.parents[1]).as_posix() for path in STABILITY.rglob("*.yaml")}
    commands = (tmp_path / "commands").read_text().splitlines()
    assert len(commands) >= 4
    for line in commands:
        assert set(re.findall(r"\S+\.yaml", line)) <= {*own, *shipped_configs()}
        assert "baseline" in line.partition("--methods ")[2].split()[0]  # with which the others are compared
        if "handover" in line:  # without a schedule, plain ZNorm
            assert "cosine" in line.partition("--methods")[0]
        assert line.endswith(" --jobs 6")


def test_schedule_is_laid_over_the_papers_experiments(capsys):
    files = ["configs/cifar10/vgg16.yaml", str(STABILITY / "cosine.yaml"), "configs/methods/znorm.yaml"]
    with pytest.raises(SystemExit):
        main(["fit", *(part for file in files for part in ("--config", file)), "--print_config"])
    settings = yaml.safe_load(capsys.readouterr().out)
    schedule = settings["model"]["init_args"]["lr_scheduler"]
    assert schedule["init_args"]["T_max"] == settings["trainer"]["max_epochs"]


def test_report(tmp_path, capsys):
    results = tmp_path / "results"
    values = {"baseline": (0.5, 1e-2), "znorm": (0.4, 4e-2), "floor": (0.45, 1e-2)}
    for study in ("plain-adam-constant", "plain-adam-cosine"):
        folder = tmp_path / "studies" / study
        folder.mkdir(parents=True)
        with (folder / "results.csv").open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(["run", "seed", "method", "epoch", "metric", "value"])
            for method, (accuracy, loss) in values.items():
                for seed in range(3):
                    run = [f"{method}-{seed}", seed, method]
                    for epoch in range(10):
                        writer.writerow([*run, epoch, "train/loss", loss * (seed + 1)])
                        for layer in ("a", "b"):
                            writer.writerow([*run, epoch, f"sigma/{layer}", 1e-3])
                            writer.writerow([*run, epoch, f"cosine/{layer}", 0.3])
                    writer.writerow([*run, 9, "test/accuracy", accuracy + 0.01 * seed])
    REPORT["main"](tmp_path / "studies", results)
    out = capsys.readouterr().out
    assert {path.name for path in results.iterdir()} >= {"loss.png", "cosine.png", "sigma.png", "plain-adam-cosine.csv"}
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("| znorm")]
    assert rows[0] == rows[1]
    # 4e-2 times the cube root of 6, four times the baseline's on each seed, and 0.1 less accurate.
    assert rows[0] == ["znorm", "3", "0.073", "4 (4 to 4)", "-", "0.410", "-0.100 (-0.100 to -0.100)", "-"]


@pytest.mark.parametrize("results", [[], [None, STABILITY / "results" / "adaptive"]], ids=["results", "adaptive"])
def test_tables_in_the_documentation_are_those_of_the_results(results, capsys):
    REPORT["main"](*results)
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("|")]
    assert printed
    text = (STABILITY.parents[1] / "docs" / "stability.md").read_text(encoding="utf-8")
    assert [line for line in printed if line not in text] == []
    for image in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert (STABILITY.parents[1] / "docs" / image).is_file()
