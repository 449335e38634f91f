"""Where FSDP1 keeps gradients, in a process of its own."""

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, _common_utils, _flat_param

from lightning_znorm.functional import zscore_grads_
from lightning_znorm.gradients import UnsupportedGradientError
from lightning_znorm.gradients.adapters.fsdp1 import FSDP1Adapter

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
    slots = {slot.names: slot for slot in FSDP1Adapter(model, wrapped).slots()}
    assert list(slots) == [("0.weight",), ("0.bias",), ("1.weight",), ("1.bias",)]
    before = {names: _elements(slot) for names, slot in slots.items()}
    assert all(elements.any() for elements in before.values())
    slots["0.bias",].clear()
    optimizer = torch.optim.SGD(wrapped.parameters(), 0.1)
    weights = _weights(wrapped)
    optimizer.step()
    moved = {name: not torch.equal(weights[name], weight) for name, weight in _weights(wrapped).items()}
    assert moved == {"0.weight": True, "0.bias": False, "1.weight": True, "1.bias": True}


def _trained(use_orig_params: bool) -> tuple[nn.Module, FullyShardedDataParallel]:
    """A model and its wrapper, after a backward pass."""
    model = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 2))
    wrapped = FullyShardedDataParallel(model, device_id=torch.device("cpu"), use_orig_params=use_orig_params)
    wrapped(torch.randn(4, 3)).square().sum().backward()
    return model, wrapped


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("use_orig_params", [True, False])
def test_its_parameters_are_told_by_torchs_own_names(monkeypatch: pytest.MonkeyPatch, use_orig_params: bool) -> None:
    """They are found by torch's functions, whatever the attribute is called that marks them. A missing name is told."""
    monkeypatch.setattr(_common_utils, "FSDP_FLATTENED", "_renamed")
    _, wrapped = _trained(use_orig_params)
    plain = nn.Parameter(torch.zeros(2))
    plain.grad = torch.tensor([1.0, 5.0])
    plain.tag = "an attribute that says nothing of gradients"  # type: ignore[attr-defined]
    before = [param.grad.clone() for param in wrapped.parameters() if param.grad is not None]
    with pytest.raises(UnsupportedGradientError, match="is sharded by DeepSpeed or by the first version of FSDP"):
        zscore_grads_([plain, *wrapped.parameters()])
    for owner, name in (
        (torch.distributed.fsdp, "FlatParameter"),
        (_common_utils, "_is_fsdp_flattened"),
        (_flat_param, "_set_fsdp_flattened"),
    ):
        with monkeypatch.context() as patch:
            patch.delattr(owner, name)
            with pytest.raises(UnsupportedGradientError, match=f"sharded .* cannot be told .*{name}"):
                zscore_grads_([plain, *wrapped.parameters()])
    assert plain.grad.tolist() == [1, 5]
    for old, param in zip(before, wrapped.parameters(), strict=True):
        assert param.grad is not None
        assert torch.equal(param.grad, old)
    # Without the class there is no FSDP1.
    monkeypatch.delattr(torch.distributed.fsdp, "FullyShardedDataParallel")
    monkeypatch.delattr(_common_utils, "_is_fsdp_flattened")
    zscore_grads_(plain)
    assert plain.grad.tolist() == [-1, 1]


NEEDED = {
    "wrapper": ["_handle"],
    "handle": ["_fully_sharded_module", "flat_param", "process_group", "uses_sharded_strategy", "world_size"],
    "flat": [
        "_contiguities",
        "_fqns",
        "_param_extensions",
        "_params",
        "_shapes",
        "_shard_param_infos",
        "_shared_param_infos",
        "_strides",
    ],
    "interval": ["in_shard", "intra_param_start_idx", "numel_in_shard", "offset_in_shard"],
}


class Without:
    """An object that lacks an attribute, or has others."""

    def __init__(self, original: object, lacking: str | None, **others: object) -> None:
        self._original, self._lacking, self._others = original, lacking, others

    def __getattr__(self, name: str) -> object:
        if name == self._lacking:
            raise AttributeError(name)
        return self._others[name] if name in self._others else getattr(self._original, name)


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize(("owner", "name"), [(owner, name) for owner, names in NEEDED.items() for name in names])
def test_what_is_needed_and_missing_is_named(monkeypatch: pytest.MonkeyPatch, owner: str, name: str) -> None:
    model, wrapped = _trained(True)
    assert len(list(FSDP1Adapter(model, wrapped).slots())) == 4
    lacking: dict[str, str | None] = dict.fromkeys(NEEDED) | {owner: name}
    handle = wrapped._handle
    assert handle is not None
    intervals = [Without(interval, lacking["interval"]) for interval in handle.flat_param._shard_param_infos]
    flat = Without(handle.flat_param, lacking["flat"], _shard_param_infos=intervals)
    wrapper = Without(wrapped, lacking["wrapper"], _handle=Without(handle, lacking["handle"], flat_param=flat))
    monkeypatch.setattr(FullyShardedDataParallel, "fsdp_modules", lambda module: [wrapper])
    with pytest.raises(UnsupportedGradientError, match=f"PyTorch .* does not keep gradients as .* has no {name}"):
        FSDP1Adapter(model, wrapped)


def test_model_that_is_not_wrapped_is_refused() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(UnsupportedGradientError, match="no FullyShardedDataParallel is found in the Linear"):
        FSDP1Adapter(model, model)


def _elements(slot) -> torch.Tensor:
    found = slot.read()
    return (found if isinstance(found, torch.Tensor) else found.local).clone()


def _weights(wrapped: FullyShardedDataParallel) -> dict[str, torch.Tensor]:
    with FullyShardedDataParallel.summon_full_params(wrapped):
        return {
            name.removeprefix("_fsdp_wrapped_module."): param.detach().clone()
            for name, param in wrapped.module.named_parameters()
        }
