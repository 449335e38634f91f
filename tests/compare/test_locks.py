"""Locks end with the processes that hold them."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from lightning_znorm.compare.locks import InUseError, holder, locked

HOLD = """
import pathlib, subprocess, sys, time
from lightning_znorm.compare.locks import locked
with locked(pathlib.Path({path!r})) as lock:
    if {child}:
        subprocess.Popen([sys.executable, "-c", "import time; time.sleep({child})"], pass_fds=[lock])
    print("held", flush=True)
    time.sleep(60)
"""


def hold(path, child: float = 0) -> subprocess.Popen:
    program = HOLD.format(path=str(path), child=child)
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_held_by_another_process(tmp_path):
    process = hold(tmp_path / "lock")
    try:
        with pytest.raises(InUseError, match=f"process {process.pid} on "), locked(tmp_path / "lock"):
            pass
    finally:
        process.kill()
        process.communicate()


def test_a_crash_does_not_block(tmp_path):
    process = hold(tmp_path / "lock")
    with pytest.raises(InUseError), locked(tmp_path / "lock"):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    with locked(tmp_path / "lock"):
        pass


@pytest.mark.full
def test_a_child_goes_on_holding(tmp_path):
    process = hold(tmp_path / "lock", child=2)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    with pytest.raises(InUseError), locked(tmp_path / "lock"):
        pass
    waits = []
    with locked(tmp_path / "lock", wait=lambda: waits.append(time.sleep(0.1))):  # until the child ends
        assert waits
    process.communicate()


def test_again_and_again(tmp_path):
    path = tmp_path / "folder" / "lock"
    for _ in range(2):
        with locked(path), pytest.raises(InUseError), locked(path):
            pass


def test_file_system_without_locks(tmp_path, monkeypatch):
    """The system does not say of which file it speaks."""

    def refuse(descriptor: int) -> bool:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("lightning_znorm.compare.locks._acquire", refuse)
    with pytest.raises(OSError, match="No locks available") as info, locked(tmp_path / "lock"):
        pass
    assert info.value.filename == str(tmp_path / "lock")


def test_who_holds_it(tmp_path):
    assert holder(tmp_path / "lock") == "another process"
    with locked(tmp_path / "lock"):
        assert holder(tmp_path / "lock").startswith(f"process {os.getpid()} on ")
