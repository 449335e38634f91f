"""attach: a method in a plain loop, with and without mixed precision."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_znorm.functional import attach
from lightning_znorm.gradients import Centralization, ZScore
from tests.gradients.reference import centralized, zscore

LR = 0.1
EPS = 0.3  # as large as the deviations, so that a wrong scale shows


class ScalerAware(torch.optim.SGD):
    """Takes the scaler in its step and always divides by the loss scale, as Transformer Engine's FusedAdam does."""

    _step_supports_amp_scaling = True

    @torch.no_grad()
    def step(self, closure: Any = None, *, grad_scaler: torch.amp.GradScaler | None = None) -> None:  # type: ignore[override]
        assert grad_scaler is not None
        if any(found.item() for found in grad_scaler._check_inf_per_device(self).values()):
            return
        for group in self.param_groups:
            for param in group["params"]:
                param.sub_(param.grad / grad_scaler._get_scale_async(), alpha=group["lr"])


def loss_of(weight: Tensor) -> Tensor:
    return (weight.sin() * torch.arange(weight.numel(), dtype=weight.dtype).view_as(weight)).sum()


def weight_and_reference(method: str = "zscore") -> tuple[nn.Parameter, Tensor]:
    """A parameter, and what it should be after one step."""
    start = torch.linspace(-1, 1, 12).view(3, 4)
    exact = start.double().requires_grad_()
    loss_of(exact).backward()
    assert exact.grad is not None
    update = zscore(exact.grad, EPS) if method == "zscore" else centralized(exact.grad)
    return nn.Parameter(start.clone()), exact.detach() - LR * update


def test_steps_by_the_z_score_until_removed() -> None:
    weight, expected = weight_and_reference()
    optimizer = torch.optim.SGD([weight], lr=LR)
    handle = attach(optimizer, ZScore(EPS))
    loss_of(weight).backward()
    optimizer.step()
    torch.testing.assert_close(weight.data.double(), expected, rtol=0, atol=1e-6)

    handle.remove()
    weight.grad = torch.ones_like(weight)  # whose z-score is zero
    before = weight.detach().clone()
    optimizer.step()
    torch.testing.assert_close(weight.data, before - LR)


def test_another_method() -> None:
    weight, expected = weight_and_reference("centralize")
    optimizer = torch.optim.SGD([weight], lr=LR)
    attach(optimizer, Centralization())
    loss_of(weight).backward()
    optimizer.step()
    torch.testing.assert_close(weight.data.double(), expected, rtol=0, atol=1e-6)


def test_default_is_znorm() -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    attach(optimizer)
    weight.grad = torch.tensor([2.0, 6.0])
    optimizer.step()
    assert weight.tolist() == [1.0, -1.0]


@pytest.mark.parametrize(
    ("kind", "unscale_first"),
    # One that takes the scaler divides a second time after unscale_, with or without us.
    [("plain", False), ("plain", True), ("fused", False), ("fused", True), ("scaler-aware", False)],
)
def test_grad_scaler(kind: str, unscale_first: bool) -> None:
    weight, expected = weight_and_reference()
    optimizer = {
        "plain": lambda: torch.optim.SGD([weight], lr=LR),
        "fused": lambda: torch.optim.SGD([weight], lr=LR, fused=True),
        "scaler-aware": lambda: ScalerAware([weight], lr=LR),
    }[kind]()
    attach(optimizer, ZScore(EPS))
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    scaler.scale(loss_of(weight)).backward()
    if unscale_first:
        scaler.unscale_(optimizer)
    if kind == "scaler-aware":
        with pytest.warns(FutureWarning, match="GradScaler is going to stop passing itself"):
            scaler.step(optimizer)
    else:
        scaler.step(optimizer)
    scaler.update()
    torch.testing.assert_close(weight.data.double(), expected, rtol=0, atol=1e-6)
    assert scaler.get_scale() == 2.0**12


@pytest.mark.parametrize("kind", ["plain", "fused", "scaler-aware"])
@pytest.mark.filterwarnings("ignore:GradScaler is going to stop:FutureWarning")
def test_overflow_is_skipped(kind: str) -> None:
    weight, _ = weight_and_reference()
    before = weight.detach().clone()
    optimizer = (
        ScalerAware([weight], lr=LR)
        if kind == "scaler-aware"
        else torch.optim.SGD([weight], lr=LR, fused=kind == "fused")
    )
    attach(optimizer)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    scaler.scale(loss_of(weight)).backward()
    weight.grad[0, 0] = torch.inf
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(weight.data, before)
    assert scaler.get_scale() == 2.0**11


@pytest.mark.parametrize("as_keyword", [False, True])
def test_closure_is_refused(as_keyword: bool) -> None:
    weight, _ = weight_and_reference()
    optimizer = torch.optim.SGD([weight], lr=LR)
    attach(optimizer)

    def closure() -> float:
        return 0.0

    with pytest.raises(RuntimeError, match=r"SGD\.step was called with a closure.*without a closure"):
        optimizer.step(closure=closure) if as_keyword else optimizer.step(closure)


def test_lbfgs_is_refused() -> None:
    with pytest.raises(ValueError, match="LBFGS"):
        attach(torch.optim.LBFGS([nn.Parameter(torch.zeros(1))]))


def test_groups_added_later_take_part() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    attach(optimizer)
    weight = nn.Parameter(torch.zeros(2))
    optimizer.add_param_group({"params": [weight]})
    weight.grad = torch.tensor([2.0, 6.0])
    optimizer.step()
    assert weight.tolist() == [1.0, -1.0]
