"""Steps that are skipped without the callback are skipped with it, and the loss scale takes the same course."""

from collections.abc import Collection
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim import SGD

from lightning_znorm import GradientTransform, ZNormCallback
from tests.callbacks.training import (
    LR,
    OPTIMIZERS,
    Training,
    amp,
    assert_weights,
    batches,
    stepped,
)
from tests.gradients.reference import zscore

pytestmark = [
    pytest.mark.filterwarnings("ignore:GradScaler is going to stop passing itself:FutureWarning"),
    pytest.mark.filterwarnings("ignore:`training_step` returned `None`"),
]

EPS = 0.3


def z(grad: Tensor) -> Tensor:
    return zscore(grad, EPS)


def with_and_without(fit, data: list[Tensor], callback: GradientTransform, kind: str, none: Collection[int] = (),
                     **arguments: Any) -> tuple[Training, Training]:  # fmt: skip
    """The module trained with the callback, and its equal trained without."""
    made = []
    for callbacks in ([callback], []):
        module = Training(optimizer=OPTIMIZERS[kind], returns_none=none)
        # A scaler keeps its state: each run has its own.
        fresh = {name: value() if callable(value) else value for name, value in arguments.items()}
        fit(module, data, *callbacks, **fresh)
        made.append(module)
    return made[0], made[1]


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("accumulate", [1, 2])
def test_overflow_in_one_batch(fit, kind: str, accumulate: int) -> None:
    data = batches(6)
    poisoned = [batch * torch.inf if index == 2 else batch for index, batch in enumerate(data)]
    ours, plain = with_and_without(
        fit, poisoned, ZNormCallback(EPS), kind, accumulate_grad_batches=accumulate,
        plugins=lambda: amp(init_scale=2.0**10, growth_interval=2)["plugins"],
    )  # fmt: skip
    assert ours.moved == plain.moved
    assert ours.moved[2:4] == ([False, True] if accumulate == 1 else [False, False])
    assert ours.scales == plain.scales
    assert max(ours.scales) > min(ours.scales)
    for end, moved in enumerate(ours.moved, 1):
        if moved:
            expected = stepped(ours.net, ours.weights[end - 1], data[end - accumulate : end], z)
            assert_weights(ours.weights[end], expected, 1e-3)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_scale_that_is_too_large_at_first(fit, kind: str) -> None:
    data = batches(14)
    ours, plain = with_and_without(
        fit, data, ZNormCallback(EPS), kind, plugins=lambda: amp(init_scale=2.0**22)["plugins"]
    )
    first = plain.moved.index(True)
    assert 3 < first < 12
    assert ours.moved == plain.moved
    assert ours.scales == plain.scales
    for start in range(first, len(data)):
        assert_weights(ours.weights[start + 1], stepped(ours.net, ours.weights[start], [data[start]], z), 1e-3)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_method_that_makes_infinities_finite_does_not_hide_an_overflow(fit, kind: str) -> None:
    data = batches(3)
    data[1] = data[1] * torch.inf

    def sign_without_nan(grad: Tensor) -> Tensor:
        return torch.sign(grad).nan_to_num()

    ours, plain = with_and_without(
        fit, data, GradientTransform(sign_without_nan), kind, plugins=lambda: amp(init_scale=2.0**10)["plugins"]
    )
    assert ours.moved == plain.moved == [True, False, True]
    assert ours.scales == plain.scales == [2.0**10, 2.0**9, 2.0**9]


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_overflow_in_a_parameter_that_is_left_out(fit, kind: str) -> None:
    class OneGradientOverflows(Training):
        def on_after_backward(self) -> None:
            if self.batch == 1:
                self.net.last.weight.grad[0, 0] = torch.inf

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            self.batch = batch_idx
            return super().training_step(batch, batch_idx)

    module = OneGradientOverflows(optimizer=OPTIMIZERS[kind])
    fit(module, batches(3), ZNormCallback(include="net.first.*"), **amp(init_scale=2.0**10))
    assert module.moved == [True, False, True]
    assert module.scales == [2.0**10, 2.0**9, 2.0**9]


@pytest.mark.parametrize(
    ("accumulate", "none"),
    [
        (1, [0]),
        (1, [2, 3]),
        (1, [5]),
        (2, [2]),  # the first of a window
        (2, [3]),  # the boundary: without a scaler, the step is taken all the same
        (2, [2, 3]),  # all of a window
        (2, [1, 2]),
        (3, [1, 2, 3]),
        (3, [5]),
        (1, range(6)),
    ],
    ids=str,
)
@pytest.mark.parametrize(
    ("precision", "kind"),
    [("32-true", "plain"), ("32-true", "fused"), *(("16-mixed", kind) for kind in OPTIMIZERS)],
    ids=lambda value: value,
)
def test_training_step_that_returns_none(
    fit, precision: str, kind: str, accumulate: int, none: Collection[int]
) -> None:
    data = batches(6)
    arguments = (
        {"plugins": lambda: amp(init_scale=2.0**8, growth_interval=2)["plugins"]}
        if precision == "16-mixed"
        else {"precision": precision}
    )
    ours, plain = with_and_without(
        fit, data, ZNormCallback(EPS), kind, none, accumulate_grad_batches=accumulate, **arguments
    )
    assert ours.moved == plain.moved
    assert ours.scales == plain.scales
    assert any(ours.moved) or len(none) == len(data)
    for end, moved in enumerate(ours.moved, 1):
        if moved:
            window = [data[index] for index in range(end - accumulate, end) if index not in none]
            expected = stepped(ours.net, ours.weights[end - 1], window, z, accumulate=accumulate)
            assert_weights(ours.weights[end], expected, 1e-6 if precision == "32-true" else 1e-3)


def test_closure_apart_from_the_step_under_a_scaler(fit) -> None:
    """Lightning neither unscales nor steps then, and goes on with the next batch."""

    class ClosureApart(Training):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure) -> None:
            if batch_idx == 0:
                optimizer_closure()
                optimizer.step()
            else:
                super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)

    module, data = ClosureApart(), batches(2)
    fit(module, data, ZNormCallback(EPS), **amp(init_scale=2.0**8))
    assert module.moved == [False, True]
    assert_weights(module.weights[2], stepped(module.net, module.weights[1], data[1:], z), 1e-3)


def test_gradients_that_are_zeroed_instead_of_dropped_let_momentum_go_on(fit) -> None:
    """As without the callback: it takes no step, or part of one, away that the user has asked for."""

    class Zeroing(Training):
        def optimizer_zero_grad(self, epoch, batch_idx, optimizer) -> None:
            optimizer.zero_grad(set_to_none=False)

    module = Zeroing(optimizer=lambda own: SGD(own, LR, momentum=0.5), returns_none=[1])
    fit(module, batches(2), ZNormCallback())
    start, first, second = module.weights
    for name in start:
        torch.testing.assert_close(second[name] - first[name], (first[name] - start[name]) / 2, rtol=0, atol=1e-6)
