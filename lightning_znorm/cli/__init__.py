"""The command line: ``python -m lightning_znorm``.

`lightning.pytorch.cli.LightningCLI`, whose documentation says how YAML files and flags are written, and more: the
config files that come with the package are found from any folder, flags win over files wherever they stand, files that
would undo a method are refused, and mistakes get one sentence.

Torch is loaded only when a command runs, so that help and refusals come at once.
"""

import argparse
import difflib
import io
import os
import shlex
import sys
from typing import NoReturn

from lightning_znorm import __version__
from lightning_znorm.cli.config_files import is_stream, read_config, shipped_configs
from lightning_znorm.cli.config_order import check_order
from lightning_znorm.cli.errors import sentence
from lightning_znorm.cli.processes import check_streams, refuse_streams, started_processes
from lightning_znorm.errors import ZNormValueError

__all__ = ["main"]

_COMMANDS = ("fit", "validate", "test", "predict", "compare")
_HELP = """\
usage: python -m lightning_znorm {fit,validate,test,predict,compare} [--config FILE ...] [--KEY VALUE ...]

  fit       train
  validate  evaluate on the validation set
  test      evaluate on the test set
  predict   save the predictions for the test set
  compare   run several methods with several seeds, and report whether they differ (`compare --help`)

Name an experiment, then a method to lay over it; a flag overrides any setting of theirs:

  python -m lightning_znorm fit --config configs/digits/resnet20.yaml --config configs/methods/znorm.yaml
  python -m lightning_znorm fit --config configs/digits/resnet20.yaml --trainer.max_epochs 2

`fit --help` lists the flags, `fit ... --print_config` prints the resulting settings, `--version` the version.

These files come with the package, and a file of the same name on disk goes before them:

"""


def main(args: list[str] | None = None) -> None:
    """Run one command.

    Args:
        args: What is typed behind ``python -m lightning_znorm``. Default: what was typed.

    Raises:
        SystemExit: With one sentence on stderr, where the files, the settings or the data are wrong.

    Example:
        >>> main(["--version"])
        lightning-znorm 0.1.0
    """
    if args is None:
        args = sys.argv[1:]
        _prepare_streams(args)
    if args in ([], ["-h"], ["--help"]):
        print(_HELP + "\n".join(f"  {name}" for name in shipped_configs()))
    elif args == ["--version"]:
        print(f"lightning-znorm {__version__}")
    else:
        try:
            _run(args)
        except Exception as error:
            message = sentence(error)
            if message is None:
                raise
            sys.exit(f"error: {message}")


def _run(args: list[str]) -> None:
    options = _Options(prog="python -m lightning_znorm", add_help=False, allow_abbrev=False)
    options.usage = _HELP.splitlines()[0].removeprefix("usage: ")
    options.add_argument("-c", "--config", action="append", default=[])
    named, rest = options.parse_known_args(args)
    if problem := _no_command(rest, args):
        options.error(problem)
    if rest[0] == "compare":
        named_files = [*named.config, *rest[1:]]  # methods among them
        refuse_streams([name for name in named_files if is_stream(name)], "each run of a study reads its settings")
        from lightning_znorm.compare.command import main as compare

        if code := compare([*(arg for name in named.config for arg in ("--config", name)), *rest[1:]]):
            sys.exit(code)
        return
    streams = [name for name in named.config if is_stream(name)]
    if twice := next((name for name in streams if streams.count(name) > 1), None):
        raise ZNormValueError(f"{twice} is named twice: name it once.")
    check_streams(streams, started_processes(os.environ))
    files = [read_config(name) for name in named.config]
    check_order(files)

    from lightning_znorm.cli.run import RunCLI

    RunCLI(files, rest)


class _Options(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """End the program as jsonargparse does."""
        self.print_usage(sys.stderr)
        self.exit(2, f"error: {message}\n")


def _no_command(rest: list[str], args: list[str]) -> str | None:
    """Say that no command comes first among the arguments that name no config file, if so."""
    first = rest[0] if rest else ""
    if first in _COMMANDS:
        return None
    every = f"{', '.join(_COMMANDS[:-1])} or {_COMMANDS[-1]}"
    if first and not first.startswith("-"):
        nearest = difflib.get_close_matches(first.lower(), _COMMANDS, 1)
        advice = f"did you mean {nearest[0]}?" if nearest else f"it is {every}."
        return f"there is no command {first}: {advice}"
    later = [arg for arg in rest if arg in _COMMANDS]
    if len(later) == 1:
        return f"the command comes first: {later[0]} {shlex.join(arg for arg in args if arg != later[0])}"
    nearest = difflib.get_close_matches(first, ("--help", "--version"), 1)
    return f"there is no option {first}: did you mean {nearest[0]}?" if nearest else f"name a command first: {every}."


def _prepare_streams(args: list[str]) -> None:
    """See that no character of a progress bar or a name ends a command, whatever the encoding of the terminal."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # else somebody's own
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdout, io.TextIOWrapper) and any(arg.startswith("--print_config") for arg in args):
        sys.stdout.reconfigure(encoding="utf-8")  # a config file, as they are read
