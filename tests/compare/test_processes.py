"""Processes of a study: what they hold, what they print, and that they end with it."""

import io
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from alive import is_alive, is_gone
from samples import write_answers

from lightning_znorm import compare
from lightning_znorm.compare import processes
from lightning_znorm.compare.command import main
from lightning_znorm.compare.engines import local_engine
from lightning_znorm.compare.files import locked, write_json
from lightning_znorm.compare.processes import Processes, Stopped, interruptible, tail
from lightning_znorm.compare.runner import command_to_fit, command_to_test, fit_and_test, shell_line
from lightning_znorm.compare.study import Run, StudyError
from tests.processes import ROOT

PYTHON = sys.executable

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the stand-in for Python is a shell script")


@pytest.fixture(autouse=True)
def _signals_of_a_terminal() -> Iterator[None]:
    """Handle signals as a command that is typed does: under nohup, or behind a shell's ``&``, some are ignored."""
    typed = {"SIGTERM": signal.SIG_DFL, "SIGHUP": signal.SIG_DFL, "SIGQUIT": signal.SIG_DFL}
    typed["SIGINT"] = signal.default_int_handler
    numbers = {getattr(signal, name): handler for name, handler in typed.items() if hasattr(signal, name)}
    before = {number: signal.signal(number, handler) for number, handler in numbers.items()}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Makes a shell script that is started in place of Python."""

    def make(script: str) -> None:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))
        monkeypatch.setattr(processes, "CAN_FORK", False)  # test_forks.py is about copies of a process

    return make


def run_in(folder: Path, name: str = "run", seed: int = 0) -> Run:
    run = Run("znorm", seed, folder / name)
    run.folder.mkdir()
    run.config.touch()
    return run


@contextmanager
def sending(path: Path, *numbers: int) -> Iterator[None]:
    """Send signals to this process once a file is there."""

    def send() -> None:
        wait_for(path)
        for number in numbers:
            os.kill(os.getpid(), number)
            time.sleep(0.01)

    thread = threading.Thread(target=send)
    thread.start()
    yield
    thread.join()


def wait_for(path: Path) -> str:
    end = time.monotonic() + 60
    while time.monotonic() < end:
        if path.exists() and path.read_text().endswith("\n"):
            return path.read_text()
        time.sleep(0.01)
    pytest.fail(f"no {path}")


def test_what_is_left_is_done(stand_in, tmp_path):
    run = run_in(tmp_path)
    write_answers(tmp_path)
    stand_in(f'echo "$@" >> {tmp_path}/commands; cp {tmp_path}/$3.json {run.folder}')
    assert fit_and_test(run, True).error == ""
    assert run.is_done
    commands = [f"-m lightning_znorm {' '.join(args)}\n" for args in (command_to_fit(run), command_to_test(run, True))]
    assert (tmp_path / "commands").read_text() == "".join(commands)
    assert fit_and_test(run, True).error == ""  # again: nothing
    run.test_file.unlink()
    assert fit_and_test(run, True).error == ""
    assert (tmp_path / "commands").read_text() == "".join([*commands, commands[1]])


def test_commands(tmp_path):
    run = run_in(tmp_path)
    assert command_to_fit(run) == ["fit", "--config", str(run.config)]
    assert command_to_test(run, False)[-1] == str(run.last)
    assert command_to_test(run, True)[-1] == str(run.best)  # which is not there yet
    run.last.parent.mkdir()
    run.last.touch()
    run.best.touch()
    assert command_to_fit(run)[-2:] == ["--ckpt_path", str(run.last)]
    assert command_to_test(run, False)[-1] == str(run.last)
    assert command_to_test(run, True)[-1] == str(run.best)
    assert " && " in shell_line(run, True)
    write_json(run.fit_file, {})
    assert " fit " not in shell_line(run, True)
    assert shell_line(run, False).endswith("last.ckpt")


@pytest.mark.parametrize(
    ("script", "words"),
    [
        ("echo first; echo last; exit 3", "fit ended with exit code 3. The end of"),
        ("kill -9 $$", "fit was ended by SIGKILL, as the system does when memory runs out."),
        ("kill -11 $$", "fit was ended by SIGSEGV, a crash in compiled code."),
        (
            "kill -7 $$",
            "fit was ended by SIGBUS, as when a file that is mapped is cut short, or shared memory is full.",
        ),
        ("kill -15 $$", "fit was ended by SIGTERM, which somebody sent, such as a batch system at a time limit."),
        ("kill -10 $$", "fit was ended by SIGUSR1."),
        ("kill -40 $$", "fit was ended by signal 40."),
        (
            "exit 137",
            "fit ended with exit code 137, which stands for SIGKILL, as the system does when memory runs out.",
        ),
        ("exit 255", "fit ended with exit code 255."),
        ("exit 0", "fit ended before it was done, with exit code 0 and without "),
    ],
)
def test_failure(stand_in, tmp_path, script, words):
    stand_in(script)
    run = run_in(tmp_path)
    run.log.write_text("of an earlier try\n")
    error = fit_and_test(run, True).error
    assert error.startswith(words)
    if "last" in script:
        assert error.endswith(f"{run.log}:\nfirst\nlast")
    else:
        assert error.endswith(f" It has printed nothing into {run.log}.")
    if script == "exit 0":
        assert f"without {run.fit_file}." in error


def test_disk_that_is_full_is_named(stand_in, tmp_path, monkeypatch):
    """A process that finds it full cannot write down why it failed."""
    stand_in("exit 1")
    run = run_in(tmp_path)
    monkeypatch.setattr("shutil.disk_usage", lambda path: SimpleNamespace(free=4096))
    assert fit_and_test(run, True).error.startswith(f"fit ended with exit code 1. The disk of {run.folder} is full.")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
def test_log_that_cannot_be_written(stand_in, tmp_path):
    stand_in("exit 1")
    run = run_in(tmp_path)
    run.log.symlink_to("/dev/full")
    assert fit_and_test(run, True).error == f"{run.log}: No space left on device"


def test_nothing_of_a_run_lives_on(stand_in, tmp_path):
    """Of a run on several devices, others may wait forever for the one that died, on GPUs that the next run gets."""
    stand_in(f"sleep 600 & echo $! > {tmp_path}/pid; kill -9 $$")
    assert fit_and_test(run_in(tmp_path), True).error.startswith("fit was ended by SIGKILL")
    assert is_gone(int((tmp_path / "pid").read_text()))


class TestChildrenOfChildren:
    """They end wherever they are: in the group of the process, outside of it, and on systems without groups."""

    @pytest.fixture(autouse=True)
    def _soon(self, monkeypatch):
        monkeypatch.setattr("lightning_znorm.compare.processes._SECONDS_TO_END", 1)

    @pytest.mark.skipif(shutil.which("setsid") is None, reason="needs the command setsid")
    @pytest.mark.parametrize("ignores", ["", "trap '' TERM; "])
    def test_that_have_left_the_group(self, stand_in, tmp_path, ignores):
        inner = f"{ignores}sleep 600 & echo $! $$ > {tmp_path}/inner; wait; wait; sleep 600"
        stand_in(f'setsid sh -c "{inner.replace("$", chr(92) + "$")}" & echo $$ > {tmp_path}/pid; wait')
        assert fit_and_test(replace(run_in(tmp_path), timeout=1.5), True).error.startswith("fit was ended after")
        pids = [int(pid) for name in ("pid", "inner") for pid in (tmp_path / name).read_text().split()]
        assert len(pids) == 3
        assert all(map(is_gone, pids))

    def test_without_groups(self, stand_in, tmp_path, monkeypatch):
        monkeypatch.setattr("lightning_znorm.compare.processes._HAS_GROUPS", False)
        stand_in(f"(sleep 600 & echo $! >> {tmp_path}/pids; wait) & echo $! $$ >> {tmp_path}/pids; wait")
        assert fit_and_test(replace(run_in(tmp_path), timeout=1.5), True).error.startswith("fit was ended after")
        pids = [int(pid) for pid in (tmp_path / "pids").read_text().split()]
        assert len(pids) == 3
        assert all(map(is_gone, pids))

    def test_without_groups_whose_parent_has_ended(self, monkeypatch):
        """On Windows they keep its id; a process that is older than the parent has got the id from another one."""
        monkeypatch.setattr(processes, "_HAS_GROUPS", False)
        root = subprocess.Popen(["true"])
        tree = processes._Tree(root)
        root.wait()
        child, stranger = (subprocess.Popen(["sleep", "600"]) for _ in range(2))
        try:
            listed = [psutil.Process(child.pid), psutil.Process(stranger.pid)]
            for process, started in zip(listed, (time.time(), 0.0), strict=True):
                process.info = {"ppid": root.pid, "create_time": started}
            monkeypatch.setattr(psutil, "process_iter", lambda attributes: listed)
            tree.send_signal(signal.SIGKILL)
            assert child.wait(10) == -signal.SIGKILL
            assert stranger.poll() is None
        finally:
            for process in (child, stranger):
                process.kill()
                process.wait()


@pytest.mark.full
def test_same_run_twice_at_once(stand_in, tmp_path):
    run = run_in(tmp_path)
    write_answers(tmp_path)
    stand_in(f"echo $3 >> {tmp_path}/commands; sleep 0.5; cp {tmp_path}/$3.json {run.folder}")
    threads = [threading.Thread(target=fit_and_test, args=(run, True)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "commands").read_text() == "fit\ntest\n"


def test_stop_ends_all(stand_in, tmp_path):
    # The shell has a child of its own, as a run has that works on several devices.
    stand_in(f"sleep 60 & echo $! $$ > {tmp_path}/pids; wait")
    processes = Processes()
    runs = [run_in(tmp_path, str(seed), seed) for seed in range(2)]
    futures, pids = [], []

    def interrupted() -> None:
        with local_engine(1, 1, True, processes) as opened:
            futures.extend(opened.submit(run) for run in runs)
            pids.extend(map(int, wait_for(tmp_path / "pids").split()))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not any(map(is_alive, pids))
    assert futures[0].result().error == "stopped"
    assert futures[1].cancelled()
    with pytest.raises(Stopped):
        processes.run(["fit"], tmp_path / "log.txt")


def test_stop_does_not_wait_for_another_studys_run(stand_in, tmp_path):
    """A process of a study that was killed may go on for hours, and holds its run's lock."""
    stand_in("exit 1")
    run, processes = run_in(tmp_path), Processes()

    def interrupted() -> None:
        with local_engine(1, 1, True, processes) as opened:
            opened.submit(run)
            time.sleep(0.3)
            raise KeyboardInterrupt

    with locked(run.folder / "lock"), pytest.raises(KeyboardInterrupt):
        interrupted()  # to wait for the lock would take for ever
    assert not run.log.exists()


def test_a_gpu_each(stand_in, tmp_path, monkeypatch):
    """By a fake count of GPUs: never do two runs go on at a time on one."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    note = f'echo "$CUDA_VISIBLE_DEVICES $3" >> {tmp_path}/gpus'
    write_answers(tmp_path)
    stand_in(f'{note}; sleep 0.1; {note}; cp {tmp_path}/$3.json "$(dirname "$5")"')
    runs = [run_in(tmp_path, str(seed), seed) for seed in range(4)]
    with local_engine(2, 1, True, Processes()) as opened:
        outcomes = [future.result() for future in [opened.submit(run) for run in runs]]
    assert not any(outcome.error for outcome in outcomes)
    lines = (tmp_path / "gpus").read_text().splitlines()
    for gpu in ("3", "5"):
        # On each, a process ends before the next begins.
        stages = [line.split()[1] for line in lines if line.startswith(f"{gpu} ")]
        assert stages == ["fit", "fit", "test", "test"] * 2
    assert len(lines) == 16


class TestTimeout:
    def test_process_and_all_that_it_started_are_ended(self, stand_in, tmp_path, monkeypatch):
        monkeypatch.setattr("lightning_znorm.compare.processes._SECONDS_TO_END", 1)
        stand_in(f"trap '' TERM; (sleep 600; true) & echo $! $$ > {tmp_path}/pids; echo here; wait; wait; wait")
        run = replace(run_in(tmp_path), timeout=1.0)
        error = fit_and_test(run, True).error
        assert error == f"fit was ended after 0:00:01 (--timeout). The end of {run.log}:\nhere"
        # One that does not listen is killed: by itself it would last longer than a test may.
        assert all(is_gone(int(pid)) for pid in (tmp_path / "pids").read_text().split())

    @pytest.mark.full
    def test_of_the_test_alone(self, stand_in, tmp_path):
        """A training is not repeated whose test hangs."""
        write_answers(tmp_path)
        run = replace(run_in(tmp_path), timeout=3.0)
        stand_in(f"[ $3 = fit ] || exec sleep 60; cp {tmp_path}/fit.json {run.folder}")
        assert fit_and_test(run, True).error.startswith("test was ended after 0:00:03 (--timeout).")
        assert run.fit_file.exists()

    @pytest.mark.full
    def test_others_go_on(self, stand_in, tmp_path):
        write_answers(tmp_path)
        stand_in(f'case "$5" in */0/*) exec sleep 60;; esac; cp {tmp_path}/$3.json "$(dirname "$5")"')
        runs = [run_in(tmp_path, str(seed), seed) for seed in range(3)]
        with local_engine(1, 1, True, Processes(4.0)) as opened:
            outcomes = [future.result() for future in [opened.submit(run) for run in runs]]
        assert [outcome.error[:31] for outcome in outcomes] == ["fit was ended after 0:00:04 (--", "", ""]
        stand_in(f'cp {tmp_path}/$3.json "$(dirname "$5")"')
        assert fit_and_test(runs[0], True).error == ""

    def test_run_that_another_process_is_at(self, tmp_path):
        run = replace(run_in(tmp_path), timeout=0.3)
        with locked(run.folder / "lock"):
            error = fit_and_test(run, True).error
        who = f"process {os.getpid()} on "
        assert error.startswith(f"{run.folder} was in use for 0:00:00 (--timeout), by {who}")
        assert not run.log.exists()

    def test_enough_of_it(self, stand_in, tmp_path):
        write_answers(tmp_path)
        run = replace(run_in(tmp_path), timeout=1e9)
        stand_in(f"cp {tmp_path}/$3.json {run.folder}")
        assert fit_and_test(run, True).error == ""

    @pytest.mark.parametrize("phase", ["reading settings", "trying a method"])
    def test_before_the_first_run(self, phase, stand_in, tmp_path, capsys):
        settings = 'case "$*" in *print_config*) echo "trainer: {callbacks: null}"; exit;; esac;'
        stand_in(f"{settings if phase == 'trying a method' else ''} echo $$ > {tmp_path}/pid; exec sleep 60")
        with pytest.raises(StudyError, match=r"was ended after 0:00:01 \(--timeout\)[.:]"):
            compare.run("x", ["a.yaml"], output=tmp_path / "out", timeout=1)
        assert is_gone(int((tmp_path / "pid").read_text()))
        assert not (tmp_path / "out" / "runs").exists()


class TestInterruptions:
    """Told to end, a study says how to go on, and leaves no process behind."""

    @pytest.fixture(params=["reading settings", "trying a method"])
    def hangs(self, request, stand_in, tmp_path) -> list[str]:
        """A study whose processes hang, as its command line."""
        settings = 'case "$*" in *print_config*) echo "trainer: {callbacks: null}"; exit;; esac;'
        at_once = settings if request.param == "trying a method" else ""
        stand_in(f"{at_once} echo $$ > {tmp_path}/pid; exec sleep 60")
        return ["--config", "x", "--methods", "a.yaml", "--output", str(tmp_path / "out")]

    @pytest.mark.parametrize("name", ["SIGTERM", "SIGHUP", "SIGQUIT", "SIGINT"])
    def test_signal(self, name, hangs, tmp_path, capsys):
        handlers = [signal.getsignal(number) for number in signal.valid_signals()]
        with sending(tmp_path / "pid", getattr(signal, name)):
            assert main(hangs) == 130
        assert "The same command goes on from here." in capsys.readouterr().err
        assert is_gone(int((tmp_path / "pid").read_text()))
        assert [signal.getsignal(number) for number in signal.valid_signals()] == handlers

    @pytest.mark.full
    def test_again_and_again(self, stand_in, tmp_path, monkeypatch):
        """A terminal that is closed tells its programs twice, and systemd sends SIGHUP after SIGTERM."""
        monkeypatch.setattr("lightning_znorm.compare.processes._SECONDS_TO_END", 2)
        stand_in(f"trap '' TERM; echo $$ > {tmp_path}/pid; while true; do sleep 0.5; done")
        with sending(tmp_path / "pid", *[signal.SIGHUP, signal.SIGTERM] * 5):
            assert main(["--config", "x", "--methods", "a.yaml", "--output", str(tmp_path / "out")]) == 130
        assert is_gone(int((tmp_path / "pid").read_text()))


IN_A_TERMINAL = """
import sys
from lightning_znorm.compare.command import main
sys.executable = {python!r}
sys.exit(main({args!r}))
"""


def test_terminal_that_is_closed(stand_in, tmp_path):
    """As that of an ssh session: its programs are told by SIGHUP, and can show nothing any more."""
    pty, fcntl, termios = (
        pytest.importorskip(name, reason="needs a terminal of Unix") for name in ("pty", "fcntl", "termios")
    )
    stand_in(f"echo $$ > {tmp_path}/pid; exec sleep 60")
    args = ["--config", "x", "--methods", "a.yaml", "--output", str(tmp_path / "out")]
    program = IN_A_TERMINAL.format(python=sys.executable, args=args)
    monitor, terminal = pty.openpty()
    process = subprocess.Popen(
        [PYTHON, "-c", program],
        stdin=terminal,
        stdout=terminal,
        stderr=terminal,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        env={**os.environ, "PYTHONPATH": ROOT},
    )
    try:
        os.close(terminal)
        pid = int(wait_for(tmp_path / "pid"))
        os.close(monitor)
        process.wait(60)
        assert is_gone(pid)
    finally:
        process.kill()
        process.wait()


def test_signals_that_nohup_ignores(stand_in, tmp_path):
    """They stay ignored, and handlers of the program's own stay in place."""
    write_answers(tmp_path)
    (tmp_path / "out").mkdir()
    received = []
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN), signal.signal(signal.SIGQUIT, lambda *_: received.append(1))
    try:
        with interruptible():
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGQUIT)
            time.sleep(0.1)
        assert received == [1]
        assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before[0])
        signal.signal(signal.SIGQUIT, before[1])


def test_signals_in_another_thread(stand_in, tmp_path):
    """Python handles none there: a study that is run in one leaves them alone."""
    errors = []

    def work() -> None:
        try:
            with interruptible():
                pass
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert errors == []


def test_signal_while_nothing_can_be_shown(tmp_path):
    """Of a terminal that is gone: what is drawn on it last fails, and the study ends as interrupted all the same."""

    def closed() -> None:
        with interruptible():
            try:
                os.kill(os.getpid(), signal.SIGHUP)
                time.sleep(10)
            finally:
                raise OSError(5, "Input/output error")

    with pytest.raises(KeyboardInterrupt):
        closed()


@pytest.mark.full
def test_second_interruption_kills_at_once(stand_in, tmp_path, monkeypatch):
    """Ctrl-C while what was interrupted ends."""
    monkeypatch.setattr("lightning_znorm.compare.processes._SECONDS_TO_END", 1000)  # more than a test may take
    stand_in(f"trap '' TERM; echo $$ > {tmp_path}/pid; while true; do sleep 1; done")
    processes, run = Processes(), run_in(tmp_path)

    def interrupted() -> None:
        with local_engine(1, 1, True, processes) as opened:
            opened.submit(run)
            wait_for(tmp_path / "pid")
            raise KeyboardInterrupt

    timer = threading.Timer(1.0, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        interrupted()
    timer.join()
    assert is_gone(int((tmp_path / "pid").read_text()))


def test_environment_and_imports(stand_in, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend("/modules/of/mine")
    stand_in("echo $SHARE $PYTHONPATH")
    Processes().run(["fit"], tmp_path / "log.txt", {"SHARE": "half"})
    line = tail(tmp_path / "log.txt", 1)
    assert line.startswith("half ")
    assert "/modules/of/mine" in line


def test_tail(tmp_path):
    assert tail(tmp_path / "none") == ""
    (tmp_path / "log").write_text("a\nb\nbar 1%\rbar 2%\nc\n\n")
    assert tail(tmp_path / "log", 3) == "bar 1%\nbar 2%\nc"


def test_tail_of_a_huge_log(tmp_path, monkeypatch):
    """Of 64 GB, which are not there on the disk, no more than the end is read."""
    log = tmp_path / "log"
    with log.open("wb") as file:
        file.truncate(64 * 10**9)
        file.seek(0, os.SEEK_END)
        file.write(b"\nlast but one\nlast\n")
    read, opened = [], Path.open

    class Counted(io.FileIO):
        def read(self, size: int = -1) -> bytes:
            assert size >= 0
            read.append(size)
            return super().read(size)

    monkeypatch.setattr(Path, "open", lambda path, mode: Counted(path) if mode == "rb" else opened(path, mode))
    assert tail(log, 2) == "last but one\nlast"
    assert sum(read) < 100_000


def test_tail_of_what_was_printed_since(tmp_path):
    log = tmp_path / "log"
    log.write_text("a\nb\n")
    assert tail(log, start=2) == "b"
    assert tail(log, start=4) == ""
    assert tail(log, start=400) == ""  # of a log that was cut short meanwhile
