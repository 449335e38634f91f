"""How runs side by side share a machine. test_ray.py and test_ray_worker.py are about Ray."""

import pytest

from lightning_znorm.compare.engines import devices_per_run, environments, processes_per_run
from lightning_znorm.compare.study import Plan, Study


class TestSharingAMachine:
    def test_alone(self, monkeypatch):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        assert environments(1, 1, ["0", "1"]) == [{}]

    def test_a_gpu_each(self, monkeypatch):
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        assert [e["CUDA_VISIBLE_DEVICES"] for e in environments(4, 1, ["0", "1"])] == ["0", "1", "0", "1"]
        assert [e["CUDA_VISIBLE_DEVICES"] for e in environments(2, 2, ["4", "5", "6", "7"])] == ["4,5", "6,7"]
        assert environments(2, 1, []) == [{}, {}]
        assert environments(2, None, ["0", "1"]) == [{}, {}]

    @pytest.mark.parametrize(
        ("asked", "devices", "processes"),
        [
            ("auto", 1, 1),
            (-1, 1, 1),
            (2, 2, 2),
            ("2", 2, 2),
            ([1], None, 1),
            ([0, 2, 3], None, 3),
            ((0, 1), None, 2),
            ("0,1", None, 2),
            ("3,", None, 1),
        ],
    )
    def test_devices_that_the_experiment_asks_for(self, asked, devices, processes, tmp_path):
        settings = {"baseline": {"trainer": {"devices": "auto"}}, "znorm": {"trainer": {"devices": asked}}}
        plan = Plan(
            Study(("exp.yaml",), ("a/one.yaml", "a/two.yaml"), (0, 1), tmp_path), settings, None, "test/loss", "min", []
        )
        assert devices_per_run(plan) == devices
        assert processes_per_run(plan) == processes

    def test_cores_are_shared(self, monkeypatch):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.setattr("lightning_znorm.compare.cores.cores", lambda: 8)
        assert environments(3, 1, []) == [{"OMP_NUM_THREADS": "2"}] * 3
        assert environments(16, 1, [])[0] == {"OMP_NUM_THREADS": "1"}

    def test_processes_of_a_run_share_its_cores(self, monkeypatch):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.setattr("lightning_znorm.compare.cores.cores", lambda: 8)
        assert environments(2, 2, [], processes_each=2) == [{"OMP_NUM_THREADS": "2"}] * 2
        assert environments(1, 4, [], processes_each=4) == [{"OMP_NUM_THREADS": "2"}]
        shares = environments(2, None, ["0", "1"], processes_each=2)  # runs that name their GPUs
        assert shares == [{"OMP_NUM_THREADS": "2"}] * 2

    def test_visible_gpus(self, monkeypatch):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
        assert [e["CUDA_VISIBLE_DEVICES"] for e in environments(2, 1)] == ["3", "5"]
