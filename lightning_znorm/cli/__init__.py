"""The command line: ``lightning-znorm``, or ``python -m lightning_znorm``.

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
from collections.abc import Iterator
from contextlib import contextmanager
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
)
from lightning_znorm.cli.error_sentences import sentence
from lightning_znorm.cli.help import COMMANDS, SHELLS, overview, page, usage
from lightning_znorm.cli.launchers import is_first_process, started_processes
from lightning_znorm.cli.program import MODULE, SCRIPT, program
from lightning_znorm.errors import ZNormValueError
from lightning_znorm.requirements import COMMAND, STUDY, require

__all__ = ["main"]

THEN_TEST = "LIGHTNING_ZNORM_THEN_TEST"
"""Environment variable by which a study lets the process of `fit` test, too: JSON with the arguments of `test`, and the
file that exists once the training is complete."""

_COMPLETION = "--print_completion"


def main(args: list[str] | None = None) -> None:
    """Run one command.

    Args:
        args: The arguments of ``lightning-znorm``. Default: those of this program.

    Raises:
        SystemExit: With one sentence on stderr, if the files, the settings or the data are wrong.

    Example:
        >>> main(["--version"])
        lightning-znorm 0.1.0
    """
    is_program = args is None
    if args is None:
        args = sys.argv[1:]
        _prepare_streams(args)
        _find_modules_here()
    if args in ([], ["-h"], ["--help"]):
        _print(overview(program()))
    elif args == ["--version"]:
        _print(f"lightning-znorm {__version__}")
    else:
        try:
            if args[0].partition("=")[0] == _COMPLETION:
                _print_completion(args)
            else:
                _run(args, is_program)
        except Exception as error:  # any, because `sentence` decides which of them need no traceback
            message = sentence(error)
            if message is None:
                raise
            sys.exit(f"error: {message}")


def _run(args: list[str], is_program: bool) -> None:
    # Not for the processes that Lightning may start.
    then_test = os.environ.pop(THEN_TEST, None)
    options = _Options(prog=program(), usage=usage(program()), add_help=False, allow_abbrev=False)
    options.add_argument("-c", "--config", action="append", default=[])
    named, remaining = options.parse_known_args(args)
    if problem := _no_command(remaining, args):
        options.error(problem)
    if remaining[0] == "compare":
        named_files = [*named.config, *remaining[1:]]  # methods are in the remaining arguments
        refuse_streams([name for name in named_files if is_stream(name)], "each run of a study reads its settings")
        require("compare", *STUDY)
        from lightning_znorm.compare.command import main as compare

        if code := compare([*(arg for name in named.config for arg in ("--config", name)), *remaining[1:]], program()):
            sys.exit(code)
        return
    streams = [name for name in named.config if is_stream(name)]
    if twice := next((name for name in streams if streams.count(name) > 1), None):
        raise ZNormValueError(f"{twice} is named twice: name it once.")
    check_streams(streams, started_processes(os.environ))
    files = [read_config(name) for name in named.config]
    ordered = in_order(files)
    if {"-h", "--help"} & {*remaining[1:]}:
        _print(page(remaining[0], program(), ordered))
        sys.exit(0)
    if (moves := describe_moves(files)) and is_first_process(os.environ):
        print(moves, file=sys.stderr)  # stdout may be a config file, with --print_config

    require(remaining[0], *COMMAND)
    with _no_collections(is_program):
        from lightning_znorm.cli.run import RunCLI

    world_size = RunCLI(ordered, remaining).trainer.world_size
    # After a training in several processes, the study starts others for the test.
    if then_test and world_size == 1:
        _test_as_well(**json.loads(then_test))


def _print_completion(args: list[str]) -> None:
    """Print the script that completes commands in a shell.

    Args:
        args: The arguments of the program: the option, and the name of the shell.

    Raises:
        ValueError: If they name no shell.
        ImportError: If shtab is not installed.
    """
    shell = " ".join(args).replace("=", " ", 1).partition(" ")[2]
    if shell not in SHELLS:
        raise ZNormValueError(f"{_COMPLETION} takes the name of a shell: {', '.join(SHELLS[:-1])} or {SHELLS[-1]}.")
    require(_COMPLETION, "shtab", *COMMAND)
    from lightning_znorm.cli.completion import print_script

    print_script(shell)


@contextmanager
def _no_collections(is_program: bool) -> Iterator[None]:
    """Import without garbage collections: PyTorch and Lightning make very many objects, and nearly all of them stay.

    Args:
        is_program: Whether this is the whole program. Then later collections do not look at these objects either.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if is_program:
            gc.freeze()
        if collects:
            gc.enable()


def _test_as_well(args: list[str], once: str) -> None:
    """Test in this process what it has trained.

    Args:
        args: Arguments of ``lightning-znorm``.
        once: File that exists once the training is complete.
    """
    if not Path(once).is_file():
        return
    gc.collect()  # the model and the data of the training
    torch = sys.modules["torch"]
    if torch.cuda.is_initialized():
        torch.cuda.empty_cache()
    sys.stderr.flush()
    print(f"$ {MODULE} {' '.join(args)}", flush=True)  # the log of a study has this line in front of each command
    sys.argv[1:] = args
    _run(args, is_program=False)


class _Options(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        """End the program as jsonargparse does."""
        self.print_usage(sys.stderr)
        self.exit(2, f"error: {message}\n")


def _no_command(remaining: list[str], args: list[str]) -> str | None:
    """Return what is wrong with the command; None if one comes first among the arguments that name no config file."""
    first = remaining[0] if remaining else ""
    if first in COMMANDS:
        return None
    *others, last = COMMANDS
    every = f"{', '.join(others)} or {last}"
    if first and not first.startswith("-"):
        nearest = difflib.get_close_matches(first.lower(), COMMANDS, 1)
        advice = f"did you mean {nearest[0]}?" if nearest else f"it is {every}."
        return f"there is no command {first}: {advice}"
    later = [arg for arg in remaining if arg in COMMANDS]
    if len(later) == 1:
        return f"the command comes first: {later[0]} {shlex.join(arg for arg in args if arg != later[0])}"
    nearest = difflib.get_close_matches(first, ("--help", "--version", _COMPLETION), 1)
    return f"there is no option {first}: did you mean {nearest[0]}?" if nearest else f"name a command first: {every}."


def _prepare_streams(args: list[str]) -> None:
    """Escape characters that the terminal's encoding lacks: a progress bar or a name must not end a command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a program may have replaced it
            stream.reconfigure(errors="backslashreplace")
    if isinstance(sys.stdout, io.TextIOWrapper) and any(arg.startswith("--print_config") for arg in args):
        sys.stdout.reconfigure(encoding="utf-8")  # the encoding in which config files are read


def _print(text: str) -> None:
    """Print a text of which the user may read the beginning alone: ``lightning-znorm --help | head``."""
    try:
        print(text, flush=True)
    except BrokenPipeError:
        # Else Python would write the rest when it ends, and fail again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _find_modules_here() -> None:
    """Let the console script find modules in the current folder, as ``python -m`` does, for settings name them."""
    if program() == SCRIPT and not getattr(sys.flags, "safe_path", False):  # a flag of Python 3.11 and later
        sys.path.insert(0, os.getcwd())
