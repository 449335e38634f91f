"""In every precision, the weights move by the learning rate times the z-score of the true gradient."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import Adam

from lightning_znorm import GradientCentralizationCallback, GradientTransform, ZNormCallback
from tests.callbacks.training import LR, OPTIMIZERS, Training, amp, assert_every_step, assert_weights, batches, stepped
from tests.dtypes import fused_sgd_is_right
from tests.gradients.reference import centralized, zscore

pytestmark = pytest.mark.filterwarnings("ignore:GradScaler is going to stop passing itself:FutureWarning")

SCALE = 2.0**10  # small enough that nothing overflows in float16

# Trainer arguments; the largest error of a weight of about one after a step of 0.1 times a z-score.
PRECISIONS: dict[str, tuple[Callable[[], dict[str, Any]], float]] = {
    "32-true": (lambda: {"precision": "32-true"}, 1e-6),
    "64-true": (lambda: {"precision": "64-true"}, 1e-12),
    "bf16-true": (lambda: {"precision": "bf16-true"}, 1e-2),
    "16-true": (lambda: {"precision": "16-true"}, 2e-3),
    "bf16-mixed": (lambda: {"precision": "bf16-mixed"}, 5e-3),
    "16-mixed": (lambda: amp(init_scale=SCALE), 1e-3),
    "16-mixed-disabled-scaler": (lambda: amp(enabled=False), 1e-3),
}
# With a large eps a wrong scale shows; with the usual one, a wrong place for it.
EPS = pytest.mark.parametrize("eps", [1e-10, 0.3])


@EPS
@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_znorm(fit, precision: str, kind: str, eps: float) -> None:
    half = {"bf16-true": torch.bfloat16, "16-true": torch.float16}.get(precision)
    if half and kind == "fused" and not fused_sgd_is_right(half):
        pytest.skip(f"torch {torch.__version__} has a fused SGD that is wrong in {half} on the CPU")
    arguments, atol = PRECISIONS[precision]
    module, data = Training(optimizer=OPTIMIZERS[kind]), batches(4)
    fit(module, data, ZNormCallback(eps), **arguments())
    assert_every_step(module, data, atol, method=lambda grad: zscore(grad, eps))
    if precision == "16-mixed":
        assert module.scales[-1] == SCALE


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_methods_that_keep_the_scale(fit, kind: str) -> None:
    """A wrong scale multiplies their update by a thousand."""
    for callback, method in [
        (GradientCentralizationCallback(), lambda grad: centralized(grad) if grad.ndim > 1 else grad),
        (GradientTransform(lambda grad: grad.clamp(-0.2, 0.1)), lambda grad: grad.clamp(-0.2, 0.1)),
    ]:
        module, data = Training(optimizer=OPTIMIZERS[kind]), batches(3)
        fit(module, data, callback, **amp(init_scale=SCALE))
        assert_every_step(module, data, 1e-3, method=method)


@EPS
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_accumulation_under_a_scaler(fit, kind: str, eps: float) -> None:
    module, data = Training(optimizer=OPTIMIZERS[kind]), batches(5)
    fit(module, data, ZNormCallback(eps), accumulate_grad_batches=2, **amp(init_scale=SCALE))
    assert module.moved == [False, True, False, True, True]
    for start, end in [(0, 2), (2, 4), (4, 5)]:
        window = data[start:end]
        expected = stepped(module.net, module.weights[start], window, lambda g: zscore(g, eps), accumulate=2)
        assert_weights(module.weights[end], expected, 1e-3)


@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_parameters_that_are_left_out_move_by_their_true_gradient(fit, kind: str) -> None:
    module, data = Training(optimizer=OPTIMIZERS[kind]), batches(3)
    fit(module, data, ZNormCallback(include="net.first.*"), **amp(init_scale=SCALE))
    assert_every_step(module, data, 1e-3, chosen=lambda name: name.startswith("first"))


def test_scale_that_grows_between_steps(fit) -> None:
    for kind in OPTIMIZERS:
        module, data = Training(optimizer=OPTIMIZERS[kind]), batches(4)
        fit(module, data, ZNormCallback(eps=0.3), **amp(init_scale=16.0, growth_interval=1))
        assert module.scales == [32.0, 64.0, 128.0, 256.0]
        assert_every_step(module, data, 1e-3, method=lambda grad: zscore(grad, eps=0.3))


@pytest.mark.parametrize("fused", [False, True])
def test_adam(fit, fused: bool) -> None:
    """Its first step is lr * z / (|z| + eps), which shows the size of z only because this eps is large."""
    module, data = Training(optimizer=lambda own: Adam(own, LR, eps=1.0, fused=fused)), batches(1)
    fit(module, data, ZNormCallback(), **amp(init_scale=SCALE))

    def method(grad: torch.Tensor) -> torch.Tensor:
        z = zscore(grad)
        return z / (z.abs() + 1)

    assert_every_step(module, data, 1e-3, method=method)


def test_clipping_under_a_scaler_bounds_the_transformed_gradients(fit) -> None:
    module, data = Training(), batches(3)
    fit(module, data, ZNormCallback(), gradient_clip_val=0.25, gradient_clip_algorithm="value", **amp(init_scale=SCALE))
    assert_every_step(module, data, 1e-3, method=lambda grad: zscore(grad).clamp(-0.25, 0.25))


def test_clipping_of_an_optimizer_that_unscales_itself_is_refused_by_lightning_as_ever(fit) -> None:
    for callbacks in ([], [ZNormCallback()]):
        module = Training(optimizer=OPTIMIZERS["fused"])
        with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):
            fit(module, batches(1), *callbacks, gradient_clip_val=1.0, **amp())
