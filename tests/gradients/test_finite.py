"""error_if_nonfinite in a plain loop: what is an error and what is not, and what the check costs."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from lightning_znorm.functional import attach, centralize_grads_, transform_grads_, zscore_grads_
from lightning_znorm.gradients import NonFiniteGradientError, ZScore

FUNCTIONS: list[Callable[..., None]] = [
    zscore_grads_,
    centralize_grads_,
    lambda parameters, **kwargs: transform_grads_(parameters, torch.neg, **kwargs),
]
DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64]


def parameters(*grads: Tensor | None) -> list[nn.Parameter]:
    made = []
    for grad in grads:
        parameter = nn.Parameter(torch.zeros(3, 4) if grad is None else torch.zeros_like(grad))
        parameter.grad = grad
        made.append(parameter)
    return made


def spoiled(value: float, dtype: torch.dtype = torch.float32) -> Tensor:
    grad = torch.linspace(-1, 1, 12).view(3, 4).to(dtype)
    grad[2, 1] = value
    return grad


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_the_parameter_is_named(function: Callable[..., None], dtype: torch.dtype, value: float) -> None:
    grads = spoiled(0.5), None, spoiled(value, dtype), spoiled(0.5, dtype), torch.zeros(0)
    with pytest.raises(NonFiniteGradientError, match=r"in the gradients of parameter 2 \(rank 0\)"):
        function(parameters(*grads), error_if_nonfinite=True)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_one_element(function: Callable[..., None]) -> None:
    with pytest.raises(NonFiniteGradientError, match="parameter 0"):
        function(parameters(torch.tensor(torch.inf)), error_if_nonfinite=True)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_by_default_they_pass(function: Callable[..., None]) -> None:
    (parameter,) = parameters(spoiled(torch.nan))
    function(parameter)
    assert parameter.grad is not None
    assert parameter.grad[2, 1].isnan()


@pytest.mark.parametrize("dtype", DTYPES)
def test_large_numbers_are_finite(dtype: torch.dtype) -> None:
    """Their norm is infinite."""
    largest = torch.finfo(dtype).max / 2
    grads = [torch.tensor([largest, -largest, largest, largest], dtype=dtype) for _ in range(2)]
    transform_grads_(parameters(*grads), torch.neg, error_if_nonfinite=True)


def test_nothing_to_look_at() -> None:
    zscore_grads_(parameters(None), error_if_nonfinite=True)
    zscore_grads_([], error_if_nonfinite=True)


class Waits(TorchFunctionMode):
    """Notes what would wait for a device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.__name__ in ("__bool__", "__float__", "__int__", "cpu", "item", "nonzero", "numpy", "tolist"):
            self.seen.append(func.__name__)
        return func(*args, **(kwargs or {}))


def test_one_wait_however_many_parameters() -> None:
    for count, dtypes in ((1, DTYPES[:1]), (100, DTYPES[:1]), (40, DTYPES)):
        grads = [spoiled(0.5, dtypes[i % len(dtypes)]) for i in range(count)]
        with Waits() as without:  # on the CPU, where there is nothing to wait for, the kernel reads its numbers
            zscore_grads_(parameters(*(grad.clone() for grad in grads)))
        with Waits() as waits:
            zscore_grads_(parameters(*grads), error_if_nonfinite=True)
        assert waits.seen == [*without.seen, "tolist"]


@pytest.mark.parametrize("fused", [False, True])
def test_attached_stops_before_the_update(fused: bool) -> None:
    given = parameters(spoiled(0.5), spoiled(torch.nan))
    optimizer = torch.optim.SGD(given, lr=1.0, momentum=0.9, fused=fused)
    attach(optimizer, ZScore(), error_if_nonfinite=True)
    with pytest.raises(NonFiniteGradientError, match="parameter 1 of group 0"):
        optimizer.step()
    assert not any(parameter.any() for parameter in given)
    assert not optimizer.state


@pytest.mark.parametrize("fused", [False, True])
def test_attached_lets_the_scaler_skip(fused: bool) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    (parameter,) = given = parameters(None)
    optimizer = torch.optim.SGD(given, lr=1.0, fused=fused)
    attach(optimizer, error_if_nonfinite=True)
    for value, moves in ((torch.inf, False), (3.0, True)):
        optimizer.zero_grad()
        scaler.scale((parameter * spoiled(value)).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        assert bool(parameter.any()) == moves
    assert scaler.get_scale() == 2.0
