"""Where DDP keeps gradients, and the ways in which Lightning starts its processes."""

import os
from pathlib import Path

import pytest
import torch

from tests.distributed import run_distributed
from tests.processes import run_python
from tests.strategies.conftest import Runs
from tests.strategies.reference import check
from tests.strategies.scenarios import SCENARIOS, Scenario, selected
from tests.strategies.start_methods import SCENARIO, Written
from tests.strategies.training import train


def averages_in_place(name: str, scenario: Scenario) -> bool:
    """Whether DDP moves gradients to memory of its own."""
    return scenario.kind == "DDP" and scenario.processes == 2 and scenario.resumes is None


@pytest.mark.parametrize("name", selected(averages_in_place))
def test_gradients_stay_where_ddp_keeps_them(runs: Runs, name: str) -> None:
    bucket_view = "bucket" in name
    for record in runs(name):
        assert record["moved"] == []
        # The scenario is what it says: with bucket views, gradients share the storage of their bucket.
        grads = (
            len([key for key in record["weights"][0] if not key.startswith(("frozen.", "unused"))]) - 1
        )  # one is tied
        storages = record["storages"][-1]
        assert storages < grads if bucket_view else storages == grads
        assert (storages > 1) == (not bucket_view or name == "ddp-small_buckets")


@pytest.mark.parametrize("name", selected(lambda name, scenario: name == "ddp-find_unused"))
def test_used_by_one_process_and_by_none(runs: Runs, name: str) -> None:
    record = runs(name)[0]
    start, end = record["weights"][0], record["weights"][-1]
    assert torch.equal(start["unused"], end["unused"])
    assert not torch.equal(start["of_last"], end["of_last"])


def fork_two(folder: Path) -> None:
    """Let Lightning fork the processes, as in a process that was not launched by another program."""
    for key in list(os.environ):
        if key.startswith(("TORCHELASTIC_", "MASTER_")) or key.endswith(("RANK", "WORLD_SIZE")):
            del os.environ[key]
    train(SCENARIO, folder, Written(SCENARIO, folder), strategy="ddp_fork")


def test_forked_by_lightning(tmp_path: Path) -> None:
    run_distributed(fork_two, tmp_path, processes=1)
    for rank in range(2):
        check(SCENARIO, SCENARIOS[SCENARIO], torch.load(tmp_path / f"{rank}.pt", weights_only=True))


@pytest.mark.full
@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn", "ddp_fork", "ddp_notebook"])
def test_start_methods(tmp_path: Path, strategy: str) -> None:
    finished = run_python("-m", "tests.strategies.start_methods", tmp_path, strategy, timeout=120)
    assert finished.returncode == 0, finished.stdout
    check(SCENARIO, SCENARIOS[SCENARIO], torch.load(tmp_path / "1.pt", weights_only=True))
