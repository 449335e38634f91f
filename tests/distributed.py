"""Run a function in several processes at once, with the environment that torchrun would give them.

A forkserver imports torch, Lightning and DeepSpeed once. Every process is forked from it, which takes milliseconds.
"""

import ctypes
import faulthandler
import os
import pickle
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from multiprocessing import forkserver, get_context, set_start_method
from multiprocessing.connection import wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import Any

import lightning_utilities.core.rank_zero
import torch
import torchmetrics.utilities.prints

ROOT = Path(__file__).parents[1]

# The forkserver imports these once. Under DeepSpeed, some of them would take seconds in every process.
PRELOADED = [
    "deepspeed.runtime.superoffload.superoffload_stage3",
    "deepspeed.runtime.zero.muon.original_muon",
    "lightning.pytorch",
    "lightning_znorm.data",
    "lightning_znorm.tasks",
    "pytest",
    "tests.strategies.training",
    "torch.distributed.algorithms.ddp_comm_hooks",
    "torch.distributed.checkpoint",
]

# Seconds that the others have after one process has failed: enough to fail for the same reason, and not to hang.
GRACE = 5.0


class ProcessesError(AssertionError):
    """Raised if processes fail, die or hang. The message names them, and ends with what they printed."""


def run_distributed(
    function: Callable[..., Any], *arguments: Any, processes: int = 2, timeout: float = 60.0, name: str | None = None
) -> list[Any]:
    """Call ``function(*arguments)`` in several processes at once, and return its results, in the order of ranks.

    Each process has the environment variables of torchrun, one thread and an empty working directory. When this
    function returns or raises, none of the processes is left, and none that they started.

    Args:
        function: A function at the top level of a module.
        *arguments: Arguments that can be pickled.
        processes: Number of processes.
        timeout: Number of seconds after which all processes are killed.
        name: The name of the run in errors. Default: the function's name and arguments.

    Raises:
        ProcessesError: if a process raises, dies or still runs after ``timeout`` seconds.
    """
    name = name or f"{function.__name__}{arguments}"
    folder = Path(tempfile.mkdtemp(prefix="processes-"))
    # The store lives in this process: its port is reserved from the start, and no rank can connect before it exists.
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    try:
        # As bytes: if the function cannot be imported, that fails in the process that saves its traceback.
        call = pickle.dumps((function, arguments))
        calls = [(rank, processes, store.port, folder, timeout, call) for rank in range(processes)]
        with _started(calls) as launched:
            problem = _join(launched, timeout, folder)
        if problem:
            raise ProcessesError(f"{name}: {problem}\n{_last_words(folder, processes)}")
        return [pickle.loads((folder / f"{rank}.pickle").read_bytes()) for rank in range(processes)]
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _started(calls: Sequence[tuple[Any, ...]]) -> Iterator[list[ForkServerProcess]]:
    """Start a process for each call of :func:`_work`, and kill them at the end."""
    _start_server()
    context = get_context("forkserver")
    launched: list[ForkServerProcess] = []
    try:
        for call in calls:
            process = context.Process(target=_work, args=call)
            process.start()
            launched.append(process)
        yield launched
    finally:
        for process in launched:
            _kill(process)


def _start_server() -> None:
    """Start the forkserver, unless it runs, with the environment that its processes need."""
    needed = {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "PYTHONPATH": str(ROOT)}
    before = {key: os.environ.get(key) for key in needed}
    os.environ.update(needed)
    try:
        forkserver.set_forkserver_preload(PRELOADED)
        forkserver.ensure_running()
    finally:
        for key, value in before.items():
            if value is None:
                del os.environ[key]
            else:
                os.environ[key] = value


def _join(launched: Sequence[ForkServerProcess], timeout: float, folder: Path) -> str:
    """Wait for processes, and return what went wrong, or an empty string."""
    end, problems = time.monotonic() + timeout, []
    pending = {process.sentinel: rank for rank, process in enumerate(launched)}
    while pending:
        ended = wait(list(pending), max(0.0, end - time.monotonic()))
        for sentinel in ended:
            rank = pending.pop(sentinel)
            launched[rank].join()
            code = launched[rank].exitcode
            if code:
                how = f"ended with exit code {code}" if code > 0 else f"was killed by signal {-code}"
                problems.append(f"rank {rank} {how}")
                end = min(end, time.monotonic() + GRACE)
        if not ended:
            late = sorted(pending.values())
            for rank in late:  # it then prints its stack, as do the processes that it forked
                with suppress(ProcessLookupError):
                    os.killpg(launched[rank].pid or 0, signal.SIGUSR1)
            time.sleep(0.2)
            after = f"{timeout:g} s" if not problems else f"{GRACE:g} s more"
            problems.append(f"rank {', '.join(map(str, late))} still ran after {after}")
            break
    return "; ".join(problems)


def _kill(process: ForkServerProcess) -> None:
    """Kill a process and its session. Processes of a compiler have other groups, but the same session."""
    for pid in _session(process.pid or 0):
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    if process.is_alive():  # it has not made its session yet
        process.kill()
    process.join()


def _session(leader: int) -> list[int]:
    """Return the processes of a session, the leader first."""
    found = [leader] if not Path("/proc").exists() else []
    for folder in Path("/proc").glob("[0-9]*"):
        with suppress(ProcessLookupError):
            if os.getsid(int(folder.name)) == leader:
                found.append(int(folder.name))
    return sorted(found)


def is_running(pid: int) -> bool:
    """Return whether the process exists and is not a zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


def _last_words(folder: Path, processes: int) -> str:
    logs = [(folder / f"{rank}.log") for rank in range(processes)]
    texts = [log.read_text(errors="replace")[-8000:] if log.exists() else "" for log in logs]
    return "\n".join(f"--- rank {rank}\n{text}" for rank, text in enumerate(texts) if text.strip())


def _work(rank: int, processes: int, port: int, folder: Path, timeout: float, call: bytes) -> None:
    """Call the pickled function as one rank, and write its result or its traceback into the folder."""
    os.setsid()
    # The forkserver ends when all copies of this end of a pipe are closed. The process of the tests closes its copy
    # when it ends; each process here has inherited a copy.
    with suppress(AttributeError, OSError, TypeError):
        os.close(forkserver._forkserver._forkserver_alive_fd)
    if sys.platform == "linux":  # this process then ends with the forkserver
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
    log = os.open(folder / f"{rank}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.register(signal.SIGUSR1, file=log, all_threads=True)
    # Also print the stack after the timeout, because the signal may kill this process: a Trainer of Lightning that ends
    # resets the signal handlers to those that Python knows.
    faulthandler.dump_traceback_later(timeout, file=log)
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "GROUP_RANK": "0",
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_RUN_ID": folder.name,
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    for rank_zero_only in (
        lightning_utilities.core.rank_zero.rank_zero_only,
        torchmetrics.utilities.prints.rank_zero_only,
    ):
        rank_zero_only.rank = rank  # Lightning has read it from the environment, in the forkserver
    own = folder / f"{rank}.folder"
    own.mkdir()
    os.chdir(own)
    set_start_method(None, force=True)  # workers of a DataLoader start as usual, and not from a forkserver
    code = 1
    try:
        function, arguments = pickle.loads(call)
        result = pickle.dumps(function(*arguments))
        (folder / f"{rank}.pickle").write_bytes(result)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        # Exit without cleanup: threads of a process group may wait for a rank that failed.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
