"""The harness of tests of several processes: its results, and that it neither hangs nor leaves anything behind."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from multiprocessing import forkserver, get_start_method
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.utilities import rank_zero_only

from tests import distributed
from tests.distributed import ProcessesError, is_running, run_distributed

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="looks for processes in /proc")
SLEEP = 600.0


def rank() -> int:
    return int(os.environ["RANK"])


def answer(start: int) -> tuple[int, int]:
    time.sleep(0.2 if rank() == 0 else 0.0)  # rank 0 answers last
    return rank(), start + rank()


def surroundings() -> dict[str, Any]:
    names = ["RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "OMP_NUM_THREADS"]
    torch.distributed.init_process_group("gloo")
    ranks: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(ranks, rank())
    return {
        **{name: os.environ[name] for name in names},
        "elastic": torch.distributed.is_torchelastic_launched(),
        "gathered": ranks,
        "rank_zero_only": rank_zero_only.rank,
        "start method": get_start_method(),
        "folder": os.getcwd(),
        "files": os.listdir(),
    }


def leave_pids(folder: Path) -> None:
    """Start a process that outlives this one, and write both process ids into a file."""
    grandchild = subprocess.Popen(["sleep", str(SLEEP)])
    print(f"rank {rank()} has begun")
    (folder / f"{rank()}.new").write_text(f"{os.getpid()} {grandchild.pid}")
    (folder / f"{rank()}.new").rename(folder / f"{rank()}.pids")


def pass_by(folder: Path) -> str:
    leave_pids(folder)
    return "passed"


def begin(folder: Path) -> None:
    """Write process ids, and wait until both ranks have, because one of them may end right after this."""
    leave_pids(folder)
    sys.stdout.flush()
    while not all((folder / f"{number}.pids").exists() for number in range(2)):
        time.sleep(0.01)


def fail(folder: Path) -> None:
    begin(folder)
    if rank() == 1:
        raise ValueError("no luck")


def be_killed(folder: Path) -> None:
    begin(folder)
    if rank() == 1:
        os.kill(os.getpid(), signal.SIGKILL)


def hang(folder: Path) -> None:
    begin(folder)
    if rank() == 1:
        time.sleep(SLEEP)


def fail_or_hang(folder: Path) -> None:
    begin(folder)
    if rank() == 0:
        raise ValueError("no luck")
    time.sleep(SLEEP)


def return_nothing_to_pickle(folder: Path) -> Callable[[], None]:
    begin(folder)
    return (lambda: None) if rank() == 1 else leave_pids


def left(folder: Path) -> list[int]:
    """Return the processes that still run, long after a signal could have ended them."""
    pids = [int(pid) for path in folder.glob("*.pids") for pid in path.read_text().split()]
    assert len(pids) == 4
    end = time.monotonic() + 20
    while any(map(is_running, pids)) and time.monotonic() < end:
        time.sleep(0.05)
    return [pid for pid in pids if is_running(pid)]


def test_results_are_in_the_order_of_ranks() -> None:
    assert run_distributed(answer, 10) == [(0, 10), (1, 11)]
    assert run_distributed(answer, 5, processes=3) == [(0, 5), (1, 6), (2, 7)]


def test_surroundings_are_those_of_torchrun() -> None:
    results = run_distributed(surroundings)
    for number, result in enumerate(results):
        folder = result.pop("folder")
        assert not Path(folder).exists()
        assert folder != os.getcwd()
        assert result == {
            "RANK": str(number),
            "LOCAL_RANK": str(number),
            "WORLD_SIZE": "2",
            "LOCAL_WORLD_SIZE": "2",
            "GROUP_RANK": "0",
            "MASTER_ADDR": "127.0.0.1",
            "OMP_NUM_THREADS": "1",
            "elastic": True,
            "gathered": [0, 1],
            "rank_zero_only": number,
            "start method": get_start_method(),
            "files": [],
        }


def test_no_process_is_left_of_those_that_pass(tmp_path: Path) -> None:
    assert run_distributed(pass_by, tmp_path) == ["passed"] * 2
    assert left(tmp_path) == []


@pytest.mark.parametrize(
    ("function", "timeout", "expected"),
    [
        (fail, 60, ["rank 1 ended with exit code 1\n", "ValueError: no luck"]),
        (be_killed, 60, ["rank 1 was killed by signal 9\n"]),
        (hang, 5, ["rank 1 still ran after 5 s\n", "in hang"]),
        (fail_or_hang, 60, ["rank 0 ended with exit code 1; rank 1 still ran after 1 s more", "ValueError: no luck"]),
        (return_nothing_to_pickle, 60, ["rank 1 ended with exit code 1\n", "pickle"]),
    ],
)
def test_failure(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    function: Callable[[Path], Any],
    timeout: float,
    expected: list[str],
) -> None:
    monkeypatch.setattr(distributed, "GRACE", 1.0)
    # A wait for a process that sleeps would take longer than a test may take.
    with pytest.raises(ProcessesError) as caught:
        run_distributed(function, tmp_path, timeout=timeout)
    message = str(caught.value)
    assert message.startswith(f"{function.__name__}({tmp_path!r},): rank ")
    for text in (*expected, "--- rank 1\nrank 1 has begun\n"):
        assert text in message
    assert left(tmp_path) == []
    assert run_distributed(answer, 0) == [(0, 0), (1, 1)]


def test_failure_of_a_named_run() -> None:
    with pytest.raises(ProcessesError, match=r"^of a name: rank "):
        run_distributed(answer, "no number", name="of a name")


def test_function_that_cannot_be_imported_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys.modules[__name__], "found_here_alone", answer, raising=False)
    monkeypatch.setattr(answer, "__name__", "found_here_alone")
    monkeypatch.setattr(answer, "__qualname__", "found_here_alone")
    with pytest.raises(ProcessesError, match=r"AttributeError: .*found_here_alone"):
        run_distributed(answer, 1)


@pytest.mark.full
@pytest.mark.parametrize("name", ["SIGTERM", "SIGKILL"])
def test_no_process_outlives_that_of_the_tests(tmp_path: Path, name: str) -> None:
    """No process remains, although one of them hangs."""
    program = "\n".join(
        [
            "import sys",
            "from pathlib import Path",
            "from tests.distributed import run_distributed",
            "from tests.test_distributed import hang",
            "run_distributed(hang, Path(sys.argv[1]))",
        ]
    )
    environment = {**os.environ, "PYTHONPATH": str(distributed.ROOT)}
    process = subprocess.Popen([sys.executable, "-c", program, str(tmp_path)], env=environment)
    try:
        while len(list(tmp_path.glob("*.pids"))) < 2:
            assert process.poll() is None
            time.sleep(0.05)
        (server,) = (child for child in children(process.pid) if "forkserver" in command_of(child))
    finally:
        process.send_signal(getattr(signal, name))
        process.wait()
    # Nobody is left to kill the processes that they started themselves: this test does.
    ranks = [int(path.read_text().split()[0]) for path in tmp_path.glob("*.pids")]
    end = time.monotonic() + 20
    while any(map(is_running, [server, *ranks])) and time.monotonic() < end:
        time.sleep(0.05)
    try:
        assert not [pid for pid in [server, *ranks] if is_running(pid)]
    finally:
        for pid in (int(pid) for path in tmp_path.glob("*.pids") for pid in path.read_text().split()):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def command_of(pid: int) -> str:
    return Path(f"/proc/{pid}/cmdline").read_text()


@pytest.mark.full
def test_a_forkserver_that_was_killed_starts_again() -> None:
    run_distributed(answer, 1)
    pid = forkserver._forkserver._forkserver_pid
    os.kill(pid, signal.SIGKILL)
    while is_running(pid):
        time.sleep(0.01)
    assert run_distributed(answer, 1) == [(0, 1), (1, 2)]
    assert forkserver._forkserver._forkserver_pid != pid
