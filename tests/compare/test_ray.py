"""A study on a Ray cluster of two nodes, both on this machine."""

import io
import os
import re
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from alive import is_alive, processes_of
from rich.console import Console

from lightning_znorm import compare
from lightning_znorm.compare.engines import ray_engine
from lightning_znorm.compare.progress import Progress, watch
from lightning_znorm.compare.study import Run, StudyError

ray = pytest.importorskip("ray", reason="needs Ray: pip install '.[ray]'")
cluster_utils = pytest.importorskip("ray.cluster_utils", reason="needs Ray's cluster: pip install '.[ray]'")

pytestmark = [pytest.mark.full, pytest.mark.timeout(600), pytest.mark.filterwarnings("ignore")]


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    before, handler = dict(os.environ), signal.getsignal(signal.SIGTERM)
    os.environ["RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO"] = "0"
    cluster = cluster_utils.Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    cluster.add_node(num_cpus=1)
    cluster.wait_for_nodes()
    yield cluster.address
    ray.shutdown()
    cluster.shutdown()
    signal.signal(signal.SIGTERM, handler)  # Ray has put its own in its place
    os.environ.clear()
    os.environ.update(before)


def test_study_on_two_nodes(address, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    experiment = {
        "model": {"class_path": "study_module.ScriptedModule", "init_args": {"scores": [0.9, 0.1]}},
        "data": {"class_path": "study_module.StudyData"},
        "trainer": {
            "accelerator": "cpu",
            "max_epochs": 2,
            "log_every_n_steps": 2,
            "callbacks+": [{"class_path": "ModelCheckpoint", "init_args": {"monitor": "val/score", "mode": "max"}}],
        },
    }
    Path("exp.yaml").write_text(yaml.safe_dump(experiment))
    broken = {"trainer": {"callbacks+": [{"class_path": "lost_worker.KillsItsWorker"}]}}
    Path("broken.yaml").write_text(yaml.safe_dump(broken))
    methods = ["configs/methods/baseline.yaml", "broken.yaml"]
    table = compare.run("exp.yaml", methods, seeds=[0, 1], output="out", ray=address)
    assert table.row("baseline").seeds == (0, 1)
    assert table.row("baseline", "test/score").values == (1, 1)  # of the best checkpoint, after one epoch of two
    assert [outcome.run.name for outcome in table.failures] == ["broken-0", "broken-1"]
    lost, failed = table.failures
    if "the method broke" in lost.error:
        lost, failed = failed, lost
    assert "the method broke" in failed.error
    # Of a worker that was killed: why, what the run has printed, and that nothing of it goes on.
    assert lost.error.startswith("The Ray worker of this run died, so the run was ended, too: something killed")
    for text in (lost.error, Path("out/report.md").read_text(), Path("out/report.html").read_text()):
        assert "killing the worker at the end of epoch 1" in text
    assert not is_alive(int(Path("killed").read_text()))
    assert not Path("went-on").exists()
    places = {re.search(r"Ray node (\w+)", log.read_text())[1] for log in Path("out").rglob("log.txt")}
    assert len(places) == 2


def test_interruption_ends_processes(address, tmp_path):
    run = Run("baseline", 0, tmp_path / "run")
    run.folder.mkdir()
    run.config.write_text("{}")

    def interrupted() -> None:
        with ray_engine(address, cpus=1, gpus=0, monitored=True) as cluster:
            future = cluster.submit(run)
            while not processes_of(run.folder):  # its first seconds are those of imports
                assert not future.done()
                time.sleep(0.1)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not processes_of(run.folder)


def test_a_worker_that_is_killed_takes_its_run_along(address, tmp_path):
    """As Ray's memory monitor kills it; its place is given to the next run."""
    run = Run("baseline", 0, tmp_path / "run")
    run.folder.mkdir()
    run.config.write_text("{}")
    progress = Progress([run], 1, "m")
    with ray_engine(address, cpus=1, gpus=0, monitored=True) as cluster:
        future = cluster.submit(run)
        while not (processes := processes_of(run.folder)):
            assert not future.done()
            time.sleep(0.05)
        (fit,) = processes
        parent = subprocess.run(["ps", "-o", "ppid=", "-p", str(fit)], capture_output=True, text=True, check=True)
        start = time.monotonic()
        os.kill(int(parent.stdout), signal.SIGKILL)
        while is_alive(fit):
            assert time.monotonic() - start < 10, "the run goes on without its worker"
            time.sleep(0.02)
        watch({future: run}, progress, Console(file=io.StringIO()))
    error = progress.outcomes[run].error
    assert error.startswith("The Ray worker of this run died, so the run was ended, too")
    assert f"The end of {run.log}:\n# on " in error
    assert "python -m lightning_znorm fit --config" in error
    assert "python-core-worker" not in error  # Ray's words, of files that a user does not know


def test_resources_that_no_machine_has(address):
    message = "No machine of the Ray cluster has 4 CPU cores and 0 GPUs"
    with pytest.raises(StudyError, match=message), ray_engine(address, cpus=4, gpus=0, monitored=True):
        pass


def test_no_cluster(address, monkeypatch):
    def nobody_there(**kwargs):
        raise ConnectionError("Could not find any running Ray instance.")  # what `ray.init("auto")` raises then

    monkeypatch.setattr(ray, "init", nobody_there)
    with pytest.raises(StudyError, match="No Ray cluster at auto"), ray_engine("auto", cpus=1, gpus=0, monitored=True):
        pass
