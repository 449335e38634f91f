"""One method and one seed: whatever is left to do of it."""

import shlex
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass

from lightning_znorm.compare.locks import locked
from lightning_znorm.compare.process import Processes, tail
from lightning_znorm.compare.study import Run


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Args:
        run: The run.
        error: Why it failed, and the end of its log; empty if it did not.
        seconds: How long that took.
    """

    run: Run
    error: str = ""
    seconds: float = 0.0


def do_run(
    run: Run, monitored: bool, environment: Mapping[str, str] | None = None, processes: Processes | None = None
) -> Outcome:
    """Do what is left of a run: train it, from its last checkpoint if there is one, and test it.

    Doing it again does no harm, nor does doing it at the same time elsewhere: one waits for the other.

    Args:
        run: The run, whose folder holds its settings.
        monitored: Whether it has a best checkpoint to test, chosen by a metric; else the last one is tested.
        environment: Environment variables of its processes, laid over this one's.
        processes: Starts them.
    """
    start = time.monotonic()
    processes = processes or Processes()
    # Handed on, for the run's process may outlive a study that is killed: who comes next waits for its end.
    with locked(run.folder / "lock", wait=processes.pause) as lock:
        commands = (command_to_fit(run), command_to_test(run, monitored))
        for command, finished in zip(commands, (run.fit_file, run.test_file), strict=True):
            if finished.is_file():
                continue
            code = processes.run(command, run.log, environment, held=lock)
            if code or not finished.is_file():
                error = f"{command[0]} {_ended(code)}. The end of {run.log}:\n{tail(run.log)}"
                return Outcome(run, error, time.monotonic() - start)
    return Outcome(run, seconds=time.monotonic() - start)


def command_to_fit(run: Run) -> list[str]:
    """What trains the run, or goes on with it."""
    resume = ["--ckpt_path", str(run.last)] if run.last.exists() else []
    return ["fit", "--config", str(run.config), *resume]


def command_to_test(run: Run, monitored: bool) -> list[str]:
    """What tests the run: the same checkpoint whatever lies on disk, so that none is tested in place of another.

    Args:
        run: The run.
        monitored: Whether it has a best checkpoint to test, chosen by a metric; else the last one is tested.
    """
    return ["test", "--config", str(run.config), "--ckpt_path", str(run.tested(monitored))]


def shell_line(run: Run, monitored: bool) -> str:
    """What is left of the run, as one line for a shell."""
    commands = [] if run.fit_file.is_file() else [command_to_fit(run)]
    commands.append(command_to_test(run, monitored))
    return " && ".join(f"{shlex.quote(sys.executable)} -m lightning_znorm {shlex.join(args)}" for args in commands)


def _ended(code: int) -> str:
    if code >= 0:
        return f"ended with exit code {code}" if code else "ended before it was done"
    try:
        return f"was ended by {signal.Signals(-code).name}"
    except ValueError:
        return f"was ended by signal {-code}"
