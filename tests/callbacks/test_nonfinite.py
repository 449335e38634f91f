"""Inf and NaN: let through as PyTorch does, or an error before the update that names parameter, step and rank."""

from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor
from torch.optim import SGD

from lightning_znorm import GradientCentralizationCallback, GradientTransform, ZNormCallback
from lightning_znorm.gradients import NonFiniteGradientError
from tests.callbacks import nonfinite_training
from tests.callbacks.training import LR, OPTIMIZERS, ManualTraining, Training, amp, batches, loss_of, weights_of
from tests.distributed import run_distributed
from tests.fsdp import needs_fsdp2_on_cpu

NAMES = ["net.first.weight", "net.first.bias", "net.last.weight"]
CALLBACKS = [ZNormCallback, GradientCentralizationCallback, partial(GradientTransform, torch.neg)]


class Spoiled(Training):
    """Whose gradients hold a value at step 2, those of one parameter or of all through the loss."""

    def __init__(self, value: float, parameter: str | None = None, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.value = value
        self.parameter = parameter

    def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
        loss = loss_of(self.net, batch)
        return loss * self.value if batch_idx == 2 and self.parameter is None else loss

    def on_after_backward(self) -> None:
        if self.trainer.global_step == 2 and self.parameter is not None:
            grad = self.get_parameter(self.parameter).grad
            assert grad is not None
            grad.view(-1)[-1] = self.value


def assert_stopped(fit, module: Training, names: list[str], *callbacks: GradientTransform, **kwargs: Any) -> None:
    """At step 2, before its update, with these names in the message and no others."""
    with pytest.raises(NonFiniteGradientError) as caught:
        fit(module, batches(4), *callbacks, **kwargs)
    assert f"inf or NaN in the gradients of {', '.join(names)} (global step 2, rank 0)" in str(caught.value)
    assert len(module.weights) == 3
    left = weights_of(module.net)
    assert all(torch.equal(left[name], weight) for name, weight in module.weights[-1].items())


@pytest.mark.parametrize("callback", CALLBACKS[:2])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_loss(fit, callback, value: float) -> None:
    assert_stopped(fit, Spoiled(value), NAMES, callback(error_if_nonfinite=True))


@pytest.mark.parametrize("callback", CALLBACKS)
def test_layer(fit, callback) -> None:
    assert_stopped(fit, Spoiled(torch.nan, NAMES[2]), NAMES[2:], callback(error_if_nonfinite=True))


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan])
def test_parameter_that_is_left_out(fit, value: float) -> None:
    callback = ZNormCallback(exclude="*bias", error_if_nonfinite=True)
    assert_stopped(fit, Spoiled(value, NAMES[1]), NAMES[1:2], callback)


def test_what_the_method_itself_makes(fit) -> None:
    """Deviations that overflow make a z-score of NaN, though the gradient is finite."""
    assert_stopped(fit, Spoiled(1e30, NAMES[0]), NAMES[:1], ZNormCallback(error_if_nonfinite=True))


def test_finite_gradients_whose_norm_overflows_pass(fit) -> None:
    module = Spoiled(1e30, NAMES[2])
    fit(module, batches(3), GradientCentralizationCallback(error_if_nonfinite=True))
    assert module.moved == [True] * 3
    assert all(weight.isfinite().all() for weight in module.weights[-1].values())


def test_optimizer_keeps_its_state(fit) -> None:
    module = Spoiled(torch.nan, optimizer=partial(SGD, lr=LR, momentum=0.9))
    assert_stopped(fit, module, NAMES, ZNormCallback(error_if_nonfinite=True))
    momenta = [state["momentum_buffer"] for state in module.trainer.optimizers[0].state.values()]
    assert len(momenta) == 3
    assert all(momentum.isfinite().all() for momentum in momenta)


@pytest.mark.parametrize("callback", CALLBACKS)
def test_by_default_they_pass_as_without_the_callback(fit, callback) -> None:
    module = Spoiled(torch.nan)
    fit(module, batches(4), callback())
    assert all(weight.isnan().all() for weight in module.weights[-1].values())


def test_manual_optimization(fit) -> None:
    def script(module: LightningModule, batch: Tensor) -> None:
        optimizer = module.optimizers()
        optimizer.zero_grad()
        (loss_of(module.net, batch) * (torch.nan if module.trainer.global_step == 2 else 1)).backward()
        optimizer.step()

    assert_stopped(fit, ManualTraining(script), NAMES, ZNormCallback(error_if_nonfinite=True))


SCALED = pytest.mark.filterwarnings("ignore:GradScaler is going to stop passing itself:FutureWarning")


@SCALED
@pytest.mark.parametrize("kind", OPTIMIZERS)
def test_step_that_the_scaler_skips_is_no_error(fit, kind: str) -> None:
    runs = []
    for callbacks in ([ZNormCallback(error_if_nonfinite=True)], []):
        module = Spoiled(torch.inf, optimizer=OPTIMIZERS[kind])
        fit(module, batches(4), *callbacks, **amp(init_scale=2.0**10))
        runs.append((module.moved, module.scales))
    assert runs[0] == runs[1]
    assert runs[0][0] == [True, True, False, True]


@SCALED
@pytest.mark.parametrize("kind", ["plain", "fused"])
def test_nan_that_the_scaler_does_not_see(fit, kind: str) -> None:
    """The scaler looks at the gradients before the method changes them."""

    class Poison(GradientTransform):
        def __init__(self) -> None:
            super().__init__(lambda grad: grad * (torch.nan if self.steps == 2 else 1.0), error_if_nonfinite=True)
            self.steps = -1

        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx) -> None:
            super().on_train_batch_start(trainer, pl_module, batch, batch_idx)
            self.steps = trainer.global_step

    module = Training(optimizer=OPTIMIZERS[kind])
    assert_stopped(fit, module, NAMES, Poison(), **amp(init_scale=2.0**10))


def test_many_parameters_are_counted(fit) -> None:
    net = torch.nn.Sequential(*(torch.nn.Linear(6, 6, bias=False) for _ in range(8)))
    with pytest.raises(NonFiniteGradientError, match=r"net.0.weight, .*, net.4.weight and 3 more \(global step 2"):
        fit(Spoiled(torch.nan, net=net), batches(4), ZNormCallback(error_if_nonfinite=True))


@pytest.mark.parametrize("strategy", ["ddp", "fsdp", pytest.param("fsdp2", marks=needs_fsdp2_on_cpu)])
def test_two_processes_stop_together(strategy: str) -> None:
    """In a sharded model, only one of them sees the NaN."""
    for rank, result in enumerate(run_distributed(nonfinite_training.train, strategy)):
        assert f"inf or NaN in the gradients of net.weight (global step 1, rank {rank})" in result["message"]
        assert result["batches"] == 1
        assert result["unchanged"]
        assert result["sees it"] == (strategy == "ddp" or rank == 1)
