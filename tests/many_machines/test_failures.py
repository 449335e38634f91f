"""A process dies or hangs in the middle of an epoch, and training is resumed."""

import csv
import os
import re
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.many_machines.documented import free_port, one_machine, timeout_flags, torchrun, witnessed
from tests.many_machines.programs import Programs
from tests.many_machines.records import WITNESS, check_hosts, check_same_weights, facts

pytestmark = pytest.mark.full

LOST = re.compile(r"RuntimeError: .*Connection (reset|closed) by peer")


def in_second_epoch(programs: Programs, folder: Path, rank: int) -> int:
    """Wait until a process is in the middle of the second epoch, and return its id."""
    deadline = time.monotonic() + 120
    while not (folder / f"{rank}-in-epoch-1").exists():
        if not programs.running or time.monotonic() > deadline:
            pytest.fail(f"process {rank} never came to the second epoch:\n{programs.end(timeout=1)}")
        time.sleep(0.02)
    return facts(folder, rank)["pid"]


def test_killed_and_resumed(tmp_path: Path, reference: Path) -> None:
    port = free_port()
    commands = [torchrun(node, "127.0.0.1", port, witnessed(tmp_path)) for node in range(2)]
    with Programs(commands, [WITNESS] * 2, tmp_path) as programs:
        os.kill(in_second_epoch(programs, tmp_path, rank=1), signal.SIGKILL)
        output = programs.end(timeout=60)  # both machines
    assert all(code not in (0, None) for code in programs.returncodes)
    assert LOST.search(output), output
    run = tmp_path / "logs/digits-resnet20/first"
    saved = torch.load(run / "checkpoints/last.ckpt", weights_only=True)
    assert saved["epoch"] == 0
    assert not (tmp_path / "0.pt").exists()

    with Programs(commands, [WITNESS] * 2, tmp_path) as programs:
        output = programs.end(timeout=120)
    assert programs.returncodes == [0, 0], output
    assert "Restored all states from the checkpoint" in output
    assert "All distributed processes registered. Starting with 2 processes" in output
    check_hosts(tmp_path, "TorchElasticEnvironment", "127.0.0.1")
    assert facts(tmp_path, 0)["epoch"] == facts(tmp_path, 1)["epoch"] == 1
    check_same_weights(tmp_path, reference)
    assert torch.load(run / "checkpoints/last.ckpt", weights_only=True)["global_step"] == 2 * saved["global_step"]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["best.ckpt", "last.ckpt"]
    # The document warns about this.
    with (run / "metrics.csv").open() as file:
        assert {row["epoch"] for row in csv.DictReader(file)} == {"1"}


@pytest.mark.parametrize("victim", [0, 1])
def test_killed_on_one_machine(tmp_path: Path, victim: int) -> None:
    """Lightning's own launcher runs in process 0."""
    with Programs([one_machine(witnessed(tmp_path))], [WITNESS], tmp_path) as programs:
        os.kill(in_second_epoch(programs, tmp_path, victim), signal.SIGKILL)
        output = programs.end(timeout=60)
    assert programs.returncodes == [-signal.SIGKILL if victim == 0 else 1]
    assert LOST.search(output), output
    assert not list(tmp_path.glob("*.pt"))


def test_hung(tmp_path: Path) -> None:
    port, flags = free_port(), [*timeout_flags("0:00:06"), *witnessed(tmp_path)]
    commands = [torchrun(node, "127.0.0.1", port, flags) for node in range(2)]
    with Programs(commands, [WITNESS] * 2, tmp_path) as programs:
        hung = in_second_epoch(programs, tmp_path, rank=1)
        os.kill(hung, signal.SIGSTOP)
        stopped = time.monotonic()
        assert programs.processes[0].wait(timeout=66) == 1
        assert time.monotonic() - stopped > 5
        assert programs.returncodes[1] is None  # its torchrun does not notice
        os.kill(hung, signal.SIGKILL)
        output = programs.end(timeout=60)
    assert re.search(r"RuntimeError: .*time(d ?)?out", output, flags=re.IGNORECASE), output
