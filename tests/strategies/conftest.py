from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import run_distributed
from tests.strategies.scenarios import SCENARIOS, obstacle
from tests.strategies.training import train

TIMEOUT = 60.0  # seconds of one scenario; it takes one, or a few on a busy machine

Runs = Callable[[str], list[dict[str, Any]]]


@pytest.fixture(scope="session")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the checkpoints of scenarios are."""
    return tmp_path_factory.mktemp("strategies")


@pytest.fixture(scope="session")
def runs(directory: Path) -> Runs:
    """Return what each process saw in a scenario, which is trained when it is asked for first, and then once."""
    done: dict[str, list[dict[str, Any]] | AssertionError] = {}

    def records(name: str) -> list[dict[str, Any]]:
        if reason := obstacle(name):
            pytest.skip(reason)
        scenario = SCENARIOS[name]
        if scenario.kind == "DeepSpeed":
            pytest.importorskip("deepspeed", reason="needs DeepSpeed: pip install '.[deepspeed]'")
        if scenario.resumes is not None:
            records(scenario.resumes)
        if name not in done:
            try:
                done[name] = run_distributed(
                    train, name, directory, processes=scenario.processes, timeout=TIMEOUT, name=name
                )
            except AssertionError as error:
                done[name] = error
                raise
        found = done[name]
        if isinstance(found, AssertionError):
            raise AssertionError(f"{name} failed: see the first test that asked for it")
        return found

    return records


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Compute the reference with as many threads as the runs have: half-precision sums depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
