"""A strategy of one's own: an adapter and a slot, which methods, measurement and checks serve as they are."""

import pytest
import torch
from torch import Tensor, nn

from lightning_znorm.gradients import NonFiniteGradientError, ZScore, transform_slots_
from lightning_znorm.gradients.adapters.plain import PlainAdapter
from lightning_znorm.gradients.apply import check_finite, measure_slots
from lightning_znorm.gradients.slots import GradientSlot
from tests.gradients.reference import wide, zscore


class MainGradSlot(GradientSlot):
    """The slot of a gradient in float32 beside a parameter in half precision, as Megatron keeps it."""

    def __init__(self, names: tuple[str, ...], parameter: Tensor) -> None:
        super().__init__(names)
        self.parameter = parameter

    @property
    def shape(self) -> torch.Size:
        return self.parameter.shape

    def read(self) -> Tensor | None:
        return getattr(self.parameter, "main_grad", None)

    def clear(self) -> None:
        del self.parameter.main_grad


class MainGradAdapter(PlainAdapter):
    def read_slots(self) -> dict[Tensor, list[GradientSlot]]:
        return {
            parameter: [MainGradSlot(slot.names, parameter) for slot in slots]
            for parameter, slots in super().read_slots().items()
        }


def test_strategy_with_gradients_of_its_own() -> None:
    model = nn.Linear(5, 3).bfloat16()
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(parameter.shape, generator=generator) for parameter in model.parameters()]
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        parameter.main_grad = grad.clone()
    adapter, optimizer = MainGradAdapter(model), torch.optim.SGD(model.parameters(), lr=0.1)
    slots = list(adapter.slots_of(optimizer))
    assert [slot.names for slot in slots] == [("weight",), ("bias",)]
    assert slots == list(adapter.slots_of(optimizer))
    assert adapter.is_complete()
    assert adapter.loss_scale() is None

    measured, stats = measure_slots(slots)
    assert measured == slots
    torch.testing.assert_close(stats.mean, torch.stack([wide(grad).mean() for grad in grads]), rtol=0, atol=1e-6)
    transform_slots_(slots, ZScore())
    for parameter, grad in zip(model.parameters(), grads, strict=True):
        torch.testing.assert_close(wide(parameter.main_grad), zscore(grad), rtol=0, atol=1e-5)

    check_finite(slots)
    model.bias.main_grad[1] = torch.nan
    with pytest.raises(NonFiniteGradientError, match="gradients of bias"):
        check_finite(slots)
    slots[1].clear()
    check_finite(slots)
