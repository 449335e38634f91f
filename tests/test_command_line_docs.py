"""docs/reference/command-line.md: its commands run, and what its tables say is so."""

import re
import shlex
from pathlib import Path

import pytest
import yaml

from lightning_znorm.cli import main
from lightning_znorm.cli.help import COMMANDS, FLAGS
from tests.processes import run_python

TEXT = (Path(__file__).parents[1] / "docs/reference/command-line.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w+)\n(.*?)^```$", TEXT, flags=re.MULTILINE | re.DOTALL)
LINES = [line for _, code in BLOCKS for line in code.splitlines()]
OURS = [line.removeprefix("lightning-znorm ") for line in LINES if line.startswith("lightning-znorm ")]
# Does not train for long.
SHORT = ["--trainer.accelerator=cpu", "--trainer.fast_dev_run=1"]


def outcome(*args: str) -> int:
    try:
        main([*args])
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def test_every_block_is_run_here() -> None:
    assert {language for language, _ in BLOCKS} == {"bash"}
    others = [line.split()[0] for line in LINES if not line.startswith("lightning-znorm ")]
    assert others == ["python", "mkdir"]  # of the completion, for which tests/test_completion.py is


@pytest.mark.parametrize("command", OURS)
def test_commands(command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    args = shlex.split(command.partition(" > ")[0])
    assert outcome(*args, *(SHORT if args[0] == "fit" and "help" not in command else [])) == 0
    if "--print_config" in args:
        assert yaml.safe_load(capsys.readouterr().out)["trainer"]["max_epochs"] == 5


def test_arguments_of_an_appended_callback(capsys) -> None:
    flags = ["--trainer.callbacks+", "ZNormCallback", "--trainer.callbacks.min_ndim", "2"]
    assert outcome("fit", "--config", "configs/digits/resnet20.yaml", *flags, "--print_config") == 0
    callbacks = yaml.safe_load(capsys.readouterr().out)["trainer"]["callbacks"]
    assert callbacks[-1]["class_path"] == "lightning_znorm.ZNormCallback"
    assert callbacks[-1]["init_args"]["min_ndim"] == 2
    assert len(callbacks) > 1


def test_tables_name_every_command_and_flag() -> None:
    for name in COMMANDS:
        assert f"`{name}`" in TEXT.partition("## Config files")[0]
    for flag in FLAGS:
        assert f"`{flag.name}`" in TEXT or flag.name == "--config"


@pytest.mark.parametrize(
    ("args", "status"),
    [
        (["--help"], 0),
        (["fit", "--help"], 0),
        (["fit", "--config", "none.yaml"], 1),
        (["fitt"], 2),
        (["fit", "--trainer.max_epoch", "1"], 2),
        (["fit", "--config", "configs/digits/resnet20.yaml", "--trainer.max_epochs", "many"], 2),
    ],
    ids=lambda words: " ".join(words) if isinstance(words, list) else str(words),
)
def test_exit_status(args: list[str], status: int) -> None:
    done = run_python("-W", "ignore", "-m", "lightning_znorm", *args, timeout=60)
    assert done.returncode == status, done.stdout
    if status == 1:
        assert done.stdout.startswith("error: ")
