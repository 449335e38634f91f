"""Reading gradients from their slots: one by one, and all at once."""

import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace

import pytest
import torch
import torch.distributed._functional_collectives
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FlatParameter
from torch.distributed.fsdp._common_utils import _set_fsdp_flattened
from torch.distributed.tensor import DTensor, Placement

from lightning_znorm import gradients
from lightning_znorm.gradients import ZScore, transform_places_, transform_slots_
from lightning_znorm.gradients.exceptions import UnsupportedGradientError
from lightning_znorm.gradients.slots import ParameterSlot, UnnamedSlots, dtensor_support, read_gradients


def param(grad: Tensor | None, shape: tuple[int, ...] = (2, 3)) -> nn.Parameter:
    made = nn.Parameter(torch.zeros(shape))
    made.grad = grad
    return made


def named(params: list[nn.Parameter]) -> list[ParameterSlot]:
    return [ParameterSlot((f"layer{index}",), p) for index, p in enumerate(params)]


class Subclass(Tensor):
    pass


ORDINARY = {
    "contiguous": lambda: torch.randn(2, 3),
    "missing": lambda: None,
    "transposed": lambda: torch.randn(3, 2).t(),
    "of a subclass": lambda: torch.randn(2, 3).as_subclass(Subclass),
}


def test_ordinary_gradients_are_found_without_places(monkeypatch: pytest.MonkeyPatch) -> None:
    params = [param(torch.randn(2, 3)), param(None), param(torch.randn(3, 2).t())]

    def refuse(slot: ParameterSlot) -> None:
        pytest.fail(f"{slot.names} was looked at")

    slots = named(params)
    monkeypatch.setattr(ParameterSlot, "read", refuse)
    for together in (slots, UnnamedSlots(params)):
        for found, own in zip(read_gradients(together), params, strict=True):
            assert found is own.grad


def test_a_place_of_its_own_kind_finds_for_itself() -> None:
    class Elsewhere(ParameterSlot):
        def read(self) -> Tensor:
            return torch.ones(2)

    found, other = read_gradients([Elsewhere(("weight",), param(torch.randn(2, 3))), *named([param(None)])])
    assert isinstance(found, Tensor)
    assert found.tolist() == [1, 1]
    assert other is None


def test_places_may_come_one_by_one() -> None:
    params = [param(torch.tensor([[1.0, 1, 1], [3, 3, 3]])), param(None)]
    transform_slots_((slot for slot in named(params)), ZScore())
    assert params[0].grad is not None
    assert params[0].grad.tolist() == [[-1, -1, -1], [1, 1, 1]]


@pytest.mark.parametrize("also", ORDINARY)
def test_all_at_once_are_those_found_one_by_one(also: str) -> None:
    params = [param(torch.randn(2, 3)), param(ORDINARY[also]())]
    for slots in (named(params), UnnamedSlots(params)):
        for found, own in zip(read_gradients(slots), params, strict=True):
            assert found is own.grad


def test_one_whose_elements_share_memory_is_copied() -> None:
    params = [param(torch.randn(2, 3)), param(torch.randn(2, 1).expand(2, 3))]
    found = read_gradients(UnnamedSlots(params))
    assert isinstance(found[1], Tensor)
    assert found[1].is_contiguous()
    assert found[1] is params[1].grad


class ShardedTensor(Tensor):
    """As if it were one of torch's own."""


@pytest.fixture(autouse=True)
def _of_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """While a test runs: jsonargparse, in other tests, imports the modules of all subclasses."""
    monkeypatch.setattr(ShardedTensor, "__module__", "torch.distributed.elsewhere")


def marked_by_fsdp() -> nn.Parameter:
    made = param(torch.zeros(2, 3))
    _set_fsdp_flattened(made)
    return made


def flat() -> nn.Parameter:
    made = FlatParameter(torch.zeros(2, 3))
    made.grad = torch.zeros(2, 3)
    return made


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: param(torch.eye(3)[:2].to_sparse()), "is sparse"),
        (marked_by_fsdp, "is sharded"),
        (flat, "is sharded"),
        (lambda: param(torch.zeros(2, 3).as_subclass(ShardedTensor)), "is a ShardedTensor of PyTorch's distributed"),
    ],
    ids=["sparse", "marked by FSDP", "flat", "distributed"],
)
def test_refused_by_name(make: Callable[[], nn.Parameter], message: str) -> None:
    params = [param(torch.randn(2, 3)), make()]
    params[0].tag = "an attribute that says nothing of gradients"  # type: ignore[attr-defined]
    read_gradients(named(params[:1]))
    message = f"gradient of (parameter 1|layer1) {message}"
    for slots in (named(params), UnnamedSlots(params)):
        with pytest.raises(UnsupportedGradientError, match=message):
            read_gradients(slots)


def test_numbers_are_those_of_the_first_occurrence() -> None:
    first, second, third = (param(torch.randn(2, 3)) for _ in range(3))
    assert [slot.names for slot in UnnamedSlots([first, first, second])] == [("parameter 0",), ("parameter 2",)]
    slots = UnnamedSlots([first, second], [second, third], names_groups=True)
    assert [slot.names for slot in slots] == [
        ("parameter 0 of group 0",),
        ("parameter 1 of group 0",),
        ("parameter 1 of group 1",),
    ]
    assert [slot.parameter for slot in slots] == [first, second, third]
    assert len(read_gradients(slots)) == 3


def test_what_is_not_a_tensor_is_named() -> None:
    with pytest.raises(TypeError, match=r"parameter 1 is not a tensor but a tuple: give model.parameters\(\)"):
        UnnamedSlots([param(None), ("weight", param(None))])  # type: ignore[list-item]


@pytest.fixture
def untried_dtensors() -> Iterator[None]:
    dtensor_support.cache_clear()
    yield
    dtensor_support.cache_clear()


@pytest.mark.usefixtures("untried_dtensors")
@pytest.mark.parametrize(
    ("owner", "name"),
    [
        *((DTensor, name) for name in ("device_mesh", "from_local", "placements", "to_local")),
        *((DeviceMesh, name) for name in ("get_coordinate", "get_group", "size")),
        *((Placement, name) for name in ("is_partial", "is_replicate")),
        (torch.distributed._functional_collectives, "AsyncCollectiveTensor"),
        (torch.distributed.tensor, "DTensor"),
    ],
)
def test_what_is_missing_of_dtensors_is_named(monkeypatch: pytest.MonkeyPatch, owner: object, name: str) -> None:
    """Before anything is changed. Otherwise such a release of torch would have shards taken for gradients."""
    monkeypatch.delitem(sys.modules, "lightning_znorm.gradients.dtensor", raising=False)
    monkeypatch.delattr(gradients, "dtensor", raising=False)
    params = [param(torch.tensor([1.0, 5.0]), (2,)), param(torch.zeros(2, 3).as_subclass(ShardedTensor))]
    with monkeypatch.context() as patch:
        patch.delattr(owner, name)
        with pytest.raises(UnsupportedGradientError, match=f"PyTorch .* does not keep gradients as .*{name}"):
            transform_slots_(named(params), ZScore())
    assert params[0].grad is not None
    assert params[0].grad.tolist() == [1, 5]


@pytest.mark.usefixtures("untried_dtensors")
@pytest.mark.parametrize(("kind", "name"), [("ShardPlacement", "dim"), ("Partial", "reduce_op")])
def test_placements_tell_what_they_stand_for(monkeypatch: pytest.MonkeyPatch, kind: str, name: str) -> None:
    module = dtensor_support()
    dtensor_support.cache_clear()
    monkeypatch.setattr(module, kind, lambda *args: SimpleNamespace())
    with pytest.raises(UnsupportedGradientError, match=f"has no {name}"):
        dtensor_support()


def test_former_name_warns_and_works() -> None:
    weight = param(torch.tensor([2.0, 6.0]), (2,))
    with pytest.warns(FutureWarning, match="transform_places_ is now called transform_slots_: version 0.2 removes"):
        transform_places_(named([weight]), ZScore())
    assert weight.grad is not None
    assert weight.grad.tolist() == [-1, 1]
