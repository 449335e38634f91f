"""The matrix of strategies and precisions on one CUDA device, which a process has for itself."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lightning_znorm.gradients import Centralization, ZScore
from lightning_znorm.gradients.kernels import transform_shards_
from lightning_znorm.gradients.shards import FlatShard
from tests.gradients.reference import centralized, zscore
from tests.processes import run_python
from tests.strategies.reference import check
from tests.strategies.scenarios import ON_CUDA

pytestmark = pytest.mark.gpu

# Each part runs in a program of its own, which starts CUDA once.
PARTS = {
    f"{kind}, {start}": names[start : start + 25]
    for kind in sorted({scenario.kind for scenario in ON_CUDA.values()})
    for names in [[name for name, scenario in ON_CUDA.items() if scenario.kind == kind]]
    for start in range(0, len(names), 25)
}


@pytest.fixture(autouse=True)
def all_digits(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute the reference as the runs do."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


@pytest.mark.full
@pytest.mark.parametrize("part", PARTS)
def test_steps_are_those_of_one_process(tmp_path: Path, part: str) -> None:
    if part.startswith("DeepSpeed"):
        pytest.importorskip("deepspeed", reason="needs DeepSpeed: pip install '.[deepspeed]'")
    names = PARTS[part]
    # Not forked from where the other scenarios are: there DeepSpeed has been told to use the CPU.
    finished = run_python("-m", "tests.strategies.training", tmp_path, *names, timeout=200)
    assert finished.returncode == 0, finished.stdout
    records = torch.load(tmp_path / "records.pt", weights_only=True)
    wrong = {}
    for name in names:
        record = records[name]
        try:
            assert not isinstance(record, str), record
            check(name, ON_CUDA[name], record)
        except AssertionError as error:
            wrong[name] = str(error)
    assert wrong == {}


@pytest.fixture
def nccl() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1, device_id=torch.device("cuda", 0))
    yield dist.group.WORLD
    dist.destroy_process_group()


@pytest.mark.parametrize("method", [ZScore(), Centralization()], ids=repr)
@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_group_that_cannot_communicate_from_the_cpu(nccl: dist.ProcessGroup, device: str, method) -> None:
    # Offloaded gradients are on the CPU.
    whole = torch.randn(7, 5, generator=torch.Generator().manual_seed(0))
    local = whole.flatten().to(device)
    shard = FlatShard(local=local, shape=whole.shape, device=local.device, offset=0, group=nccl)
    transform_shards_([shard], method)
    expected = zscore(whole) if isinstance(method, ZScore) else centralized(whole)
    torch.testing.assert_close(local.cpu().double().view(7, 5), expected, rtol=0, atol=1e-5)
