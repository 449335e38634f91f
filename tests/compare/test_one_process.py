"""Fit and test of a run in one process: as two would do it, and where two are needed."""

import json
import os
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from forked import fork_processes
from samples import write_answers

from lightning_znorm import cli, compare
from lightning_znorm.cli import THEN_TEST
from lightning_znorm.compare.files import read_json
from lightning_znorm.compare.processes import Processes
from lightning_znorm.compare.runner import command_to_test, fit_and_test
from lightning_znorm.compare.study import Run
from tests.processes import run_forked

pytestmark = [
    pytest.mark.skipif(sys.platform == "win32", reason="processes are forked, or stood in for by a shell script"),
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"),
]


@pytest.fixture
def run(tmp_path) -> Run:
    made = Run("znorm", 0, tmp_path / "run")
    made.folder.mkdir()
    made.config.touch()
    write_answers(tmp_path)
    return made


@pytest.fixture
def stand_in(tmp_path, monkeypatch):
    """Makes a shell script that is started in place of Python; ``answer fit`` writes what `fit` does."""

    def make(script: str) -> None:
        path = tmp_path / "python"
        answer = f'answer() {{ cp "{tmp_path}/$1.json" "{tmp_path}/run"; }}'
        path.write_text(f"#!/bin/sh\n{answer}\necho $3 >> {tmp_path}/commands\n{script}\n")
        path.chmod(0o755)
        monkeypatch.setattr(sys, "executable", str(path))

    return make


TEST = 'echo "$ python -m lightning_znorm test --config x"'


def test_asks_fit_to_test(stand_in, run, tmp_path):
    stand_in(f'echo "${THEN_TEST}" > {tmp_path}/then; answer fit; {TEST}; answer test')
    assert fit_and_test(run, True).error == ""
    assert (tmp_path / "commands").read_text() == "fit\n"
    asked = {"args": command_to_test(run, True), "once": str(run.fit_file)}
    assert json.loads((tmp_path / "then").read_text()) == asked
    run.test_file.unlink()
    assert fit_and_test(run, True).error == ""
    assert (tmp_path / "commands").read_text() == "fit\ntest\n"
    assert (tmp_path / "then").read_text() == "\n"


@pytest.mark.parametrize(
    ("script", "error", "end"),
    [
        (f"echo trained; answer fit; {TEST}; echo tested; exit 3", "test ended with exit code 3.", "log.txt:\ntested"),
        (f"echo trained; answer fit; {TEST}; kill -9 $$", "test was ended by SIGKILL", "nothing into"),
        ("echo trained; answer fit; exit 3", "fit ended with exit code 3.", "log.txt:\ntrained"),
        ("echo trained; exit 3", "fit ended with exit code 3.", "log.txt:\ntrained"),
        (f"[ $3 = fit ] && answer fit && {TEST}; exit 0", "test ended before it was done, with exit code 0", ""),
    ],
)
def test_failure_says_which_of_both(script, error, end, stand_in, run):
    stand_in(script)
    said = fit_and_test(run, True).error
    assert said.startswith(error)
    assert end in said


@pytest.mark.full
class TestTimeout:
    """Each of both has all of the time."""

    def test_fit(self, stand_in, run):
        stand_in("exec sleep 60")
        assert fit_and_test(replace(run, timeout=1.0), True).error.startswith("fit was ended after 0:00:01 (--timeout)")

    def test_test(self, stand_in, run):
        stand_in(f"sleep 1; answer fit; {TEST}; exec sleep 60")
        assert fit_and_test(replace(run, timeout=2.0), True).error.startswith(
            "test was ended after 0:00:02 (--timeout)"
        )
        assert run.fit_file.is_file()

    def test_enough_for_each(self, stand_in, run):
        stand_in(f"sleep 1.6; answer fit; {TEST}; sleep 1.6; answer test")
        assert fit_and_test(replace(run, timeout=2.5), True).error == ""


EXPERIMENT = {
    "model": {"class_path": "study_module.StudyModule"},
    "data": {"class_path": "study_module.StudyData"},
    "trainer": {
        "accelerator": "cpu",
        "max_epochs": 3,
        "log_every_n_steps": 2,
        "callbacks+": [{"class_path": "ModelCheckpoint", "init_args": {"monitor": "val/accuracy", "mode": "max"}}],
    },
}


@pytest.fixture
def study(tmp_path, monkeypatch):
    """Runs a study whose processes are forks of this one, in which fit tests, too; returns their commands."""
    monkeypatch.chdir(tmp_path)
    fork_processes(monkeypatch)
    Path("baseline.yaml").write_text("trainer: {}")
    commands: list[str] = []

    def run_with_variables(self, args, log, environment=None, **options) -> int:
        commands.append(args[0])
        with pytest.MonkeyPatch.context() as patch:
            for name, value in (environment or {}).items():
                patch.setenv(name, value)
            return run_forked(args, log)

    def make(output: str, together: bool, **trainer: object) -> list[str]:
        Path("exp.yaml").write_text(yaml.safe_dump({**EXPERIMENT, "trainer": {**EXPERIMENT["trainer"], **trainer}}))
        with pytest.MonkeyPatch.context() as patch:
            if together:
                patch.setattr(Processes, "run", run_with_variables)
            commands.clear()
            assert compare.run("exp.yaml", ["baseline.yaml"], seeds=[0], output=output).failures == ()
        return commands[2:]  # after the first try

    return make


@pytest.mark.full
def test_results_are_the_same(study):
    study("apart", together=False)
    assert study("together", together=True) == ["fit"]
    apart, together = (Path(f"{name}/runs/baseline-0") for name in ("apart", "together"))
    assert "$ python -m lightning_znorm test --config" in (together / "log.txt").read_text()
    metrics = [read_json(folder / "test.json")["metrics"] for folder in (apart, together)]
    assert metrics[0] == metrics[1]
    assert (together / "test.json").stat().st_mtime_ns > (together / "fit.json").stat().st_mtime_ns
    best = [read_json(folder / "test.json")["checkpoint"]["epoch"] for folder in (apart, together)]
    assert best[0] == best[1]


@pytest.mark.parametrize(("world_size", "exists", "tests"), [(1, True, 1), (1, False, 0), (2, True, 0)])
def test_when_fit_tests(world_size, exists, tests, tmp_path, monkeypatch):
    """After a training in several processes, the study starts others for the test; one that was cut short has none."""
    asked = []

    def run_cli(files, args) -> SimpleNamespace:
        asked.append(args)
        return SimpleNamespace(trainer=SimpleNamespace(world_size=world_size))

    monkeypatch.setattr("lightning_znorm.cli.run.RunCLI", run_cli)
    if exists:
        (tmp_path / "fit.json").touch()
    then = {"args": ["test", "--ckpt_path", "best.ckpt"], "once": str(tmp_path / "fit.json")}
    monkeypatch.setenv(THEN_TEST, json.dumps(then))
    monkeypatch.setattr(sys, "argv", ["program"])
    cli.main(["fit"])
    assert asked == [["fit"], ["test", "--ckpt_path", "best.ckpt"]][: 1 + tests]


def test_variable_is_not_inherited(monkeypatch):
    """By processes that Lightning starts for the training."""
    monkeypatch.setenv(THEN_TEST, "{}")
    with pytest.raises(SystemExit):
        cli.main(["fit", "--print_config"])
    assert THEN_TEST not in os.environ
