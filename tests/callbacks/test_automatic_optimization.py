"""GradientTransform and its callbacks under automatic optimization: what moves, by how much, and when."""

from collections import OrderedDict
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.callbacks import BaseFinetuning
from torch import Tensor, nn
from torch.optim import SGD

from lightning_znorm import GradientCentralizationCallback, GradientTransform, ZNormCallback
from lightning_znorm.gradients import AffineMethod
from tests.callbacks.training import (
    LR,
    Method,
    Training,
    Weights,
    assert_every_step,
    assert_weights,
    batches,
    loss_of,
    network,
    stepped,
    weights_of,
)
from tests.gradients.reference import centralized, zscore


class RMSNorm(AffineMethod):
    """Ten lines of a user's own."""

    def affine(self, stats):
        return None, (stats.std.square() + stats.mean.abs().square()).rsqrt()


def rms_normalized(grad: Tensor) -> Tensor:
    return grad / grad.square().mean().sqrt()


def half_sign(grad: Tensor) -> Tensor:
    return torch.sign(grad) / 2


def double(grad: Tensor) -> Tensor:
    """Unlike the z-score, visible when it is applied twice."""
    return grad * 2


@pytest.mark.parametrize(
    ("callback", "method"),
    [
        (ZNormCallback(), zscore),
        (ZNormCallback(eps=0.3), lambda grad: zscore(grad, eps=0.3)),
        (GradientCentralizationCallback(), lambda grad: centralized(grad) if grad.ndim > 1 else grad),
        (GradientTransform(RMSNorm()), rms_normalized),
        (GradientTransform(half_sign), half_sign),
    ],
    ids=["znorm", "znorm-large-eps", "centralization", "own-affine-method", "own-function"],
)
def test_every_step_takes_the_transformed_gradient(fit, callback: GradientTransform, method: Method) -> None:
    module, data = Training(), batches(4)
    fit(module, data, callback)
    assert_every_step(module, data, method=method)


def test_accumulated_gradient_is_transformed_once_and_only_at_the_boundary(fit) -> None:
    module, data = Training(), batches(7)
    fit(module, data, GradientTransform(double), accumulate_grad_batches=3)
    assert module.moved == [False, False, True, False, False, True, True]
    for start, end in [(0, 3), (3, 6), (6, 7)]:
        expected = stepped(module.net, module.weights[start], data[start:end], double, accumulate=3)
        assert_weights(module.weights[end], expected)


def test_z_score_of_the_accumulated_gradient(fit) -> None:
    module, data = Training(), batches(4)
    fit(module, data, ZNormCallback(eps=0.2), accumulate_grad_batches=2)
    for start in (0, 2):
        expected = stepped(module.net, module.weights[start], data[start : start + 2], lambda g: zscore(g, eps=0.2))
        assert_weights(module.weights[start + 2], expected)


def test_each_parameter_group_keeps_its_learning_rate(fit) -> None:
    def groups(_: Any) -> SGD:
        return SGD([{"params": net.first.parameters(), "lr": 0.3}, {"params": net.last.parameters(), "lr": 0.01}])

    net, data = network(), batches(2)
    module = Training(net, groups)
    fit(module, data, ZNormCallback())
    for before, batch, after in zip(module.weights, data, module.weights[1:], strict=False):
        fast, slow = (stepped(net, before, [batch], lr=lr) for lr in (0.3, 0.01))
        assert_weights(after, {name: (fast if name.startswith("first") else slow)[name] for name in after})


def test_frozen_and_unused_parameters_stay(fit) -> None:
    net, data = network(), batches(2)
    net.first.weight.requires_grad_(False)
    net.last.unused = nn.Parameter(torch.ones(3))
    module = Training(net)
    fit(module, data, ZNormCallback())
    for before, batch, after in zip(module.weights, data, module.weights[1:], strict=False):
        expected = stepped(net, before, [batch]) | {name: before[name].double() for name in ["first.weight"]}
        assert_weights(after, expected)
    assert torch.equal(net.last.unused, torch.ones(3))


@pytest.mark.parametrize("include", ["*", "net.first.weight", "net.last.weight"])
def test_tied_weights_are_transformed_once_and_go_by_either_name(fit, include: str) -> None:
    torch.manual_seed(0)
    layers = {"first": nn.Linear(6, 6, bias=False), "tanh": nn.Tanh(), "last": nn.Linear(6, 6, bias=False)}
    net, data = nn.Sequential(OrderedDict(layers)), batches(2)
    net.last.weight = net.first.weight
    module = Training(net)
    fit(module, data, GradientTransform(double, include=include))
    assert_every_step(module, data, method=double)


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
def test_a_parameter_that_the_optimizer_holds_twice_is_transformed_once(fit) -> None:
    net = network()
    module, data = Training(net, lambda _: SGD([net.last.weight, net.last.weight], LR)), batches(1)
    fit(module, data, GradientTransform(double))
    # The optimizer takes its step twice, along a gradient that was doubled once.
    expected = stepped(net, module.weights[0], data, double, lr=2 * LR)
    assert_weights({"last.weight": net.last.weight}, {"last.weight": expected["last.weight"]})


def test_parameters_of_a_compiled_module_go_by_their_own_names(fit) -> None:
    class Compiled(Training):
        def __init__(self, net: nn.Sequential) -> None:
            super().__init__(net)
            self.compiled = torch.compile(net, backend="eager")

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return (self.compiled(batch) - 1).square().sum(1).mean()

    net, data = network(), batches(2)
    module = Compiled(net)
    # The parameters are the module's under two names: keep the compiled ones alone.
    del module.net
    object.__setattr__(module, "net", net)
    assert "compiled._orig_mod.last.weight" in dict(module.named_parameters())
    fit(module, data, ZNormCallback(include=["compiled.first.*", "compiled.last.weight"], exclude="compiled.last.*"))
    assert_every_step(module, data, chosen=lambda name: name.startswith("first"))


def test_compiled_lightning_module(fit) -> None:
    module, data = Training(), batches(2)
    fit(torch.compile(module, backend="eager"), data, ZNormCallback(include="net.*.weight"))
    assert_every_step(module, data, chosen=lambda name: name.endswith("weight"))


@pytest.mark.filterwarnings("ignore:The provided params to be frozen already exist")
def test_parameters_that_join_the_optimizer_during_training(fit) -> None:
    class Unfreeze(BaseFinetuning):
        def freeze_before_training(self, pl_module: LightningModule) -> None:
            self.freeze(pl_module.net.first)

        def finetune_function(self, pl_module: LightningModule, epoch: int, optimizer: torch.optim.Optimizer) -> None:
            if epoch == 1:
                self.unfreeze_and_add_param_group(pl_module.net.first, optimizer, lr=LR, initial_denom_lr=1.0)

    net, data = network(), batches(2)
    module = Training(net, lambda parameters: SGD((p for p in parameters if p.requires_grad), LR))
    fit(module, data, ZNormCallback(exclude="net.first.bias"), Unfreeze(), max_epochs=2)
    for number, (before, after) in enumerate(zip(module.weights, module.weights[1:], strict=False)):
        expected = stepped(net, before, [data[number % 2]], chosen=lambda name: name != "first.bias")
        if number < 2:
            expected |= {name: before[name].double() for name in ("first.weight", "first.bias")}
        assert_weights(after, expected)


def test_a_layer_that_the_model_grows_during_training_goes_by_its_name(fit) -> None:
    class Growing(Training):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.grown = nn.Parameter(torch.tensor([1.0, 2.0, 4.0]))
                self.trainer.optimizers[0].add_param_group({"params": [self.grown]})

        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            loss = super().training_step(batch, batch_idx)
            return loss + self.grown.square().sum() if self.current_epoch == 1 else loss

    for include, update in [("*", zscore(torch.tensor([2.0, 4.0, 8.0]))), ("net.*", torch.tensor([2.0, 4.0, 8.0]))]:
        module = Growing()
        fit(module, batches(1), ZNormCallback(include=include), max_epochs=2)
        expected = torch.tensor([1.0, 2.0, 4.0]) - LR * update
        torch.testing.assert_close(module.grown.detach().double(), expected.double(), rtol=0, atol=1e-6)


def test_a_parameter_that_is_not_the_modules(fit) -> None:
    class Outside(Training):
        def training_step(self, batch: Tensor, batch_idx: int) -> Tensor:
            return super().training_step(batch, batch_idx) + outside.square().sum()

    gradient = torch.tensor([2.0, 4.0, 8.0])
    for min_ndim, update in [(0, zscore(gradient)), (2, gradient)]:
        outside = nn.Parameter(torch.tensor([1.0, 2.0, 4.0]))
        module, data = Outside(optimizer=lambda own: SGD([*own, outside], LR)), batches(1)  # noqa: B023
        fit(module, data, ZNormCallback(min_ndim=min_ndim))
        assert_every_step(module, data, chosen=lambda name: name != "first.bias" or min_ndim == 0)  # noqa: B023
        expected = torch.tensor([1.0, 2.0, 4.0]) - LR * update
        torch.testing.assert_close(outside.detach().double(), expected.double(), rtol=0, atol=1e-6)


def test_optimizer_step_that_the_user_overrides_to_accumulate(fit) -> None:
    class EverySecondBatch(Training):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure) -> None:
            if batch_idx % 2:
                super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            else:
                optimizer_closure()

        def optimizer_zero_grad(self, epoch, batch_idx, optimizer) -> None:
            if batch_idx % 2 == 0:
                optimizer.zero_grad()

    module, data = EverySecondBatch(), batches(4)
    fit(module, data, GradientTransform(double))
    assert module.moved == [False, True, False, True]
    for start in (0, 2):
        expected = stepped(module.net, module.weights[start], data[start : start + 2], double, accumulate=1)
        assert_weights(module.weights[start + 2], expected)


class Stepping(Callback):
    """Takes a step of its own in a hook, and writes down the weights around it."""

    def __init__(self, hook: str) -> None:
        self.pairs: list[tuple[Weights, Weights]] = []
        setattr(self, hook, self._step)

    def _step(self, trainer, module: Training, *_: Any) -> None:
        optimizer, before = module.optimizers(), weights_of(module.net)
        optimizer.zero_grad()
        loss_of(module.net, batches(1, seed=1)[0]).backward()
        optimizer.step()
        self.pairs.append((before, weights_of(module.net)))


@pytest.mark.parametrize("hook", ["on_train_batch_start", "on_train_batch_end"])
@pytest.mark.parametrize("first", [True, False], ids=["before", "after"])
def test_additional_steps_within_a_batch(fit, hook: str, first: bool) -> None:
    module, data, stepping = Training(), batches(3), Stepping(hook)
    callbacks = [stepping, GradientTransform(double)]
    fit(module, data, *(callbacks if first else callbacks[::-1]), max_epochs=2)
    assert len(stepping.pairs) == 6
    for before, after in stepping.pairs:
        assert_weights(after, stepped(module.net, before, batches(1, seed=1), double))


def test_second_step_with_the_gradients_of_the_first(fit) -> None:
    """As without a callback, it goes on in the direction of the update."""

    class Twice(Training):
        def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure) -> None:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
            optimizer.step()

    module, data = Twice(), batches(3)
    fit(module, data, ZNormCallback())
    assert_every_step(module, data, lr=2 * LR)


def test_two_callbacks_of_one_class_share_out_the_parameters(fit) -> None:
    module, data = Training(), batches(2)
    fit(module, data, GradientTransform(double, include="net.first.*"), GradientTransform(half_sign, exclude="*first*"))
    for before, batch, after in zip(module.weights, data, module.weights[1:], strict=False):
        doubled, signed = (stepped(module.net, before, [batch], method) for method in (double, half_sign))
        assert_weights(after, {name: (doubled if name.startswith("first") else signed)[name] for name in after})


@pytest.mark.parametrize(("algorithm", "value"), [("norm", 0.5), ("value", 0.25)])
def test_clipping_bounds_the_transformed_gradients(fit, algorithm: str, value: float) -> None:
    module, data = Training(), batches(3)
    fit(module, data, ZNormCallback(), gradient_clip_val=value, gradient_clip_algorithm=algorithm)
    for before, batch, after in zip(module.weights, data, module.weights[1:], strict=False):
        z = {name: (before[name] - new) / LR for name, new in stepped(module.net, before, [batch]).items()}
        if algorithm == "norm":
            norm = torch.cat([update.flatten() for update in z.values()]).norm()
            clipped = {name: update * value / norm for name, update in z.items()}
        else:
            clipped = {name: update.clamp(-value, value) for name, update in z.items()}
        assert_weights(after, {name: before[name].double() - LR * update for name, update in clipped.items()})


@pytest.mark.filterwarnings(r"ignore:Using backward\(\) with create_graph=True")
def test_gradients_of_a_double_backward(fit) -> None:
    class Penalized(Training):
        def backward(self, loss: Tensor) -> None:
            loss.backward(create_graph=True)

    recorded = []

    def double_without_graph(grad: Tensor) -> Tensor:
        result = grad * 2
        recorded.append(result.requires_grad)
        return result

    for callback, method in [(ZNormCallback(), zscore), (GradientTransform(double_without_graph), double)]:
        module, data = Penalized(), batches(2)
        fit(module, data, callback)
        assert_every_step(module, data, method=method)
    assert recorded
    assert not any(recorded)


def test_weights_of_the_last_step_are_the_modules(fit) -> None:
    module, data = Training(), batches(1)
    fit(module, data, ZNormCallback())
    assert_weights(weights_of(module.net), stepped(module.net, module.weights[0], data))
