"""How many cores there are, and how runs side by side share them."""

import math
import os
from pathlib import Path

import pytest

from lightning_znorm.compare import cores as module
from lightning_znorm.compare.cores import notes_on_cores, quota, thread_variables, threads_of
from lightning_znorm.compare.engines import Resources, notes_on_sharing
from lightning_znorm.compare.study import Plan, Study


@pytest.fixture
def machine(monkeypatch):
    """Of as many cores as one says."""

    def make(affine: int, allowed: float = math.inf) -> None:
        monkeypatch.setattr(module, "_affine_cores", lambda: affine)
        monkeypatch.setattr(module, "quota", lambda: allowed)

    return make


@pytest.mark.parametrize(
    ("own", "files", "expected"),
    [
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1.5),
        ("0::/\n", {"cpu.max": "max 100000\n"}, math.inf),
        ("0::/\n", {}, math.inf),
        ("0::/a/b\n", {"a/cpu.max": "400000 100000", "a/b/cpu.max": "max 100000"}, 4.0),
        ("0::/a/b\n", {"a/cpu.max": "400000 100000", "a/b/cpu.max": "50000 100000"}, 0.5),
        ("0::/of/the/host\n", {"cpu.max": "300000 100000"}, 3.0),
        ("4:cpu,cpuacct:/x\n", {"cpu/x/cpu.cfs_quota_us": "200000\n", "cpu/x/cpu.cfs_period_us": "100000\n"}, 2.0),
        ("4:cpu,cpuacct:/x\n", {"cpu/x/cpu.cfs_quota_us": "-1\n", "cpu/x/cpu.cfs_period_us": "100000\n"}, math.inf),
        ("3:cpuset:/x\n", {"cpu.max": "100000 100000"}, math.inf),
        ("0::/\n", {"cpu.max": "no numbers"}, math.inf),
        ("0::/\n", {"cpu.max": "100000 0"}, math.inf),
        ("", {"cpu.max": "100000 100000"}, math.inf),
    ],
)
def test_quota(tmp_path, own, files, expected):
    (tmp_path / "own").write_text(own)
    for name, content in files.items():
        path = tmp_path / "cgroup" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    assert quota(tmp_path / "cgroup", tmp_path / "own") == expected


def test_quota_without_control_groups(tmp_path):
    assert quota(tmp_path, tmp_path / "none") == math.inf


@pytest.mark.parametrize(("affine", "allowed", "expected"), [(8, math.inf, 8), (8, 2.9, 2), (8, 0.5, 1), (2, 64.0, 2)])
def test_cores(machine, affine, allowed, expected):
    machine(affine, allowed)
    assert module.cores() == expected


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="only Linux lets a process choose its cores")
def test_cores_of_the_affinity_mask():
    before = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(before)})
        assert module.cores() == 1
    finally:
        os.sched_setaffinity(0, before)


@pytest.mark.parametrize(
    ("value", "expected"),
    [("3", 3), (" 4 ", 4), ("4,2", 4), ("08", 8), ("0", None), ("-1", None), ("many", None), ("", None)],
)
def test_threads_that_the_user_asks_for(value, expected):
    assert threads_of({"OMP_NUM_THREADS": value}) == expected
    assert threads_of({}) is None


@pytest.mark.parametrize(
    ("jobs", "given", "changed"),
    [
        (1, {}, {}),
        (2, {}, {"OMP_NUM_THREADS": "4"}),
        (3, {}, {"OMP_NUM_THREADS": "2"}),
        (8, {}, {"OMP_NUM_THREADS": "1"}),
        (50, {}, {"OMP_NUM_THREADS": "1"}),
        (2, {"OMP_NUM_THREADS": "1"}, {}),
        (2, {"OMP_NUM_THREADS": "4"}, {}),
        (2, {"OMP_NUM_THREADS": "5"}, {"OMP_NUM_THREADS": "4"}),
        (2, {"OMP_NUM_THREADS": "many"}, {"OMP_NUM_THREADS": "4"}),
        (1, {"OMP_NUM_THREADS": "16"}, {"OMP_NUM_THREADS": "8"}),
        (2, {"MKL_NUM_THREADS": "8"}, {"MKL_NUM_THREADS": "4", "OMP_NUM_THREADS": "4"}),
        (2, {"MKL_NUM_THREADS": "2"}, {"OMP_NUM_THREADS": "2"}),
        (4, {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "8"}, {"OPENBLAS_NUM_THREADS": "2"}),
    ],
)
def test_threads_never_outnumber_cores(machine, jobs, given, changed):
    machine(8)
    assert thread_variables(jobs, given) == changed


def test_threads_in_a_container(machine):
    """PyTorch alone would take as many threads as the machine has cores."""
    machine(64, 4.0)
    assert thread_variables(1, {}) == {"OMP_NUM_THREADS": "4"}
    assert thread_variables(2, {}) == {"OMP_NUM_THREADS": "2"}


class TestNotes:
    def notes(self, jobs: int, workers: int = 0, has_gpus: bool = False, **environment: str) -> list[str]:
        return list(notes_on_cores(jobs, workers, has_gpus, environment))

    def test_nothing_to_say(self, machine):
        machine(8)
        assert self.notes(1, 8) == []  # as without a study
        assert self.notes(8) == []
        assert self.notes(4, OMP_NUM_THREADS="2") == []
        assert self.notes(2, 2, OMP_NUM_THREADS="2") == []

    def test_more_jobs_than_cores(self, machine):
        machine(8)
        (note,) = self.notes(9)
        assert note.startswith("--jobs 9 is more than the 8 CPU cores that this process may use: ")
        assert note.endswith("--jobs 8 is at least as fast.")
        assert self.notes(9, has_gpus=True) == []

    def test_threads_that_are_reduced(self, machine):
        machine(8)
        (note,) = self.notes(2, OMP_NUM_THREADS="8")
        assert note.startswith("OMP_NUM_THREADS is 8, and becomes 4 in each of 2 runs side by side, because")
        machine(1)
        (note,) = self.notes(1, MKL_NUM_THREADS="2")
        assert note.startswith("MKL_NUM_THREADS is 2, and becomes 1, because more threads than the 1 CPU core would")

    def test_workers(self, machine):
        machine(8)
        (note,) = self.notes(2, 3)
        assert note.startswith("2 runs with 4 threads and 3 DataLoader workers each share 8 CPU cores: ")
        (note,) = self.notes(4, 1, has_gpus=True)
        assert note.startswith("4 runs with 2 threads and 1 DataLoader worker each")

    def test_runs_of_several_processes(self, machine):
        machine(8)
        assert list(notes_on_cores(4, 0, False, {}, processes=2)) == []
        first, second = notes_on_cores(4, 0, False, {"OMP_NUM_THREADS": "3"}, processes=3)
        assert first.startswith("--jobs 4, with runs of 3 processes each, is more than the 8 CPU cores that this")
        assert first.endswith("--jobs 2 is at least as fast.")
        assert second.startswith("OMP_NUM_THREADS is 3, and becomes 1 in each of 12 processes side by side, because")
        (note,) = notes_on_cores(1, 0, False, {"OMP_NUM_THREADS": "8"}, processes=2)
        assert note.startswith("OMP_NUM_THREADS is 8, and becomes 4 in each of 2 processes side by side, because")
        (note,) = notes_on_cores(2, 1, False, {}, processes=2)
        assert note.startswith("2 runs of 2 processes each with 2 threads and 1 DataLoader worker each share 8")

    def test_workers_of_the_settings(self, machine, monkeypatch):
        machine(4)
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        data = ({"init_args": {"num_workers": 2}}, {"init_args": {"loader": {"num_workers": 5}}}, {"num_workers": None})
        settings = {f"m{i}": {"data": entry, "trainer": {}} for i, entry in enumerate(data)}
        study = Study(("exp.yaml",), tuple(f"{name}.yaml" for name in settings), (0,), Path("out"))
        plan = Plan(study, settings, None, "test/loss", "min", [])
        (note,) = notes_on_sharing(plan, Resources(jobs=2))
        assert note.startswith("2 runs with 1 thread and 5 DataLoader workers each share 4 CPU cores")
        assert notes_on_sharing(plan, Resources(jobs=2, ray="auto")) == []
