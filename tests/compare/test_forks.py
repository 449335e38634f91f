"""Processes that are copies of one that has the imports: they end, fail and are ended as new processes are."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
import torch
from alive import is_gone

from lightning_znorm.compare import processes as module
from lightning_znorm.compare.files import InUseError, locked
from lightning_znorm.compare.forks import CAN_FORK, ForkServer
from lightning_znorm.compare.processes import Processes, Stopped, TimedOut
from tests.processes import ROOT

pytestmark = pytest.mark.skipif(not CAN_FORK, reason="processes are not forked on this system")

# In place of the package: imports nothing, and runs the words that are its arguments.
PROGRAM = """
import json, os, signal, sys, time
print("imported", "torch" in sys.modules)
exec(sys.argv[1])
"""
FORKS = """
import os
from lightning_znorm.compare import forks
forks._import = lambda: {imports}
forks._COMMAND = "program"
forks._main()
"""


@pytest.fixture
def copies(tmp_path, monkeypatch):
    """Processes that are copies of one that imports nothing; they run Python code."""
    (tmp_path / "program.py").write_text(PROGRAM)
    started = []

    def make(imports: str = "True", timeout: float | None = None) -> Processes:
        server = tmp_path / "server.py"
        server.write_text(FORKS.format(imports=imports))
        popen = subprocess.Popen

        def start(words: list[str], **options):
            if words[1:3] == ["-m", "lightning_znorm.compare.forks"]:
                words = [words[0], str(server), *words[3:]]
            elif words[1:3] == ["-m", "lightning_znorm"]:
                words = [words[0], str(tmp_path / "program.py"), *words[3:]]
            started.append(popen(words, **options))
            return started[-1]

        monkeypatch.setattr(subprocess, "Popen", start)
        return Processes(timeout)

    make.started = started
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join((str(tmp_path), ROOT)))
    monkeypatch.syspath_prepend(str(tmp_path))
    return make


def test_output_arguments_and_variables(copies, tmp_path):
    processes = copies()
    with processes.forking():
        code = processes.run(
            ["print(os.environ['SHARE'], sys.argv[2:])", "a", "b"], tmp_path / "log", {"SHARE": "half"}
        )
        assert code == 0
        assert (tmp_path / "log").read_text().splitlines()[1:] == ["imported False", "half ['a', 'b']"]
        assert processes.capture(["print('é', file=sys.stderr); sys.exit(3)"]) == (3, "imported False\n", "é\n")
    assert len(copies.started) == 1
    assert is_gone(copies.started[0].pid)


@pytest.mark.parametrize(
    ("program", "code", "printed"),
    [
        ("sys.exit('a sentence')", 1, "a sentence"),
        ("raise KeyError('it broke')", 1, "KeyError: 'it broke'"),
        ("os.kill(os.getpid(), signal.SIGSEGV)", -signal.SIGSEGV, ""),
        ("os._exit(7)", 7, ""),
    ],
)
def test_ends(copies, tmp_path, program, code, printed):
    processes = copies()
    with processes.forking():
        assert processes.run([program], tmp_path / "log") == code
        assert printed in (tmp_path / "log").read_text()
        assert processes.run(["pass"], tmp_path / "log") == 0  # the others go on
    assert len(copies.started) == 1


def test_copies_share_nothing(copies):
    processes = copies()
    with processes.forking():
        processes.capture(["sys.argv.append('left'); os.environ['LEFT'] = '1'; sys.modules['left'] = sys"])
        code, out, _ = processes.capture(["print(sys.argv[2:], 'LEFT' in os.environ, 'left' in sys.modules)"])
    assert (code, out.splitlines()[1]) == (0, "[] False False")


@pytest.mark.parametrize("imports", ["False", "os._exit(1)", "1 / 0"])
def test_where_there_are_no_copies(copies, tmp_path, imports):
    """Such as after an import that starts CUDA or threads: each command has a process of its own."""
    processes = copies(imports)
    with processes.forking():
        for _ in range(2):
            assert processes.run(["print('here')"], tmp_path / "log") == 0
    assert (tmp_path / "log").read_text().count("here\n") == 2
    assert len(copies.started) == 3


def test_after_gpus_were_counted(copies, tmp_path):
    """CUDA does not start in a copy of a process that has counted GPUs, so the copy begins anew."""
    processes = copies("__import__('torch')._C._cuda_getDeviceCount() >= 0")
    with processes.forking(), locked(tmp_path / "lock") as lock:
        open_files = "{os.path.realpath(f'/proc/self/fd/{file}') for file in os.listdir('/proc/self/fd')}"
        holds_lock = f"{str(tmp_path / 'lock')!r} in {open_files}"
        program = f"import torch; print(torch.cuda._is_in_bad_fork(), {holds_lock}); sys.exit(4)"
        code = processes.run([program], tmp_path / "log", lock=lock)
    assert (tmp_path / "log").read_text().splitlines()[1:] == ["imported False", "False True"]
    assert code == 4
    assert len(copies.started) == 1


@pytest.mark.parametrize("pretends", [False, True])
def test_gradients_before_a_copy(copies, pretends):
    """Autograd starts a thread for each GPU that it sees, and does not work in copies after that."""
    lines = [
        "import torch",
        "from torch._subclasses.fake_tensor import FakeTensorMode",
        "from lightning_znorm.compare.forks import autograd_works_in_copies",
        *["with FakeTensorMode(): pass  # there is a GPU from here on" for _ in range(pretends)],
        "torch.ones((), requires_grad=True).backward()",
    ]
    Path("imported.py").write_text("\n".join(lines))
    processes = copies("__import__('imported').autograd_works_in_copies()")
    with processes.forking():
        code, printed, errors = processes.capture(["import torch; torch.ones((), requires_grad=True).backward()"])
    assert (code, errors) == (0, "")
    starts_anew = pretends or torch.cuda.is_available()
    assert printed == f"imported {not starts_anew}\n"
    assert len(copies.started) == 1 + starts_anew


def test_fork_that_fails(copies, tmp_path):
    """Such as with too many processes: the command has a process of its own, and the server lives."""
    processes = copies("setattr(os, 'fork', lambda: os.open('/nowhere/at/all', 0)) is None")
    with processes.forking():
        for _ in range(2):
            assert processes.run(["print('here')"], tmp_path / "log") == 0
    assert (tmp_path / "log").read_text().count("here\n") == 2


def test_server_that_is_killed(copies, tmp_path):
    """The next command has a process of its own."""
    processes = copies()
    with processes.forking():
        assert processes.run(["pass"], tmp_path / "log") == 0
        copies.started[0].kill()
        assert processes.run(["print('here')"], tmp_path / "log") == 0
    assert "here" in (tmp_path / "log").read_text()


def test_timeout(copies, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_SECONDS_TO_END", 1)
    processes = copies(timeout=1.5)
    program = "signal.signal(signal.SIGTERM, signal.SIG_IGN); print(os.getpid(), flush=True); time.sleep(60)"
    with processes.forking(), pytest.raises(TimedOut, match="was ended after 0:00:0"):
        processes.run([program], tmp_path / "log")
    assert is_gone(int((tmp_path / "log").read_text().split()[-1]))


def test_timeout_of_the_imports(copies, tmp_path):
    processes = copies("__import__('time').sleep(60)", timeout=0.5)
    with processes.forking(), pytest.raises(TimedOut, match="was ended after 0:00:0"):
        processes.run(["print('here')"], tmp_path / "log")
    assert is_gone(copies.started[0].pid)
    assert (tmp_path / "log").read_text().count("here") == 1  # in the command


@pytest.mark.parametrize("imports", ["True", "__import__('time').sleep(60)"])
def test_stop(copies, tmp_path, imports):
    processes = copies(imports)

    def work(number: int) -> int:
        if number == 0:
            end = time.monotonic() + (60 if imports == "True" else 0.5)
            while (tmp_path / "log").read_text().count("here") < 2 and time.monotonic() < end:
                time.sleep(0.05)
            raise KeyboardInterrupt
        program = "print(os.getpid(), 'here', flush=True); time.sleep(60)"
        return processes.run([program], tmp_path / "log")

    (tmp_path / "log").touch()
    with processes.forking(), pytest.raises(KeyboardInterrupt):
        processes.map(work, [0, 1], 2)
    if imports == "True":
        assert is_gone(int((tmp_path / "log").read_text().split()[-2]))
    with pytest.raises(Stopped):
        processes.run(["pass"], tmp_path / "log")


def test_what_a_copy_started_ends_with_it(copies, tmp_path):
    processes = copies()
    program = "import subprocess; print(subprocess.Popen(['sleep', '60'], start_new_session=True).pid)"
    with processes.forking():
        assert (
            processes.run(
                [f"{program}; sys.stdout.flush(); time.sleep(0.3); os.kill(os.getpid(), 9)"], tmp_path / "log"
            )
            == -9
        )
        group = program.replace(", start_new_session=True", "")
        assert processes.run([group], tmp_path / "log2") == 0
    assert is_gone(int((tmp_path / "log2").read_text().split()[-1]))
    psutil.Process(int((tmp_path / "log").read_text().split()[-1])).kill()


def test_study_that_is_killed(copies, tmp_path):
    """Its processes go on, hold their lock and can print; the process that they are copies of ends."""
    server = tmp_path / "server.py"
    server.write_text(FORKS.format(imports="True"))
    program = f"""
import os, subprocess
from pathlib import Path
from lightning_znorm.compare.files import locked
from lightning_znorm.compare.forks import ForkServer

popen = subprocess.Popen
subprocess.Popen = lambda words, **options: popen([words[0], {str(server)!r}, *words[3:]], **options)
server = ForkServer(os.environ)
with locked(Path("lock")) as lock, open("log", "wb") as log:
    code = "print('here', flush=True); time.sleep(2); print('later')"
    copy = server.start([code], os.environ, {{"stdout": log, "stderr": log, "pass_fds": (lock,)}}, 60)
    print(copy.pid, server._process.pid, flush=True)
    os.kill(os.getpid(), 9)
"""
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ended.returncode == -9, ended.stderr
    pid, server_pid = map(int, ended.stdout.split())
    assert is_gone(server_pid)
    with pytest.raises(InUseError), locked(tmp_path / "lock"):
        pass
    assert is_gone(pid)
    assert (tmp_path / "log").read_text().splitlines()[-1] == "later"
    with locked(tmp_path / "lock"):
        pass


@pytest.mark.full
def test_real_imports(tmp_path):
    """A copy has the imports, one thread, and as many threads to compute with as its variables say."""
    server = ForkServer({**os.environ, "OMP_NUM_THREADS": "1"})
    try:
        for threads in ("1", "2"):
            environment = {**os.environ, "OMP_NUM_THREADS": threads}
            options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
            copy = server.start(["--version"], environment, options, 200)
            assert copy is not None
            out, err = copy.communicate(60)
            assert (copy.wait(), err) == (0, b"")
            assert out.startswith(b"lightning-znorm ")
            copy.close_outputs()
    finally:
        server.close()
