"""Small files are whole or absent, and locks end with the processes that hold them."""

import errno
import os
import signal
import subprocess
import sys
import time

import pytest

from lightning_znorm.compare.files import InUseError, lock_holder, locked, read_json, write_json, write_text

HOLD = """
import pathlib, subprocess, sys, time
from lightning_znorm.compare.files import locked
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

    monkeypatch.setattr("lightning_znorm.compare.files._acquire", refuse)
    with pytest.raises(OSError, match="No locks available") as info, locked(tmp_path / "lock"):
        pass
    assert info.value.filename == str(tmp_path / "lock")


def test_who_holds_it(tmp_path):
    assert lock_holder(tmp_path / "lock") == "another process"
    with locked(tmp_path / "lock"):
        assert lock_holder(tmp_path / "lock").startswith(f"process {os.getpid()} on ")


def test_json_is_whole_or_absent(tmp_path):
    assert read_json(tmp_path / "x.json") is None
    write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"a": object()})
    assert read_json(tmp_path / "x.json") == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]


def test_file_that_does_not_fit(tmp_path):
    """The former one stays, nothing else does, and the error says which file it is."""
    resource = pytest.importorskip("resource", reason="needs limits of Unix")
    write_json(tmp_path / "x.json", {"a": 1})
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(OSError, match="File too large") as info:
            write_json(tmp_path / "x.json", "a" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert info.value.filename == str(tmp_path / "x.json")
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
    assert read_json(tmp_path / "x.json") == {"a": 1}


def test_names_that_are_no_text_can_be_written(tmp_path):
    write_text(tmp_path / "report.md", f"a {os.fsdecode(b'caf' + bytes([0xE9]))}")
    assert (tmp_path / "report.md").read_text() == "a caf\\udce9"
