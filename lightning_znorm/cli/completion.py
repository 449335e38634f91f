"""A script for the shell that completes commands, flags, config files and class names."""

import argparse
import importlib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NoReturn

from lightning.pytorch.cli import ArgsType, LightningArgumentParser
from typing_extensions import override

from lightning_znorm.cli.classes import CLASSES
from lightning_znorm.cli.components import Parser, flags_of
from lightning_znorm.cli.config_files import read_config, shipped_configs
from lightning_znorm.cli.help import COMMANDS, SHELLS
from lightning_znorm.cli.help_format import named_classes, plain
from lightning_znorm.cli.program import SCRIPT
from lightning_znorm.cli.run import RunCLI

_CONFIGS = "_lightning_znorm_config_files"
"""The function of a shell that completes names of config files: those on disk, and those in the package."""

_PREAMBLES = {
    # A flag may stand behind the last file of several: shtab's function has what was typed, and the flags.
    "bash": """\
{function}() {{
  local word="${{completing_word-$1}}"
  word="${{word//\\\\/}}"
  case "$word" in
    -?*) compgen -W "${{current_option_strings[*]}}" -- "$word" ;;
    *) compgen -W "{names}" -- "$word"; compgen -f -- "$word" ;;
  esac
}}""",
    "zsh": "{function}() {{ _alternative 'files:file:_files' 'shipped:config in the package:({names})' }}",
    "tcsh": "",  # it completes names of files alone
}
# Bash takes --flag=value for three words, and shtab's function expects two.
_WITHOUT_EQUALS = re.compile(r"^(complete .*-F )(\w+)( \S+)$", flags=re.MULTILINE)
_JOINED = r"""_lightning_znorm() {
  local word words=() current=0 index
  for index in "${!COMP_WORDS[@]}"; do
    word="${COMP_WORDS[index]}"
    if [[ "$word" == "=" ]]; then
      ((index == COMP_CWORD)) || continue
      word=""
    fi
    ((index > COMP_CWORD)) || current=${#words[@]}
    words+=("$word")
  done
  local COMP_WORDS=("${words[@]}") COMP_CWORD=$current
  \2 "$@"
}

\1_lightning_znorm\3"""
_COMPLETE_CONFIGS = {"bash": _CONFIGS, "zsh": _CONFIGS, "tcsh": "f"}
_CONFIG_FLAGS = ("-c", "--config", "--methods")
_FILE_FLAGS = ("--ckpt_path",)
_FOLDER_FLAGS = ("--output", "--trainer.default_root_dir")
WORDS = {
    "--trainer.accelerator": ("auto", "cpu", "cuda", "gpu", "mps", "tpu"),
    "--trainer.devices": ("auto",),
    "--trainer.precision": ("32-true", "64-true", "bf16-true", "16-true", "bf16-mixed", "16-mixed"),
    "--trainer.strategy": ("auto", "ddp", "ddp_spawn", "deepspeed", "fsdp"),
}
"""Values that Lightning takes besides classes."""


def print_script(shell: str) -> None:
    """Print the script for a shell.

    Args:
        shell: One of bash, zsh and tcsh.
    """
    made: list[Parser] = []
    try:
        _ParserAlone(made)
    except SystemExit:
        if not made:
            raise
    print(_script(made[0], shell))


class _ParserAlone(RunCLI):
    """Makes the parser of all commands, and ends there.

    Args:
        made: Gets the parser.
    """

    def __init__(self, made: list[Parser]) -> None:
        self.made = made
        super().__init__([], [])

    @override
    def parse_arguments(self, parser: LightningArgumentParser, args: ArgsType) -> NoReturn:
        """End the run here."""
        assert isinstance(parser, Parser)
        self.made.append(parser)
        sys.exit(0)


def _script(parser: Parser, shell: str) -> str:
    """Return the script for a shell.

    Args:
        parser: The parser of all commands but ``compare``.
        shell: One of bash, zsh and tcsh.
    """
    import shtab  # of an extra

    from lightning_znorm.compare.command import make_parser

    root = argparse.ArgumentParser(SCRIPT, add_help=False)
    root.add_argument("-h", "--help", action="store_true", help="list the commands and the config files")
    root.add_argument("--version", action="store_true", help="print the version")
    root.add_argument("--print_completion", choices=SHELLS, help="print the script for a shell")
    commands = root.add_subparsers(dest="command")
    for_each = dict(_settings())
    by_command = {name: flags_of(each) for name, each in parser.commands().items()}
    by_command["compare"] = [*flags_of(make_parser(SCRIPT)), *by_command["fit"]]
    for name, flags in by_command.items():
        _add(commands.add_parser(name, help=COMMANDS[name], add_help=False), flags, for_each)
    preamble = _PREAMBLES[shell].format(function=_CONFIGS, names=" ".join(shipped_configs()))
    script: str = shtab.complete(root, shell, preamble=preamble)
    return _WITHOUT_EQUALS.sub(_JOINED, script) if shell == "bash" else script


def _settings() -> Iterator[tuple[str, argparse.Action | None]]:
    """Yield the flags of what models and data modules take, and of all settings in the package's files."""
    for file in map(read_config, shipped_configs()):
        for key in file.settings:
            yield f"--{key.removesuffix('.class_path')}", None
    for key in ("model", "data"):
        module, names = CLASSES[key]
        for name in names:
            parser = Parser(exit_on_error=False)
            class_type = getattr(importlib.import_module(module), name)
            parser.add_class_arguments(class_type, f"{key}.init_args", fail_untyped=False)
            for action in flags_of(parser):
                for flag in action.option_strings:
                    if flag.startswith(f"--{key}.init_args."):
                        yield flag, action


def _add(
    parser: argparse.ArgumentParser,
    actions: Sequence[argparse.Action],
    settings: Mapping[str, argparse.Action | None],
) -> None:
    """Add flags to the parser of a command, with what completes their values."""
    by_flag = {flag: action for action in actions for flag in action.option_strings}
    for flag, action in ({**settings, **by_flag}).items():
        takes_none = action is not None and (action.nargs == 0 or action.dest == "print_config")
        text = plain(action.help).partition(". ")[0] if action is not None and isinstance(action.help, str) else None
        if text == argparse.SUPPRESS:
            continue
        if takes_none:
            parser.add_argument(flag, action="store_true", help=text)
            continue
        added: Any = parser.add_argument(flag, nargs=_number(action), choices=_values(flag, action), help=text)
        if flag in _CONFIG_FLAGS:
            added.complete = _COMPLETE_CONFIGS
        elif flag in _FILE_FLAGS or flag in _FOLDER_FLAGS:
            added.complete = _any("FILE" if flag in _FILE_FLAGS else "DIRECTORY")


def _number(action: argparse.Action | None) -> int | str | None:
    """Return how many values a flag takes; None for one."""
    return action.nargs if action is not None and action.nargs in ("+", "*") else None


def _values(flag: str, action: argparse.Action | None) -> list[str] | None:
    """Return the values that complete a flag; None if any value may stand there."""
    if action is not None and action.choices is not None:
        return [str(choice) for choice in action.choices]
    setting = flag.removeprefix("--").removesuffix("+").removesuffix(".help")
    words = [*WORDS.get(f"--{setting}", ()), *CLASSES.get(setting, ("", ()))[1]]
    if action is not None and isinstance(action.metavar, str) and action.metavar.startswith("{"):  # {true,false}
        words += action.metavar.strip("{}").split(",")
    if classes := getattr(action, "extra_help", None):  # of jsonargparse, for classes
        listed = named_classes(classes())
        words += [path.rpartition(".")[2] for path in re.findall(r"[\w.]*\.[A-Z]\w*", listed)]
    return list(dict.fromkeys(words)) or None


def _any(kind: str) -> dict[str, str]:
    """Return what stands for any file, or any folder, in shtab."""
    import shtab

    words: dict[str, str] = getattr(shtab, kind)
    return words
