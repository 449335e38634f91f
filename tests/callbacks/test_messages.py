"""What the callback says, when, and how often."""

import re

import pytest
import torch
from torch import Tensor
from torch.optim import LBFGS, SGD

from lightning_znorm import GradientCentralizationCallback, GradientTransform, SINGCallback, ZNormCallback
from tests.callbacks.training import LR, ManualTraining, Training, assert_every_step, batches, loss_of, network


def bypass(module: ManualTraining, batch: Tensor) -> None:
    optimizer = module.optimizers(use_pl_optimizer=False)
    optimizer.zero_grad()
    module.manual_backward(loss_of(module.net, batch))
    optimizer.step()


def test_clipping_is_mentioned_once(fit, said) -> None:
    fit(Training(), batches(2), ZNormCallback(), gradient_clip_val=0.5, max_epochs=3)
    assert said() == [
        "ZNormCallback: gradient clipping (gradient_clip_val=0.5) runs afterwards and bounds the transformed gradients."
    ]


@pytest.mark.parametrize("value", [None, 0.0])
def test_no_clipping_is_not_mentioned(fit, said, value: float | None) -> None:
    fit(Training(), batches(2), ZNormCallback(), gradient_clip_val=value)
    assert said() == []


def test_lbfgs_runs_with_one_warning(fit, warned) -> None:
    evaluations = []

    class Counting(Training):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            evaluations.append(batch_idx)
            return super().training_step(batch, batch_idx)

    module, data = Counting(optimizer=lambda own: LBFGS(own, lr=1e-3, max_iter=3)), batches(2)
    fit(module, data, ZNormCallback(), max_epochs=2)
    assert len(warned()) == 1
    assert "LBFGS searches along the true gradient" in warned()[0]
    assert "ZScore(eps=1e-10)" in warned()[0]
    assert all(module.moved)
    assert len(evaluations) > 4


def test_lbfgs_evaluates_the_z_score(fit, warned) -> None:
    """With one iteration, and a step as long as min(1, 1 / |z|_1) * lr, it is gradient descent."""
    module, data = Training(optimizer=lambda own: LBFGS(own, lr=1.0, max_iter=1)), batches(1)
    fit(module, data, ZNormCallback())
    before, after = module.weights
    moves = {name: before[name] - after[name] for name in before}
    # The direction is z over all parameters, scaled to an absolute sum of one.
    z = {name: move * (before[name].numel() / move.norm().square()).sqrt() for name, move in moves.items()}
    total = sum(update.abs().sum() for update in z.values())
    assert_every_step(module, data, 1e-6, lr=1 / float(total))


def test_what_the_warning_of_bypassed_optimizers_advises_works(fit, warned) -> None:
    from lightning_znorm.functional import attach

    def configure(own) -> SGD:
        optimizer = SGD(own, LR)
        attach(optimizer)
        return optimizer

    module, data = ManualTraining(bypass, optimizer=configure), batches(2)
    fit(module, data)
    assert_every_step(module, data)


@pytest.mark.parametrize(
    "arguments",
    [
        {"max_epochs": 2},
        {"max_steps": 1},
        {"accumulate_grad_batches": 10},
        {"limit_train_batches": 0},
        {"fast_dev_run": True},
        {"fast_dev_run": 2},
        {"max_epochs": 0},
        {"val_check_interval": 1},
    ],
    ids=str,
)
def test_normal_runs_are_silent(fit, said, warned, arguments) -> None:
    fit(Training(), batches(3), ZNormCallback(), **arguments)
    assert warned() == []
    assert said() == []


def test_epoch_that_the_user_skips_is_silent(fit, warned) -> None:
    class Skipping(Training):
        def on_train_batch_start(self, batch: Tensor, batch_idx: int) -> int | None:
            return -1 if self.current_epoch == 0 else None

    module = Skipping()
    fit(module, batches(2), ZNormCallback(), max_epochs=2)
    assert module.moved == [True, True]
    assert warned() == []


def test_manual_optimization_of_one_of_two_optimizers_is_silent(fit, warned) -> None:
    def script(module: ManualTraining, batch: Tensor) -> None:
        first, _ = module.optimizers()
        first.zero_grad()
        module.manual_backward(loss_of(module.net, batch))
        first.step()

    net = network()
    module = ManualTraining(script, net=net, optimizer=lambda _: [SGD(layer.parameters(), LR) for layer in net[::2]])
    fit(module, batches(2), ZNormCallback())
    assert warned() == []


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            ZNormCallback(),
            GradientCentralizationCallback(),
            "GradientCentralizationCallback transforms .* after ZNormCallback, which",
        ),
        (
            GradientCentralizationCallback(),
            ZNormCallback(),
            "ZNormCallback transforms .* after GradientCentralizationCallback, which",
        ),
        (ZNormCallback(), GradientTransform(torch.sign, include="*weight"), "first.weight and 1 more"),
        (
            ZNormCallback(include="*bias"),
            SINGCallback(exclude="*weight"),
            "first.bias after .*: the result belongs to neither",
        ),
    ],
)
def test_two_methods_for_the_same_parameters_warn_once(fit, warned, first, second, message: str) -> None:
    fit(Training(), batches(2), first, second, max_epochs=2)
    (warning,) = warned()
    assert re.search(message, warning)


def test_two_methods_for_different_parameters_are_silent(fit, warned) -> None:
    fit(Training(), batches(2), ZNormCallback(include="*bias"), GradientCentralizationCallback(exclude="*bias"))
    assert warned() == []
