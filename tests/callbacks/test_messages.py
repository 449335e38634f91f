"""What the callback says, when, and how often."""

import logging
import re
import warnings
from collections.abc import Callable, Iterator

import pytest
from torch import Tensor
from torch.optim import LBFGS, SGD

from lightning_znorm import GradientCentralizationCallback, ZNormCallback
from tests.callbacks.training import LR, ManualTraining, Training, assert_every_step, batches, loss_of, network


@pytest.fixture
def said(caplog: pytest.LogCaptureFixture) -> Iterator[Callable[[], list[str]]]:
    """The callback's lines in the log so far."""
    # Lightning's logger hands nothing up to the root unless that had a handler when lightning was imported.
    logger = logging.getLogger("lightning.pytorch")
    propagate, logger.propagate = logger.propagate, True
    yield lambda: [line for line in caplog.messages if "Callback" in line]
    logger.propagate = propagate


@pytest.fixture
def warned() -> Iterator[Callable[[], list[str]]]:
    """The callback's warnings so far; an error for those of others, as everywhere."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", ".*Callback")
        yield lambda: [str(warning.message) for warning in caught]


def bypass(module: ManualTraining, batch: Tensor) -> None:
    optimizer = module.optimizers(use_pl_optimizer=False)
    optimizer.zero_grad()
    module.manual_backward(loss_of(module.net, batch))
    optimizer.step()


def test_clipping_is_mentioned_once(fit, said) -> None:
    fit(Training(), batches(2), ZNormCallback(), gradient_clip_val=0.5, max_epochs=3)
    assert said() == [
        "ZNormCallback: gradient clipping (gradient_clip_val=0.5) follows and bounds the transformed gradients."
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


@pytest.mark.parametrize(
    "callback", [ZNormCallback(), GradientCentralizationCallback()], ids=lambda callback: type(callback).__name__
)
def test_bypassed_optimizer_warns_once_after_the_first_epoch(fit, warned, callback) -> None:
    seen = []

    class Watching(ManualTraining):
        def on_train_epoch_start(self) -> None:
            seen.append(len(warned()))

    module = Watching(bypass)
    fit(module, batches(2), callback, max_epochs=3)
    assert all(module.moved)
    assert seen == [0, 1, 1]
    assert len(warned()) == 1
    assert f"{type(callback).__name__} has seen no optimizer step in this epoch" in warned()[0]
    assert "self.optimizers()" in warned()[0]
    assert "lightning_znorm.functional.attach(optimizer)" in warned()[0]


def test_bypass_that_begins_in_a_later_epoch_warns(fit, warned) -> None:
    def script(module: ManualTraining, batch: Tensor) -> None:
        optimizer = module.optimizers(use_pl_optimizer=module.current_epoch == 0)
        module.manual_backward(loss_of(module.net, batch))
        optimizer.step()

    fit(ManualTraining(script), batches(2), ZNormCallback(), max_epochs=3)
    assert len(warned()) == 1


def test_what_the_warning_of_bypassed_optimizers_advises_works(fit, warned) -> None:
    from lightning_znorm.functional import attach

    def configure(own) -> SGD:
        optimizer = SGD(own, LR)
        attach(optimizer)
        return optimizer

    module, data = ManualTraining(bypass, optimizer=configure), batches(2)
    fit(module, data)
    assert_every_step(module, data)


def test_inner_step_is_a_bypass_too(fit, warned) -> None:
    def script(module: ManualTraining, batch: Tensor) -> None:
        optimizer = module.optimizers()
        optimizer.zero_grad()
        module.manual_backward(loss_of(module.net, batch))
        optimizer.optimizer.step()

    fit(ManualTraining(script), batches(2), ZNormCallback())
    assert len(warned()) == 1


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
        (ZNormCallback(), GradientCentralizationCallback(), "GradientCentralizationCallback transforms what ZNorm.*"),
        (GradientCentralizationCallback(), ZNormCallback(), "ZNormCallback transforms what GradientCentr.*"),
        (ZNormCallback(), ZNormCallback(1e-3, include="*weight"), "first.weight and 1 more"),
        (ZNormCallback(include="*bias"), ZNormCallback(exclude="*weight"), "first.bias: the result is neither"),
    ],
)
def test_two_methods_for_the_same_parameters_warn_once(fit, warned, first, second, message: str) -> None:
    fit(Training(), batches(2), first, second, max_epochs=2)
    (warning,) = warned()
    assert re.search(message, warning)


def test_two_methods_for_different_parameters_are_silent(fit, warned) -> None:
    fit(Training(), batches(2), ZNormCallback(include="*bias"), GradientCentralizationCallback(exclude="*bias"))
    assert warned() == []
