"""Help that comes at once, without PyTorch: an overview of the commands, and one page for each of them."""

import json
import shlex
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_znorm.cli.classes import CLASSES
from lightning_znorm.cli.config_files import ConfigFile, shipped_configs

COMMANDS = {
    "fit": "train",
    "validate": "evaluate on the validation set",
    "test": "evaluate on the test set",
    "predict": "save the predictions for the test set",
    "compare": "run several methods with several seeds, and report whether they differ",
}
"""What each command does."""

SENTENCES = {
    "fit": "Train, validate after every epoch, and print the command that tests the best checkpoint.",
    "validate": "Evaluate the weights of a checkpoint on the validation set.",
    "test": "Evaluate the weights of a checkpoint on the test set.",
    "predict": "Save the predictions for the test set, beside the logs.",
}
"""What each command that takes Lightning's flags does, in a sentence."""

SHELLS = ("bash", "zsh", "tcsh")
"""Shells in which commands and flags can be completed."""

_KEYS = ("model", "data", "trainer", "seed_everything", "ckpt_path", "weights_only")  # a file may hold others
_WIDTH = 100
_COLUMN = 34


@dataclass(frozen=True)
class Flag:
    """A flag that is shown in the short help.

    Args:
        name: The flag.
        value: What stands behind it; empty for a flag that takes no value.
        text: What it does.
        default: Its default, as the parser has it. None is not shown.
        commands: The commands that take it.
    """

    name: str
    value: str
    text: str
    default: Any = None
    commands: tuple[str, ...] = ("fit", "validate", "test", "predict")


FLAGS = (
    Flag("--config", "FILE", "settings, from a YAML file; may be repeated, and later files override earlier ones"),
    Flag("--print_config", "", "print the settings that result from files and flags, and exit"),
    Flag(
        "--ckpt_path",
        "FILE",
        "resume the training that saved this checkpoint; last: the newest last.ckpt of the same logs",
        commands=("fit",),
    ),
    Flag(
        "--ckpt_path",
        "FILE",
        "take the weights from this checkpoint; without it, they are those that a training would begin with",
        commands=("validate", "test", "predict"),
    ),
    Flag("--seed_everything", "N", "seed of all random numbers; true draws one", 0),
    Flag("--trainer.max_epochs", "N", "end after so many epochs", commands=("fit",)),
    Flag("--trainer.accelerator", "NAME", "cpu, gpu, mps, ... or auto", "auto"),
    Flag("--trainer.devices", "N", "number of devices, or a list of their numbers such as [0,2]", "auto"),
    Flag("--trainer.strategy", "NAME", "ddp, fsdp, deepspeed, ... or auto", "auto"),
    Flag("--trainer.precision", "NAME", "32-true unless it is set; bf16-mixed, 16-mixed, bf16-true, ..."),
    Flag("--trainer.fast_dev_run", "N", "only try whether everything works, with N batches", False),
    Flag("--trainer.callbacks+", "CLASS", "add a callback to those in the files, such as GradientMonitor"),
    Flag("--trainer.logger", "CLASS", "where metrics are logged: CSVLogger, TensorBoardLogger, WandbLogger, ..."),
)
"""What most runs need."""


def overview(program: str) -> str:
    """Return the help of the program, with the names of the config files in the package.

    Args:
        program: What the user types in front of a command.
    """
    commands = "\n".join(f"  {name:<9} {what}" for name, what in COMMANDS.items())
    return f"""\
usage: {usage(program)}

{commands}

`{program} COMMAND --help` says what a command takes.

Name an experiment and a method. The method changes the experiment, and flags override both:

  {program} fit --config configs/digits/resnet20.yaml --config configs/methods/znorm.yaml
  {program} fit --config configs/digits/resnet20.yaml --trainer.max_epochs 2

`fit ... --print_config` prints the resulting settings, `--version` the version. For completion of commands, files and
flags: `lightning-znorm --print_completion bash > ~/.local/share/bash-completion/completions/lightning-znorm` (or zsh).

These files come with the package; a file of the same name on disk is used in place of one:

{_listed(shipped_configs())}"""


def usage(program: str) -> str:
    """Return the form of all commands.

    Args:
        program: What the user types in front of a command.
    """
    return f"{program} {{{','.join(COMMANDS)}}} [--config FILE ...] [--KEY VALUE ...]"


def page(command: str, program: str, files: Sequence[ConfigFile]) -> str:
    """Return the short help of a command: what most runs need, and where to find the rest.

    Args:
        command: One of fit, validate, test and predict.
        program: What the user types in front of a command.
        files: The config files that are named beside ``--help``. Their settings are listed as flags.
    """
    named = "".join(f" --config {shlex.quote(file.name)}" for file in files)
    start = f"{program} {command}"
    lines = [
        f"usage: {start} --config EXPERIMENT [--config METHOD] [--KEY VALUE ...]",
        "",
        SENTENCES[command],
        f"`{program} --help` lists the experiments and methods in the package.",
        "",
        "what most runs need:",
    ]
    for flag in FLAGS:
        if command in flag.commands:
            text = flag.text if flag.default is None else f"{flag.text} (default: {_written(flag.default)})"
            lines += _entry(f"{'-c, ' if flag.name == '--config' else ''}{flag.name} {flag.value}".rstrip(), text)
    if files:
        sources = " and ".join(file.name for file in files)
        lines += ["", f"settings of {sources}, as flags; a flag of your own overrides a file:"]
        lines += [f"  {line}" for line in _settings(files)]
    lines += ["", "what a class takes; in files, these are its init_args:"]
    for key, (_, names) in CLASSES.items():
        lines += _entry(f"--{key}.help CLASS", f"{', '.join(names)}, or a class of your own (my_module.MyClass)")
    lines += ["", "all flags, those of Lightning's Trainer among them:", *_entry("--help_all", "print them, and exit")]
    if not files:
        lines += ["", f"`{start} --config EXPERIMENT --help` also lists the settings of the experiment."]
    else:
        lines += ["", f"`{start}{named} --print_config` prints all settings with their defaults."]
    return "\n".join(lines)


def _settings(files: Sequence[ConfigFile]) -> Iterator[str]:
    """Yield the settings of files as flags with their values; the last file that has a setting decides."""
    settings: dict[str, Any] = {}
    appended: list[str] = []
    for file in files:
        appended += file.callbacks
        settings |= file.settings
    for key, value in settings.items():
        name = key.removesuffix(".class_path")
        if key.partition(".")[0] in _KEYS and key.removesuffix("+") != "trainer.callbacks":
            yield f"--{name} {shlex.quote(_written(value))}"
    for name in dict.fromkeys(appended):
        yield f"--trainer.callbacks+ {name}"


def _written(value: Any) -> str:
    """Return a value as it is written on the command line."""
    # JSON is YAML too. Numbers stay as a file has them: YAML reads 1e-3 as a text.
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def _entry(flag: str, text: str) -> list[str]:
    """Return the lines of a flag and its text, in two columns."""
    wrapped = textwrap.wrap(text, _WIDTH - _COLUMN)
    first = [f"  {flag}"] if len(flag) + 4 > _COLUMN else []
    start = "" if first else f"  {flag}"
    rows = [f"{start if number == 0 else '':<{_COLUMN}}{line}" for number, line in enumerate(wrapped)]
    return [*first, *rows]


def _listed(names: Sequence[str]) -> str:
    return "\n".join(f"  {name}" for name in names)
