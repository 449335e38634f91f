"""Every code block of the README runs, and its table of options is correct."""

import ast
import inspect
import re
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from torch import nn

from lightning_znorm import ZNormCallback
from lightning_znorm.cli import main
from lightning_znorm.compare.processes import Processes
from lightning_znorm.functional import transform_grads_, zscore_grads_
from tests.compare.captured import capture_here
from tests.processes import run_forked

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)


def blocks(language: str) -> list[str]:
    return [code for block_language, code in BLOCKS if block_language == language]


def test_every_language_is_run_here() -> None:
    assert {language for language, _ in BLOCKS} == {"bash", "python", "yaml"}


def run(code: str) -> dict[str, Any]:
    names: dict[str, Any] = {}
    torch.manual_seed(0)  # if two elements were nearly equal, the mean would be as large as the rounding
    exec(compile(code, str(README), "exec"), names)
    return names


def test_python() -> None:
    in_a_trainer, in_a_loop, own_method = map(run, blocks("python"))
    assert any(isinstance(callback, ZNormCallback) for callback in in_a_trainer["trainer"].callbacks)
    for parameter in in_a_loop["model"].parameters():
        assert parameter.grad.mean().abs() < 1e-6
        assert parameter.grad.std(correction=0).item() == pytest.approx(1, abs=1e-4)
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([1.0, 7.0])
    transform_grads_(weight, own_method["callback"].method)
    torch.testing.assert_close(weight.grad, torch.tensor([0.2, 1.4]))


COMMANDS = [command.strip() for code in blocks("bash") for command in code.replace("&&", "\n").strip().split("\n")]


@pytest.fixture
def marking(fake_lgg: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], None]:
    """Return a function that makes a folder of images, and a checkpoint for a command that predicts their masks."""

    def make(args: list[str]) -> None:
        shutil.copytree(
            next(fake_lgg.glob("kaggle_3m/TCGA*")), tmp_path / "slices", ignore=lambda _, names: masks(names)
        )
        short = "--trainer.max_epochs 1 --trainer.limit_train_batches 1 --trainer.limit_val_batches 1"
        short += " --trainer.log_every_n_steps 1 --trainer.num_sanity_val_steps 0 --trainer.accelerator cpu"
        data = "--data.init_args.val_fraction 0.3 --data.init_args.test_fraction 0.3 --data.init_args.batch_size 2"
        flags = shlex.split(f"{short} {data}")
        main(["fit", *args[1:5], *flags, "--data.init_args.root", str(fake_lgg)])
        next(tmp_path.rglob("last.ckpt")).rename(tmp_path / "best.ckpt")

    def masks(names: list[str]) -> set[str]:
        return {name for name in names if "mask" in name}

    return make


# Lightning warns about a checkpoint that another run has written.
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
@pytest.mark.parametrize("command", [command for command in COMMANDS if "lightning_znorm" in command])
def test_command(
    command: str,
    fake_cifar10: Path,
    marking: Callable[[list[str]], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    python, flag, package, *args = shlex.split(command)
    assert (python, flag, package) == ("python", "-m", "lightning_znorm")
    monkeypatch.chdir(tmp_path)
    if "cifar10" in command:  # where the download would put the data
        fake_cifar10.rename(tmp_path / "data")
    if "predict" in args:
        marking(args)
    if "compare" in args:
        args.append("--dry-run")
        monkeypatch.setattr(Processes, "capture", capture_here)
        monkeypatch.setattr(Processes, "run", lambda self, args, log, *_, **__: run_forked(args, log))
    else:
        args += ["--trainer.fast_dev_run", "true"]
    main([*args, "--trainer.accelerator", "cpu"])


@pytest.mark.full  # the same as above, but the study tries its methods in processes of their own
def test_compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (command,) = (command for command in COMMANDS if " compare " in command)
    monkeypatch.chdir(tmp_path)
    main([*shlex.split(command)[3:], "--dry-run", "--trainer.accelerator", "cpu"])


def test_the_other_commands_install_and_test() -> None:
    # .ci/run runs them, in a fresh environment.
    assert [command for command in COMMANDS if "lightning_znorm" not in command] == [
        "python -m pip install .",
        "python -m pip install '.[test]'",
        "python -m pytest",
    ]


@pytest.mark.parametrize("module", sorted(set(re.findall(r"python -m (benchmarks\.\w+)", TEXT))))
def test_benchmarks_are_there(module: str) -> None:
    # tests/test_benchmarks.py runs them.
    assert (README.parent / f"{module.replace('.', '/')}.py").is_file()


@pytest.mark.parametrize("text", blocks("yaml"))
def test_yaml(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Classes of the package stand for the reader's classes.
    settings = yaml.safe_load(text)
    assert settings["model"]["class_path"] == "my_package.MyModule"
    settings["model"] = {
        "class_path": "ClassificationTask",
        "init_args": {"model": "resnet20", "num_classes": 10, "in_chans": 1},
    }
    settings["data"]["class_path"] = "DigitsDataModule"
    settings["trainer"]["fast_dev_run"] = True
    file = tmp_path / "experiment.yaml"
    file.write_text(yaml.safe_dump(settings), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    main(["fit", "--config", str(file), "--trainer.accelerator", "cpu"])


def test_options_have_the_defaults_of_the_table() -> None:
    rows = re.findall(r"^\| (`\w+`(?:, `\w+`)*) \| (`[^`]+`(?:, `[^`]+`)*) \| ", TEXT, flags=re.MULTILINE)
    told = {
        name: ast.literal_eval(default)
        for names, defaults in rows
        for name, default in zip(re.findall("`(.+?)`", names), re.findall("`(.+?)`", defaults), strict=True)
    }
    defaults = {
        name: parameter.default
        for name, parameter in inspect.signature(ZNormCallback).parameters.items()
        if name != "allow_untested_strategy"  # of "What works today"
    }
    assert told == defaults
    assert inspect.signature(zscore_grads_).parameters["eps"].default == defaults["eps"]
