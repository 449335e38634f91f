"""Completion, in real shells: the printed script completes commands, flags, config files, and names of classes."""

import shutil
import subprocess
import sys
from pathlib import Path

import jsonargparse
import pytest
import shtab

from lightning_znorm.cli import main
from lightning_znorm.cli.help import FLAGS, SHELLS
from tests.processes import run_python

COMPLETE = """
source completion.bash
COMP_WORDS=("$@")
COMP_CWORD=$(($# - 1))
registered=($(complete -p lightning-znorm))
"${registered[-2]}" "$1" "${COMP_WORDS[COMP_CWORD]}" "${COMP_WORDS[COMP_CWORD-1]}"
printf '%s\\n' "${COMPREPLY[@]}"
"""
EXPERIMENT = "configs/digits/resnet20.yaml"


@pytest.fixture(scope="module")
def scripts(tmp_path_factory) -> Path:
    """A folder with the script for each shell."""
    folder = tmp_path_factory.mktemp("scripts")
    # In a process of its own, whose classes are not those of other tests.
    program = (
        "import contextlib\nfrom lightning_znorm.cli import main\n"
        f"for shell in {SHELLS}:\n"
        "    with open(f'completion.{shell}', 'w') as file, contextlib.redirect_stdout(file):\n"
        "        main(['--print_completion', shell])\n"
    )
    run_python("-W", "ignore", "-c", program, timeout=200, cwd=folder)
    return folder


def completed(scripts: Path, *words: str) -> list[str]:
    """Return what bash offers for the last word."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("needs bash")
    command = [bash, "-c", COMPLETE, "bash", "lightning-znorm", *words]
    done = subprocess.run(command, cwd=scripts, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stderr == ""
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["f"], ["fit"]),
        ([""], ["fit", "validate", "test", "predict", "compare"]),
        (["--v"], ["--version"]),
        (["--print_completion", ""], [*SHELLS]),
        (["fit", "--trainer.max_e"], ["--trainer.max_epochs"]),
        (["fit", "--config", EXPERIMENT, "--trainer.max_e"], ["--trainer.max_epochs"]),
        (["fit", "--print_config", "--trainer.max_e"], ["--trainer.max_epochs"]),
        (["predict", "--trainer.limit_pred"], ["--trainer.limit_predict_batches"]),
        (["fit", "--config", "configs/dig"], [EXPERIMENT]),
        (["fit", "--config", "completion.b"], ["completion.bash"]),
        (["fit", "-c", "configs/dig"], [EXPERIMENT]),
        (["fit", "--model", "Cl"], ["ClassificationTask"]),
        (["fit", "--model.help", ""], ["ClassificationTask", "SegmentationTask"]),
        (["fit", "--data", "Dig"], ["DigitsDataModule"]),
        (["fit", "--trainer.callbacks+", "ZN"], ["ZNormCallback"]),
        (["fit", "--model.init_args.num_c"], ["--model.init_args.num_classes"]),
        (["fit", "--model.init_args.optimizer.init_args.l"], ["--model.init_args.optimizer.init_args.lr"]),
        (["fit", "--trainer.strategy", "dd"], ["ddp", "ddp_spawn"]),
        (["fit", "--trainer.enable_progress_bar", "f"], ["false"]),
        (["compare", "--methods", "configs/methods/base"], ["configs/methods/baseline.yaml"]),
        (["compare", "--methods", "configs/methods/gc.yaml", "configs/methods/b"], ["configs/methods/baseline.yaml"]),
        (["compare", "--methods", "configs/methods/gc.yaml", "--swe"], ["--sweep"]),
        (["compare", "--trainer.max_e"], ["--trainer.max_epochs"]),
        # Bash takes --flag=value for three words.
        (["fit", "--config", "=", "configs/dig"], [EXPERIMENT]),
        (["fit", "--config", "=", EXPERIMENT, "--trainer.strategy", "=", "dd"], ["ddp", "ddp_spawn"]),
        (["fit", "--trainer.callbacks+", "=", "ZN"], ["ZNormCallback"]),
        (["fit", "--model", "="], ["ClassificationTask", "SegmentationTask"]),
        (["fit", "--config", "=", EXPERIMENT, "--trainer.max_e"], ["--trainer.max_epochs"]),
    ],
    ids=" ".join,
)
def test_bash(scripts, words, expected):
    assert completed(scripts, *words) == expected


def test_names_with_spaces(scripts):
    (scripts / "my configs").mkdir()
    (scripts / "my configs" / "one.yaml").touch()
    assert completed(scripts, "fit", "--config", r"my\ con") == ["my", "configs"]
    assert completed(scripts, "fit", "--config", r"my\ configs/o") == ["my", "configs/one.yaml"]


def test_every_flag_of_the_short_help(scripts):
    for flag in FLAGS:
        for command in flag.commands:
            assert flag.name in completed(scripts, command, flag.name)


@pytest.mark.parametrize("shell", SHELLS)
def test_syntax(scripts, shell):
    program = shutil.which(shell)
    if program is None:
        pytest.skip(f"needs {shell}")
    done = subprocess.run([program, "-n", scripts / f"completion.{shell}"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, "")


def test_words_are_accepted(capsys):
    """Values that are offered besides classes are values that the Trainer takes."""
    from lightning_znorm.cli.completion import WORDS

    for flag, words in WORDS.items():
        for word in words:
            with pytest.raises(SystemExit) as exit_info:
                main(["fit", "--config", EXPERIMENT, flag, word, "--print_config"])
            assert exit_info.value.code == 0
            assert word in capsys.readouterr().out


def test_setting_of_jsonargparse_stays(scripts):
    """A program that calls `main` has its parsers as before: completion is no flag of theirs."""
    with pytest.raises(SystemExit):
        main(["fit", "--config", EXPERIMENT, "--print_config"])
    parser = jsonargparse.ArgumentParser()
    assert "--print_completion" not in parser.format_help()


def refusal(*args: str) -> str:
    with pytest.raises(SystemExit) as exit_info:
        main([*args])
    return str(exit_info.value.code)


def test_unknown_shell():
    for args in (["--print_completion"], ["--print_completion", "fish"], ["--print_completion=bash", "zsh"]):
        assert refusal(*args) == "error: --print_completion takes the name of a shell: bash, zsh or tcsh."


def test_without_shtab(monkeypatch):
    monkeypatch.setitem(sys.modules, "shtab", None)
    said = refusal("--print_completion", "bash")
    assert said == "error: --print_completion needs shtab: pip install 'lightning-znorm[completion]'"


def test_shells_are_those_of_shtab():
    assert {*SHELLS} <= {*shtab.SUPPORTED_SHELLS}
