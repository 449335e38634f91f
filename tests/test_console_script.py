"""The console script `lightning-znorm`, as pip writes it: help and hints name it, and `ddp` starts it again."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from lightning_znorm.cli.program import MODULE, SCRIPT, program
from tests.processes import run_python

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"
# What pip writes for an entry point.
WRAPPER = """\
import re
import sys
from {module} import {function}
if __name__ == "__main__":
    sys.argv[0] = re.sub(r"(-script\\.pyw|\\.exe)?$", "", sys.argv[0])
    sys.exit({function}())
"""
FIT = ["fit", "--config", "configs/digits/resnet20.yaml", "--config", "configs/methods/znorm.yaml"]
SHORT = ["--trainer.max_epochs=1", "--trainer.limit_train_batches=2", "--trainer.limit_val_batches=1"]


@pytest.fixture(scope="module")
def script(tmp_path_factory) -> Path:
    entry = re.search(r'^\[project\.scripts\]\n(\S+) = "([\w.]+):(\w+)"\n', PYPROJECT.read_text(), flags=re.MULTILINE)
    assert entry
    path = tmp_path_factory.mktemp("bin") / entry[1]
    path.write_text(WRAPPER.format(module=entry[2], function=entry[3]))
    return path


def run(*arguments: str | Path, cwd: Path, timeout: float = 60, code: int = 0) -> str:
    done = run_python("-W", "ignore", *arguments, timeout=timeout, cwd=cwd)
    assert done.returncode == code, done.stdout
    return done.stdout


@pytest.mark.parametrize(
    ("called", "name"),
    [
        ("/venv/bin/lightning-znorm", SCRIPT),
        ("lightning-znorm.exe", SCRIPT),
        ("/venv/lightning_znorm/__main__.py", MODULE),
        ("train.py", MODULE),
        ("", MODULE),
    ],
)
def test_name_of_the_program(called, name, monkeypatch):
    monkeypatch.setattr(sys, "argv", [called])
    assert program() == name


def test_help_names_the_script(script, tmp_path):
    out = run(script, "--help", cwd=tmp_path)
    assert out.startswith("usage: lightning-znorm {fit,")
    assert "\n  lightning-znorm fit --config configs/" in out
    assert MODULE not in out
    assert run(script, "fit", "--help", cwd=tmp_path).startswith("usage: lightning-znorm fit ")


@pytest.mark.parametrize("form", ["script", "module"])
def test_refusals_name_what_was_called(form, script, tmp_path):
    start = [script] if form == "script" else ["-m", "lightning_znorm"]
    name = SCRIPT if form == "script" else MODULE
    assert run(*start, "fitt", cwd=tmp_path, code=2).startswith(f"usage: {name} {{")
    assert f"{name} --help lists the latter." in run(*start, "fit", "--config", "none", cwd=tmp_path, code=1)


@pytest.mark.full
def test_help_of_compare(script, tmp_path):
    out = run(script, "compare", "--help", cwd=tmp_path)
    assert out.startswith("usage: lightning-znorm compare ")
    assert "\n  lightning-znorm compare --config" in out


@pytest.mark.full
def test_two_processes(script, tmp_path):
    """Lightning starts the second one by the name of the script and its arguments."""
    flags = ["--trainer.accelerator=cpu", "--trainer.strategy=ddp", "--trainer.devices=2"]
    out = run(script, *FIT, *SHORT, *flags, cwd=tmp_path, timeout=240)
    assert "GLOBAL_RANK: 1, MEMBER: 2/2" in out
    (hint,) = re.findall("test it with +(.*)", out)
    assert hint.startswith("lightning-znorm test --config configs/digits/resnet20.yaml --config")
    assert len(list(tmp_path.glob("logs/digits-resnet20/*"))) == 1


@pytest.mark.full
def test_compare_starts_the_module(script, tmp_path):
    """A run's log begins with a command that works wherever the package can be imported."""
    methods = ["configs/methods/baseline.yaml", "configs/methods/znorm.yaml"]
    flags = ["--methods", *methods, "--seeds", "0", "--output", "out", "--trainer.accelerator=cpu"]
    run(script, "compare", *FIT[1:3], *flags, *SHORT, cwd=tmp_path, timeout=280)
    log = (tmp_path / "out/runs/znorm-0/log.txt").read_text()
    assert log.startswith("$ python -m lightning_znorm fit ")


def test_it_is_a_program_of_its_own(script, tmp_path):
    """It runs without the module form."""
    done = subprocess.run(
        [sys.executable, script, "--version"], cwd=tmp_path, capture_output=True, text=True, timeout=60
    )
    assert re.fullmatch(r"lightning-znorm \d+\.\d+\.\d+\n", done.stdout)


def test_modules_of_the_current_folder_are_found(script, tmp_path):
    (tmp_path / "own.py").write_text("from lightning.pytorch import Callback\n\n\nclass Counter(Callback):\n    pass\n")
    out = run(script, *FIT, "--trainer.callbacks+=own.Counter", "--print_config", cwd=tmp_path)
    assert "class_path: own.Counter" in out


@pytest.mark.skipif(sys.version_info < (3, 11), reason="needs Python 3.11: it is the first with -P")
def test_safe_paths_stay_safe(script, tmp_path):
    (tmp_path / "own.py").write_text("from lightning.pytorch import Callback\n\n\nclass Counter(Callback):\n    pass\n")
    out = run("-P", script, *FIT, "--trainer.callbacks+=own.Counter", "--print_config", cwd=tmp_path, code=2)
    assert "own" in out
