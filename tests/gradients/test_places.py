"""Where gradients are found: one by one, and all at once."""

import pytest
import torch
from torch import Tensor, nn

from lightning_znorm.gradients import ZScore, transform_places_
from lightning_znorm.gradients.errors import UnsupportedGradientError
from lightning_znorm.gradients.places import NumberedPlaces, ParameterPlace, find_all


def param(grad: Tensor | None, shape: tuple[int, ...] = (2, 3)) -> nn.Parameter:
    made = nn.Parameter(torch.zeros(shape))
    made.grad = grad
    return made


def named(params: list[nn.Parameter]) -> list[ParameterPlace]:
    return [ParameterPlace((f"layer{index}",), p) for index, p in enumerate(params)]


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

    def refuse(place: ParameterPlace) -> None:
        pytest.fail(f"{place.names} was looked at")

    places = named(params)
    monkeypatch.setattr(ParameterPlace, "find", refuse)
    for together in (places, NumberedPlaces(params)):
        for found, own in zip(find_all(together), params, strict=True):
            assert found is own.grad


def test_a_place_of_its_own_kind_finds_for_itself() -> None:
    class Elsewhere(ParameterPlace):
        def find(self) -> Tensor:
            return torch.ones(2)

    found, other = find_all([Elsewhere(("weight",), param(torch.randn(2, 3))), *named([param(None)])])
    assert isinstance(found, Tensor)
    assert found.tolist() == [1, 1]
    assert other is None


def test_places_may_come_one_by_one() -> None:
    params = [param(torch.tensor([[1.0, 1, 1], [3, 3, 3]])), param(None)]
    transform_places_((place for place in named(params)), ZScore())
    assert params[0].grad is not None
    assert params[0].grad.tolist() == [[-1, -1, -1], [1, 1, 1]]


@pytest.mark.parametrize("also", ORDINARY)
def test_all_at_once_are_those_found_one_by_one(also: str) -> None:
    params = [param(torch.randn(2, 3)), param(ORDINARY[also]())]
    for places in (named(params), NumberedPlaces(params)):
        for found, own in zip(find_all(places), params, strict=True):
            assert found is own.grad


def test_one_whose_elements_share_memory_is_copied() -> None:
    params = [param(torch.randn(2, 3)), param(torch.randn(2, 1).expand(2, 3))]
    found = find_all(NumberedPlaces(params))
    assert isinstance(found[1], Tensor)
    assert found[1].is_contiguous()
    assert found[1] is params[1].grad


@pytest.mark.parametrize(
    ("attribute", "grad", "message"),
    [
        (None, torch.eye(3)[:2].to_sparse(), r"gradient of (parameter 1|layer1) is sparse"),
        ("_fsdp_flattened", torch.zeros(2, 3), r"gradient of (parameter 1|layer1) is sharded"),
        ("_is_flat_param", torch.zeros(2, 3), r"gradient of (parameter 1|layer1) is sharded"),
        ("ds_id", torch.zeros(2, 3), r"gradient of (parameter 1|layer1) is sharded"),
    ],
)
def test_refused_by_name(attribute: str | None, grad: Tensor, message: str) -> None:
    params = [param(torch.randn(2, 3)), param(grad)]
    params[0].tag = "an attribute that says nothing of gradients"  # type: ignore[attr-defined]
    find_all(named(params[:1]))
    if attribute is not None:
        setattr(params[1], attribute, True)
    for places in (named(params), NumberedPlaces(params)):
        with pytest.raises(UnsupportedGradientError, match=message):
            find_all(places)


def test_numbers_are_those_of_the_first_occurrence() -> None:
    first, second, third = (param(torch.randn(2, 3)) for _ in range(3))
    assert [place.names for place in NumberedPlaces([first, first, second])] == [("parameter 0",), ("parameter 2",)]
    places = NumberedPlaces([first, second], [second, third], are_an_optimizers=True)
    assert [place.names for place in places] == [
        ("parameter 0 of group 0",),
        ("parameter 1 of group 0",),
        ("parameter 1 of group 1",),
    ]
    assert [place.parameter for place in places] == [first, second, third]
    assert len(find_all(places)) == 3


def test_what_is_not_a_tensor_is_named() -> None:
    with pytest.raises(TypeError, match=r"parameter 1 is not a tensor but a tuple: give model.parameters\(\)"):
        NumberedPlaces([param(None), ("weight", param(None))])  # type: ignore[list-item]
