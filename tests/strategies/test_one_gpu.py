"""The matrix of strategies and precisions on one CUDA device, which a process has for itself."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lightning_znorm.gradients import Centralization, ZScore
from lightning_znorm.gradients.kernels import affine_shards_
from lightning_znorm.gradients.shards import FlatShard
from tests.gradients.reference import centralized, zscore
from tests.processes import run_python
from tests.strategies import deepspeed_reference, deepspeed_training, reference, training

pytestmark = pytest.mark.gpu

KINDS = sorted({scenario.kind for scenario in training.ON_CUDA.values()})


@pytest.fixture(autouse=True)
def all_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Computes the reference as the runs do."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


def launch(directory: Path, script: str, *arguments: str) -> Path:
    path = Path(__file__).with_name(script)
    finished = run_python(path, directory, *arguments, timeout=90)
    assert finished.returncode == 0, finished.stdout
    return directory


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, kind: str) -> Path:
    """What a process wrote down in all scenarios of a kind, which it runs one after the other."""
    names = [name for name, scenario in training.ON_CUDA.items() if scenario.kind == kind]
    return launch(tmp_path_factory.mktemp("cuda"), "training.py", *names)


def test_steps_are_those_of_one_process(runs: Path, kind: str) -> None:
    wrong = {}
    for name, scenario in training.ON_CUDA.items():
        if scenario.kind == kind:
            (record,) = reference.records(runs, name, 1)
            try:
                assert "error" not in record, record["error"]
                reference.check(name, scenario, record)
            except AssertionError as error:
                wrong[name] = str(error)
    assert wrong == {}


@pytest.fixture(scope="module")
def deepspeed_runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("deepspeed")
    return launch(tmp_path_factory.mktemp("cuda"), "deepspeed_training.py", "1", *deepspeed_training.ON_CUDA)


@pytest.mark.parametrize("name", deepspeed_training.ON_CUDA)
def test_steps_under_deepspeed(deepspeed_runs: Path, name: str) -> None:
    record = deepspeed_reference.records(deepspeed_runs, name, 1)[0]
    deepspeed_reference.check(deepspeed_training.ON_CUDA[name], record, processes=1)


@pytest.fixture
def nccl() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=torch.device("cuda", 0))
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("method", [ZScore(), Centralization()], ids=repr)
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_group_that_cannot_communicate_from_the_cpu(nccl: dist.ProcessGroup, device: str, method) -> None:
    # As gradients that are offloaded.
    whole = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    local = whole.flatten().to(device)
    shard = FlatShard(local=local, shape=whole.shape, device=local.device, offset=0, group=nccl)
    affine_shards_([shard], method)
    expected = zscore(whole) if isinstance(method, ZScore) else centralized(whole)
    torch.testing.assert_close(local.cpu().double().view(7, 5), expected, rtol=0, atol=1e-5)
