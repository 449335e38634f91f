"""One method and one seed: whatever is left to do of it."""

import math
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from lightning_znorm.compare.files import DamagedError, named, numbered, remove_leftovers, said
from lightning_znorm.compare.locks import InUseError, holder, locked
from lightning_znorm.compare.numbers import clock
from lightning_znorm.compare.process import Processes, TimedOut, tail
from lightning_znorm.compare.results import LOGGED_EPOCHS, check_log, read_fit, read_progress, read_run, read_test
from lightning_znorm.compare.study import Run

_REASONS = {
    "SIGKILL": "as the system does when memory runs out",
    "SIGSEGV": "a crash in compiled code",
    "SIGABRT": "a crash in compiled code",
    "SIGILL": "by code that was compiled for another CPU",
    "SIGBUS": "as when a file that is mapped is cut short, or shared memory is full",
    "SIGTERM": "which somebody sent, such as a batch system at a time limit",
    "SIGXCPU": "at the limit of CPU time",
}
_SMALL = 2**20
"""Bytes, fewer of which mean that a disk is full."""


@dataclass(frozen=True)
class Outcome:
    """What became of a run.

    Args:
        run: The run.
        error: Why it failed, and the end of its log; empty if it did not.
        seconds: How long that took.
        notes: What was set aside before, a sentence each.
    """

    run: Run
    error: str = ""
    seconds: float = 0.0
    notes: tuple[str, ...] = ()


def do_run(
    run: Run, monitored: bool, environment: Mapping[str, str] | None = None, processes: Processes | None = None
) -> Outcome:
    """Do what is left of a run: train it, from its last checkpoint if there is one, and test it.

    Doing it again does no harm, nor does doing it at the same time elsewhere: one waits for the other.

    Args:
        run: The run, whose folder holds its settings.
        monitored: Whether it has a best checkpoint to test, chosen by a metric; else the last one is tested.
        environment: Environment variables of its processes, laid over this one's.
        processes: Starts them; by default, each may take as long as the run says.
    """
    start = time.monotonic()
    processes = processes or Processes(run.timeout)
    notes: list[str] = []
    try:
        if run.config.is_file():
            # Handed on, for the run's process may outlive a study that is killed: who comes next waits for its end.
            with locked(run.folder / "lock", wait=_patience(run, processes)) as lock:
                notes += mend(run, monitored)
                error = _do(run, monitored, environment, processes, lock)
        else:  # the study was deleted, and its folder is not to come up again
            error = f"{run.config} is gone."
    except TimedOut as raised:
        error = str(raised)
    except OSError as raised:
        error = said(named(raised, run.folder))
    return Outcome(run, error, time.monotonic() - start, tuple(notes))


def _do(run: Run, monitored: bool, environment: Mapping[str, str] | None, processes: Processes, lock: int) -> str:
    """Do what is left of a run; return why it failed."""
    commands = (command_to_fit(run), command_to_test(run, monitored))
    for command, finished in zip(commands, (run.fit_file, run.test_file), strict=True):
        if finished.is_file():
            continue
        before = run.log.stat().st_size if run.log.is_file() else 0
        try:
            code = processes.run(command, run.log, environment, held=lock)
        except TimedOut as error:
            return f"{command[0]} {error}.{_told(run, before)}"
        if code or not finished.is_file():
            with suppress(OSError):  # it is worth nothing, and on a full disk other runs' results need its room
                _unfinished(run).unlink(missing_ok=True)
            return f"{command[0]} {ended(code, finished)}.{_told(run, before)}"
    return ""


def mend(run: Run, monitored: bool, goes_on: bool = True) -> list[str]:
    """Set aside what cannot be read of a run, so that it is done again; return a sentence on each.

    Nothing is deleted: what is set aside is in the run's folder ``damaged-1``, or the next number. The run's lock must
    be held.

    Args:
        run: The run.
        monitored: Whether it has a best checkpoint to test.
        goes_on: Whether its training goes on now, if it has not ended. Else its log and checkpoints are left alone, for
            somebody may be at it who was told of it by a dry run, and holds no lock.
    """
    notes: list[str] = []
    # In this order, so that no checkpoint is gone on from without a log, if this dies halfway.
    training = [run.last.parent, run.logs, run.fit_file, run.test_file, run.progress_file]

    def set_aside(error: DamagedError, paths: Iterable[Path], consequence: str) -> None:
        kept = _set_aside(run, paths)
        notes.append(f"{error} It is kept in {kept.name}, and {consequence}.")
        with run.log.open("a", encoding="utf-8") as log:
            log.write(f"# {notes[-1]}\n")

    remove_leftovers(run.folder)
    if error := _damage(lambda: read_progress(run)):
        set_aside(error, [run.progress_file], "nothing that was measured is lost")
    if error := _damage(lambda: read_test(run)):
        set_aside(error, [run.test_file], "the test is done again")
    has_ended = run.fit_file.exists()
    if (error := _damage(lambda: read_fit(run))) and run.last.exists():
        is_sound = _damage(lambda: _epochs(run.last)) is None
        place = "at its end" if is_sound else "where it can be, for last.ckpt is damaged too"
        set_aside(error, [run.fit_file, run.test_file], f"the training is taken up {place}")
    elif error:
        set_aside(error, training, "the run begins anew")
    error = None
    if run.fit_file.exists():
        error = _damage(lambda: read_run(run))
        if not run.test_file.exists() and run.tested(monitored).exists():
            error = error or _damage(lambda: _epochs(run.tested(monitored)))
    elif goes_on:
        error = _damage(lambda: check_log(run, _epochs(run.last)))
        if error and error.path == run.last and monitored and _goes_on_from_best(run, has_ended):
            set_aside(error, [run.last], "training goes on from best.ckpt")
            shutil.copyfile(run.best, _unfinished(run))
            _unfinished(run).replace(run.last)
            error = None
    if error:
        set_aside(error, training, "the run begins anew")
    return notes


def mend_unused(run: Run, monitored: bool, goes_on: bool) -> list[str]:
    """Mend a run, as `mend` does, unless it has not begun or somebody holds its lock."""
    if not run.folder.is_dir():
        return []
    try:
        with locked(run.folder / "lock"):
            return mend(run, monitored, goes_on)
    except InUseError:
        return []
    except OSError:
        if run.is_done:  # a folder that this user may only read keeps nobody from its results
            return []
        raise


def _damage(read: Callable[[], object]) -> DamagedError | None:
    try:
        read()
    except DamagedError as error:
        return error
    return None


def _epochs(checkpoint: Path) -> list[int]:
    """Epochs whose end a run has logged before it wrote a checkpoint; none if that is not there.

    Raises:
        DamagedError: If it is not what was written.
    """
    if not checkpoint.exists():
        return []
    from lightning_znorm.compare.checkpoints import read_checkpoint

    states = read_checkpoint(checkpoint).get("callbacks", {})
    epochs: list[int] = states.get("Recorder", {}).get(LOGGED_EPOCHS, [])
    return epochs


def _goes_on_from_best(run: Run, has_ended: bool) -> bool:
    """Whether the best checkpoint is whole, and the log of its epoch too: that is complete some time after it."""
    try:
        epochs = _epochs(run.best)
        last = check_log(run, epochs)
    except DamagedError:
        return False
    return bool(epochs) and (has_ended or last > epochs[-1])


def _set_aside(run: Run, paths: Iterable[Path]) -> Path:
    folder = numbered(run.folder / "damaged")
    for path in paths:
        if path.exists():
            target = folder / path.relative_to(run.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
    return folder


def _unfinished(run: Run) -> Path:
    """Where `LastCheckpoint` writes the last checkpoint, until that is whole; it removes what is left there."""
    return run.last.with_name(f".{run.last.name}.new")


def _patience(run: Run, processes: Processes) -> Callable[[], None]:
    """Make what waits for a lock, for no longer than a process may take."""
    end = time.monotonic() + (processes.timeout or math.inf)

    def wait() -> None:
        processes.pause()
        if time.monotonic() > end:
            limit = clock(processes.timeout or 0)
            who = holder(run.folder / "lock")
            raise TimedOut(f"{run.folder} was in use for {limit} (--timeout), by {who}: see whether that hangs.")

    return wait


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


def ended(code: int, finished: Path | None = None) -> str:
    """How a process ended that has not done its work.

    Args:
        code: Its exit code; negative after a signal.
        finished: The file that it was to write.
    """
    if not code:
        return f"ended before it was done, with exit code 0 and without {finished}"
    try:
        name = signal.Signals(-code if code < 0 else code - 128).name  # a shell that it was started by adds 128
    except ValueError:
        name = ""
    reason = f", {_REASONS[name]}" if name in _REASONS else ""
    if code < 0:
        return f"was ended by {name or f'signal {-code}'}{reason}"
    return f"ended with exit code {code}" + (f", which stands for {name}{reason}" if name else "")


def printed(log: Path, before: int) -> str:
    """The end of what a process has printed.

    Args:
        log: Where to.
        before: Bytes that the log had before the process began.
    """
    lines = tail(log, start=before).splitlines()
    return "\n".join(lines[1:] if lines and lines[0].startswith("$ python -m lightning_znorm ") else lines)


def _told(run: Run, before: int) -> str:
    """What is known of a process that has failed: the end of what it printed, and whether the disk is full."""
    full = f" The disk of {run.folder} is full." if shutil.disk_usage(run.folder).free < _SMALL else ""
    text = printed(run.log, before)
    return f"{full} The end of {run.log}:\n{text}" if text else f"{full} It has printed nothing into {run.log}."
