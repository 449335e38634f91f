"""One run: fit, then test, in one process if possible. Damaged files are set aside, and what is done is kept."""

import json
import math
import shlex
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from lightning_znorm.compare.files import (
    DamagedError,
    InUseError,
    free_path,
    lock_holder,
    locked,
    reason_of,
    remove_leftovers,
    with_path,
)
from lightning_znorm.compare.formatting import clock
from lightning_znorm.compare.processes import Processes, TimedOut, tail
from lightning_znorm.compare.results import LOGGED_EPOCHS, check_log, read_fit, read_progress, read_run, read_test
from lightning_znorm.compare.study import Outcome, Run

_REASONS = {
    "SIGKILL": "as the system does when memory runs out",
    "SIGSEGV": "a crash in compiled code",
    "SIGABRT": "a crash in compiled code",
    "SIGILL": "by code that was compiled for another CPU",
    "SIGBUS": "as when a file that is mapped is cut short, or shared memory is full",
    "SIGTERM": "which somebody sent, such as a batch system at a time limit",
    "SIGXCPU": "at the limit of CPU time",
}
_TEST_LINE = b"$ python -m lightning_znorm test "
_FULL_DISK_BYTES = 2**20
"""A disk with less free space counts as full."""


def fit_and_test(
    run: Run, monitored: bool, environment: Mapping[str, str] | None = None, processes: Processes | None = None
) -> Outcome:
    """Train a run, from its last checkpoint if there is one, and test it. Skip what is done.

    It may be called again, and at the same time in another process: one waits for the other.

    Args:
        run: The run, whose folder holds its settings.
        monitored: Whether the best checkpoint is tested, chosen by a metric; else the last one.
        environment: Environment variables of its processes, in addition to this process's.
        processes: Starts the processes; by default, with the timeout of the run.
    """
    start = time.monotonic()
    processes = processes or Processes(run.timeout)
    notes: list[str] = []
    try:
        if run.config.is_file():
            # The run's process inherits the lock, because it may outlive a study that is killed: the next one waits.
            with locked(run.folder / "lock", wait=_lock_wait(run, processes)) as lock:
                notes += repair(run, monitored)
                error = _execute(run, monitored, environment, processes, lock)
        else:  # the study was deleted: do not create its folder again
            error = f"{run.config} is gone."
    except TimedOut as raised:
        error = str(raised)
    except OSError as raised:
        error = reason_of(with_path(raised, run.folder))
    return Outcome(run, error, time.monotonic() - start, tuple(notes))


def command_to_fit(run: Run) -> list[str]:
    """Return the command that trains the run, or resumes its training."""
    resume = ["--ckpt_path", str(run.last)] if run.last.exists() else []
    return ["fit", "--config", str(run.config), *resume]


def command_to_test(run: Run, monitored: bool) -> list[str]:
    """Return the command that tests the run.

    The checkpoint does not depend on the files that exist, so a missing one is never replaced by another.

    Args:
        run: The run.
        monitored: Whether the best checkpoint is tested, chosen by a metric; else the last one.
    """
    return ["test", "--config", str(run.config), "--ckpt_path", str(run.checkpoint_to_test(monitored))]


def shell_line(run: Run, monitored: bool) -> str:
    """Return the remaining commands of the run as one line for a shell."""
    commands = [] if run.fit_file.is_file() else [command_to_fit(run)]
    commands.append(command_to_test(run, monitored))
    return " && ".join(f"{shlex.quote(sys.executable)} -m lightning_znorm {shlex.join(args)}" for args in commands)


def repair(run: Run, monitored: bool, resumes: bool = True) -> list[str]:
    """Set aside the damaged files of a run, so that their part of the run is done again.

    Nothing is deleted: the files go to the folder ``damaged-1`` of the run, or the next number. The caller must hold
    the run's lock.

    Args:
        run: The run.
        monitored: Whether the run has a best checkpoint to test.
        resumes: Whether the run's training continues now, if it has not ended. Otherwise its log and checkpoints stay
            as they are: a command of a dry run may be at work on them, and such a command holds no lock.

    Returns:
        A sentence about each damaged file.
    """
    notes: list[str] = []
    # In this order: if this process dies in between, no checkpoint is left without a log.
    training = [run.last.parent, run.logs, run.fit_file, run.test_file, run.progress_file]

    def set_aside(error: DamagedError, paths: Iterable[Path], consequence: str) -> None:
        folder = _set_aside(run, paths)
        notes.append(f"{error} It is kept in {folder.name}, and {consequence}.")
        with run.log.open("a", encoding="utf-8") as log:
            log.write(f"# {notes[-1]}\n")

    remove_leftovers(run.folder)
    if error := _damage(lambda: read_progress(run)):
        set_aside(error, [run.progress_file], "nothing that was measured is lost")
    if error := _damage(lambda: read_test(run)):
        set_aside(error, [run.test_file], "the test is done again")
    has_ended = run.fit_file.exists()
    if (error := _damage(lambda: read_fit(run))) and run.last.exists():
        is_intact = _damage(lambda: _logged_epochs(run.last)) is None
        where = "at its end" if is_intact else "where it can be, because last.ckpt is damaged, too"
        set_aside(error, [run.fit_file, run.test_file], f"the training is resumed {where}")
    elif error:
        set_aside(error, training, "the run begins anew")
    error = None
    if run.fit_file.exists():
        error = _damage(lambda: read_run(run))
        checkpoint = run.checkpoint_to_test(monitored)
        if not run.test_file.exists() and checkpoint.exists():
            error = error or _damage(lambda: _logged_epochs(checkpoint))
    elif resumes:
        error = _damage(lambda: check_log(run, _logged_epochs(run.last)))
        if error and error.path == run.last and monitored and _can_resume_from_best(run, has_ended):
            set_aside(error, [run.last], "training resumes from best.ckpt")
            shutil.copyfile(run.best, _unfinished(run))
            _unfinished(run).replace(run.last)
            error = None
    if error:
        set_aside(error, training, "the run begins anew")
    return notes


def repair_if_idle(run: Run, monitored: bool, resumes: bool) -> list[str]:
    """Repair a run, as `repair` does, unless it has not begun or another process holds its lock."""
    if not run.folder.is_dir():
        return []
    try:
        with locked(run.folder / "lock"):
            return repair(run, monitored, resumes)
    except InUseError:
        return []
    except OSError:
        if run.is_done:  # a read-only folder does not hide its results
            return []
        raise


def describe_exit(code: int, expected: Path | None = None) -> str:
    """Say how a process ended that has not done its work.

    Args:
        code: Its exit code; negative after a signal.
        expected: The file that it should have written.
    """
    if not code:
        return f"ended before it was done, with exit code 0 and without {expected}"
    try:
        name = signal.Signals(-code if code < 0 else code - 128).name  # a shell around the process adds 128
    except ValueError:
        name = ""
    reason = f", {_REASONS[name]}" if name in _REASONS else ""
    if code < 0:
        return f"was ended by {name or f'signal {-code}'}{reason}"
    return f"ended with exit code {code}" + (f", which stands for {name}{reason}" if name else "")


def printed_since(log: Path, start: int) -> str:
    """Return the end of what a process printed.

    Args:
        log: Its log.
        start: Size of the log before the process started.
    """
    lines = tail(log, start=start).splitlines()
    return "\n".join(lines[1:] if lines and lines[0].startswith("$ python -m lightning_znorm ") else lines)


def _execute(run: Run, monitored: bool, environment: Mapping[str, str] | None, processes: Processes, lock: int) -> str:
    """Execute the remaining commands of a run; return why one failed."""
    from lightning_znorm.cli import THEN_TEST  # imported here, because `cli` imports `compare`

    if not run.fit_file.is_file():
        test = command_to_test(run, monitored)
        then = {THEN_TEST: json.dumps({"args": test, "once": str(run.fit_file)})}
        error = _run_command(run, command_to_fit(run), run.fit_file, {**(environment or {}), **then}, processes, lock)
        if error:
            return error
    # It trained in several processes, or only the test is missing.
    if not run.test_file.is_file():
        return _run_command(run, command_to_test(run, monitored), run.test_file, environment, processes, lock)
    return ""


def _run_command(
    run: Run,
    command: list[str],
    expected: Path,
    environment: Mapping[str, str] | None,
    processes: Processes,
    lock: int,
) -> str:
    """Run a command; return why it, or a test in the same process, failed."""
    name, start = command[0], run.log.stat().st_size if run.log.is_file() else 0
    try:
        code = processes.run(command, run.log, environment, lock=lock, milestone=run.fit_file)
        failure = describe_exit(code, expected) if code or not expected.is_file() else ""
    except TimedOut as error:
        failure = str(error)
    else:
        if failure:
            with suppress(OSError):  # it is useless, and on a full disk the results of other runs need its space
                _unfinished(run).unlink(missing_ok=True)
    if not failure:
        return ""
    if name == "fit" and (test := _start_of_test(run.log, start)):
        name, start = "test", test
    return f"{name} {failure}.{_details(run, start)}"


def _damage(read: Callable[[], object]) -> DamagedError | None:
    try:
        read()
    except DamagedError as error:
        return error
    return None


def _logged_epochs(checkpoint: Path) -> list[int]:
    """Return the epochs that a run had logged when it wrote a checkpoint; empty if there is no checkpoint.

    Raises:
        DamagedError: If the checkpoint is damaged.
    """
    if not checkpoint.exists():
        return []
    from lightning_znorm.compare.checkpoints import read_checkpoint

    states = read_checkpoint(checkpoint).get("callbacks", {})
    epochs: list[int] = states.get("Recorder", {}).get(LOGGED_EPOCHS, [])
    return epochs


def _can_resume_from_best(run: Run, has_ended: bool) -> bool:
    """Return whether the best checkpoint is intact, and the log of its epoch, which is completed a little later."""
    try:
        epochs = _logged_epochs(run.best)
        last = check_log(run, epochs)
    except DamagedError:
        return False
    return bool(epochs) and (has_ended or last > epochs[-1])


def _set_aside(run: Run, paths: Iterable[Path]) -> Path:
    folder = free_path(run.folder / "damaged")
    for path in paths:
        if path.exists():
            target = folder / path.relative_to(run.folder)
            target.parent.mkdir(parents=True, exist_ok=True)
            path.rename(target)
    return folder


def _unfinished(run: Run) -> Path:
    """Return the path at which `LastCheckpoint` writes the last checkpoint until it is complete."""
    return run.last.with_name(f".{run.last.name}.new")


def _lock_wait(run: Run, processes: Processes) -> Callable[[], None]:
    """Return a function that waits for a lock, no longer than a process may take."""
    end = time.monotonic() + (processes.timeout or math.inf)

    def wait() -> None:
        processes.pause()
        if time.monotonic() > end:
            limit = clock(processes.timeout or 0)
            holder = lock_holder(run.folder / "lock")
            raise TimedOut(f"{run.folder} was in use for {limit} (--timeout), by {holder}: see whether that hangs.")

    return wait


def _start_of_test(log: Path, start: int) -> int:
    """Return where in a log the test begins that a process has started after its training; 0 if it has not.

    Args:
        log: The log.
        start: Size of the log before the process started.
    """
    if not log.is_file():
        return 0
    with log.open("rb") as file:
        position = file.seek(start)
        for line in file:
            if line.startswith(_TEST_LINE):
                return position
            position += len(line)
    return 0


def _details(run: Run, start: int) -> str:
    """Return what is known about a process that failed: the end of what it printed, and whether the disk is full."""
    full = f" The disk of {run.folder} is full." if shutil.disk_usage(run.folder).free < _FULL_DISK_BYTES else ""
    text = printed_since(run.log, start)
    return f"{full} The end of {run.log}:\n{text}" if text else f"{full} It has printed nothing into {run.log}."
