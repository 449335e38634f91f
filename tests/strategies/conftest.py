from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.fsdp import FSDP1_GATHERS_STATE_ON_CPU, FSDP2_RUNS_ON_CPU
from tests.processes import run_python
from tests.strategies.training import SCENARIOS

# Their checkpoints hold the callback's state, and so they warn of its absence.
WITHOUT_CALLBACK = [f"checkpoint-{kind}-resume-2" for kind in ("ddp", "fsdp", "fsdp-sharded", "fsdp2")]

# Those who gather the whole model in one file.
WHOLE_FSDP1 = ("checkpoint-fsdp-save", "checkpoint-fsdp-resume")


def obstacle(name: str) -> str | None:
    """Why this torch cannot run a scenario on a CPU, if so."""
    if "fsdp2" in name and not FSDP2_RUNS_ON_CPU:
        return "FSDP2 calls methods that a CPU's streams do not have in this torch (2.6)"
    if name.startswith(WHOLE_FSDP1) and not FSDP1_GATHERS_STATE_ON_CPU:
        return "FSDP1 crashes on a CPU when it gathers a checkpoint in this torch (2.6)"
    return None


def launch(directory: Path, processes: int, *more: str) -> Path:
    names = [name for name, scenario in SCENARIOS.items() if scenario.processes == processes]
    names = [name for name in (*names, *more) if obstacle(name) is None]
    script = Path(__file__).with_name("training.py")
    finished = run_python(script, directory, *names, timeout=200)
    assert finished.returncode == 0, finished.stdout
    return directory


@pytest.fixture(scope="session")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes wrote down in all scenarios for two, which they run one after the other."""
    directory = tmp_path_factory.mktemp("strategies")
    return launch(directory, 2, *(f"{name}-without_callback" for name in WITHOUT_CALLBACK))


# Some go on from checkpoints of more processes, or of fewer.
@pytest.fixture(scope="session")
def four_processes(two_processes: Path) -> Path:
    return launch(two_processes, 4)


@pytest.fixture(scope="session")
def one_process(four_processes: Path) -> Path:
    return launch(four_processes, 1)


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Computes the reference with as many threads as the runs have, because half-precision sums depend on it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def directory(request: pytest.FixtureRequest, name: str) -> Path:
    """Where the processes of the test's scenario wrote down what they saw."""
    if reason := obstacle(name):
        pytest.skip(reason)
    fixture = {1: "one_process", 2: "two_processes", 4: "four_processes"}[SCENARIOS[name].processes]
    return request.getfixturevalue(fixture)
