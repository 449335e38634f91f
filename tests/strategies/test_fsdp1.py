"""Where FSDP1 keeps gradients, in a process of its own."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel

from lightning_znorm.gradients.fsdp1 import FSDP1Source

pytestmark = pytest.mark.filterwarnings(
    "ignore:FSDP is switching to use `NO_SHARD`", "ignore:The `NO_SHARD` sharding strategy is deprecated"
)


@pytest.fixture
def process_group() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_one_gradient_of_a_flat_one_is_dropped(use_orig_params: bool) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=use_orig_params)
    wrapped(torch.randn(4, 3)).square().sum().backward()
    places = {place.names: place for place in FSDP1Source(model, wrapped).places()}
    assert list(places) == [("0.weight",), ("0.bias",), ("1.weight",), ("1.bias",)]
    before = {names: _elements(place) for names, place in places.items()}
    assert all(elements.any() for elements in before.values())
    places["0.bias",].drop()
    optimizer = torch.optim.SGD(wrapped.parameters(), 0.1)
    weights = _weights(wrapped)
    optimizer.step()
    moved = {name: not torch.equal(weights[name], weight) for name, weight in _weights(wrapped).items()}
    assert moved == {"0.weight": True, "0.bias": False, "1.weight": True, "1.bias": True}


def _elements(place) -> torch.Tensor:
    found = place.find()
    return (found if isinstance(found, torch.Tensor) else found.local).clone()


def _weights(wrapped: FullyShardedDataParallel) -> dict[str, torch.Tensor]:
    with FullyShardedDataParallel.summon_full_params(wrapped):
        return {
            name.removeprefix("_fsdp_wrapped_module."): param.detach().clone()
            for name, param in wrapped.module.named_parameters()
        }
