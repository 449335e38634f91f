"""Processes of a study: what they hold, what they print, and that they end with it."""

import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
from alive import is_alive

from lightning_znorm.compare.command import main
from lightning_znorm.compare.files import read_json, write_json
from lightning_znorm.compare.locks import locked
from lightning_znorm.compare.one_run import command_to_fit, command_to_test, do_run, shell_line
from lightning_znorm.compare.pool import pool
from lightning_znorm.compare.process import Processes, Stopped, tail
from lightning_znorm.compare.study import Run

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="the stand-in for Python is a shell script")


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Makes a shell script that is started in place of Python."""

    def make(script: str) -> None:
        path = tmp_path / "python"
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    return make


def run_in(folder: Path) -> Run:
    return Run("znorm", 0, folder / "run")


def wait_for(path: Path) -> str:
    for _ in range(1000):
        if path.exists() and path.read_text().endswith("\n"):
            return path.read_text()
        time.sleep(0.01)
    pytest.fail(f"no {path}")


def test_what_is_left_is_done(stand_in, tmp_path):
    run = run_in(tmp_path)
    stand_in(f'echo "$@" >> {tmp_path}/commands; echo {{}} > {run.folder}/$3.json')
    assert do_run(run, True).error == ""
    assert run.is_done
    commands = [f"-m lightning_znorm {' '.join(args)}\n" for args in (command_to_fit(run), command_to_test(run, True))]
    assert (tmp_path / "commands").read_text() == "".join(commands)
    assert do_run(run, True).error == ""  # again: nothing
    run.test_file.unlink()
    assert do_run(run, True).error == ""
    assert (tmp_path / "commands").read_text() == "".join([*commands, commands[1]])


def test_commands(tmp_path):
    run = run_in(tmp_path)
    assert command_to_fit(run) == ["fit", "--config", str(run.config)]
    assert command_to_test(run, False)[-1] == str(run.last)
    assert command_to_test(run, True)[-1] == str(run.best)  # which is not there yet
    run.last.parent.mkdir(parents=True)
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
        ("kill -9 $$", "fit was ended by SIGKILL"),
        ("exit 0", "fit ended before it was done"),
    ],
)
def test_failure(stand_in, tmp_path, script, words):
    stand_in(script)
    error = do_run(run_in(tmp_path), True).error
    assert error.startswith(words)
    if "last" in script:
        assert error.endswith("first\nlast")


def test_nothing_of_a_run_lives_on(stand_in, tmp_path):
    """Of a run on several devices, others may wait forever for the one that died, on GPUs that the next run gets."""
    stand_in(f"sleep 60 & echo $! > {tmp_path}/pid; kill -9 $$")
    assert do_run(run_in(tmp_path), True).error.startswith("fit was ended by SIGKILL")
    assert not is_alive(int((tmp_path / "pid").read_text()))


def test_same_run_twice_at_once(stand_in, tmp_path):
    run = run_in(tmp_path)
    stand_in(f"echo $3 >> {tmp_path}/commands; sleep 0.5; echo {{}} > {run.folder}/$3.json")
    threads = [threading.Thread(target=do_run, args=(run, True)) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert (tmp_path / "commands").read_text() == "fit\ntest\n"


def test_stop_ends_all(stand_in, tmp_path):
    # The shell has a child of its own, as a run has that works on several devices.
    stand_in(f"sleep 60 & echo $! $$ > {tmp_path}/pids; wait")
    processes = Processes()
    runs = [Run("znorm", seed, tmp_path / str(seed)) for seed in range(2)]
    futures, pids = [], []

    def interrupted() -> None:
        with pool(1, 1, True, processes) as opened:
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
        with pool(1, 1, True, processes) as opened:
            opened.submit(run)
            time.sleep(0.3)
            raise KeyboardInterrupt

    with locked(run.folder / "lock"):
        start = time.monotonic()
        with pytest.raises(KeyboardInterrupt):
            interrupted()
        assert time.monotonic() - start < 5
    assert not run.log.exists()


def test_a_gpu_each(stand_in, tmp_path, monkeypatch):
    """By a fake count of GPUs: never do two runs go on at a time on one."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    note = f'echo "$CUDA_VISIBLE_DEVICES $3" >> {tmp_path}/gpus'
    stand_in(f'{note}; sleep 0.1; {note}; echo {{}} > "$(dirname "$5")/$3.json"')
    runs = [Run("znorm", seed, tmp_path / str(seed)) for seed in range(4)]
    with pool(2, 1, True, Processes()) as opened:
        outcomes = [future.result() for future in [opened.submit(run) for run in runs]]
    assert not any(outcome.error for outcome in outcomes)
    lines = (tmp_path / "gpus").read_text().splitlines()
    for gpu in ("3", "5"):
        # On each, a process ends before the next begins.
        stages = [line.split()[1] for line in lines if line.startswith(f"{gpu} ")]
        assert stages == ["fit", "fit", "test", "test"] * 2
    assert len(lines) == 16


@pytest.mark.parametrize("phase", ["reading settings", "trying a method"])
def test_sigterm(phase, stand_in, tmp_path, capsys):
    """Told to end, the command says how to go on, and leaves no process behind."""
    settings = 'case "$*" in *print_config*) echo "trainer: {callbacks: null}"; exit;; esac;'
    stand_in(f"{settings if phase == 'trying a method' else ''} echo $$ > {tmp_path}/pid; exec sleep 60")
    before = signal.getsignal(signal.SIGTERM)

    def terminate() -> None:
        wait_for(tmp_path / "pid")
        os.kill(os.getpid(), signal.SIGTERM)

    thread = threading.Thread(target=terminate)
    thread.start()
    assert main(["--config", "x", "--methods", "a.yaml", "--output", str(tmp_path / "out")]) == 130
    thread.join()
    assert "The same command goes on from here." in capsys.readouterr().err
    assert not is_alive(int((tmp_path / "pid").read_text()))
    assert signal.getsignal(signal.SIGTERM) is before


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


def test_json_is_whole_or_absent(tmp_path):
    assert read_json(tmp_path / "x.json") is None
    write_json(tmp_path / "x.json", {"a": 1})
    with pytest.raises(TypeError):
        write_json(tmp_path / "x.json", {"a": object()})
    assert read_json(tmp_path / "x.json") == {"a": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["x.json"]
