"""The command line: ``python -m lightning_znorm``.

It adapts `lightning.pytorch.cli.LightningCLI`, whose documentation says how to write YAML files and flags. The config
files in the package are found from any folder. Flags override files wherever they stand. Experiments are applied before
other files, files that would undo a method are refused, and mistakes get one sentence.

Torch is loaded only when a command runs, so that help and refusals come at once.
"""

import argparse
import difflib
import gc
import io
import json
import os
import shlex
import sys
from pathlib import Path
from typing import NoReturn

from lightning_znorm import __version__
from lightning_znorm.cli.config_files import (
    check_streams,
    describe_moves,
    in_order,
    is_stream,
    read_config,
    refuse_streams,
    shipped_configs,
)
from lightning_znorm.cli.error_sentences import sentence
from lightning_znorm.cli.launchers import is_first_process, started_processes
from lightning_znorm.errors import ZNormValueError

__all__ = ["main"]

THEN_TEST = "LIGHTNING_ZNORM_THEN_TEST"
"""Environment variable by which a study lets the process of `fit` test, too: JSON with the arguments of `test`, and the
file that exists once the training is complete."""

_COMMANDS = ("fit", "validate", "test", "predict", "compare")
_HELP = """\
usage: python -m lightning_znorm {fit,validate,test,predict,compare} [--config FILE ...] [--KEY VALUE ...]

  fit       train
  validate  evaluate on the validation set
  test      evaluate on the test set
  predict   save the predictions for the test set
  compare   run several methods with several seeds, and report whether they differ (`compare --help`)

Name an experiment and a method. The method changes the experiment, and flags override both:

  python -m lightning_znorm fit --config configs/digits/resnet20.yaml --config configs/methods/znorm.yaml
  python -m lightning_znorm fit --config configs/digits/resnet20.yaml --trainer.max_epochs 2

`fit --help` lists the flags, `fit ... --print_config` prints the resulting settings, `--version` the version.

These files come with the package; a file of the same name on disk is used in place of one:

"""


def main(args: list[str] | None = None) -> None:
    """Run one command.

    Args:
        args: The arguments of ``python -m lightning_znorm``. Default: those of this program.

    Raises:
        SystemExit: With one sentence on stderr, if the files, the settings or the data are wrong.

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
        except Exception as error:  # any, because `sentence` decides which of them need no traceback
            message = sentence(error)
            if message is None:
                raise
            sys.exit(f"error: {message}")


def _run(args: list[str]) -> None:
    # Not for the processes that Lightning may start.
    then_test = os.environ.pop(THEN_TEST, None)
    options = _Options(prog="python -m lightning_znorm", add_help=False, allow_abbrev=False)
    options.usage = _HELP.splitlines()[0].removeprefix("usage: ")
    options.add_argument("-c", "--config", action="append", default=[])
    named, remaining = options.parse_known_args(args)
    if problem := _no_command(remaining, args):
        options.error(problem)
    if remaining[0] == "compare":
        named_files = [*named.config, *remaining[1:]]  # methods are in the remaining arguments
        refuse_streams([name for name in named_files if is_stream(name)], "each run of a study reads its settings")
        from lightning_znorm.compare.command import main as compare

        if code := compare([*(arg for name in named.config for arg in ("--config", name)), *remaining[1:]]):
            sys.exit(code)
        return
    streams = [name for name in named.config if is_stream(name)]
    if twice := next((name for name in streams if streams.count(name) > 1), None):
        raise ZNormValueError(f"{twice} is named twice: name it once.")
    check_streams(streams, started_processes(os.environ))
    files = [read_config(name) for name in named.config]
    ordered = in_order(files)
    if (moves := describe_moves(files)) and is_first_process(os.environ):
        print(moves, file=sys.stderr)  # stdout may be a config file, with --print_config

    from lightning_znorm.cli.run import RunCLI

    world_size = RunCLI(ordered, remaining).trainer.world_size
    # After a training in several processes, the study starts others for the test.
    if then_test and world_size == 1:
        _test_as_well(**json.loads(then_test))


def _test_as_well(args: list[str], once: str) -> None:
    """Test in this process what it has trained.

    Args:
        args: Arguments of ``python -m lightning_znorm``.
        once: File that exists once the training is complete.
    """
    if not Path(once).is_file():
        return
    gc.collect()  # the model and the data of the training
    torch = sys.modules["torch"]
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    sys.stderr.flush()
    print(f"$ python -m lightning_znorm {' '.join(args)}", flush=True)
    sys.argv[1:] = args
    _run(args)


class _Options(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """End the program as jsonargparse does."""
        self.print_usage(sys.stderr)
        self.exit(2, f"error: {message}\n")


def _no_command(remaining: list[str], args: list[str]) -> str | None:
    """Return what is wrong with the command; None if one comes first among the arguments that name no config file."""
    first = remaining[0] if remaining else ""
    if first in _COMMANDS:
        return None
    every = f"{', '.join(_COMMANDS[:-1])} or {_COMMANDS[-1]}"
    if first and not first.startswith("-"):
        nearest = difflib.get_close_matches(first.lower(), _COMMANDS, 1)
        advice = f"did you mean {nearest[0]}?" if nearest else f"it is {every}."
        return f"there is no command {first}: {advice}"
    later = [arg for arg in remaining if arg in _COMMANDS]
    if len(later) == 1:
        return f"the command comes first: {later[0]} {shlex.join(arg for arg in args if arg != later[0])}"
    nearest = difflib.get_close_matches(first, ("--help", "--version"), 1)
    return f"there is no option {first}: did you mean {nearest[0]}?" if nearest else f"name a command first: {every}."


def _prepare_streams(args: list[str]) -> None:
    """Escape characters that the terminal's encoding lacks: a progress bar or a name must not end a command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a program may have replaced it
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdout, io.TextIOWrapper) and any(arg.startswith("--print_config") for arg in args):
        sys.stdout.reconfigure(encoding="utf-8")  # the encoding in which config files are read
