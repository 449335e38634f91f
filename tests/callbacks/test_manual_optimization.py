"""The callback under manual optimization: only the stepping optimizer's gradients, whatever the order of events."""

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from lightning_znorm import GradientTransform, ZNormCallback
from tests.callbacks.training import (
    LR,
    OPTIMIZERS,
    ManualTraining,
    amp,
    assert_every_step,
    assert_weights,
    batches,
    loss_of,
    network,
    stepped,
)
from tests.gradients.reference import zscore

EPS = 0.3  # of the order of the deviations: a wrong scale shows


def z(grad: Tensor) -> Tensor:
    return zscore(grad, EPS)


def double(grad: Tensor) -> Tensor:
    return grad * 2


def step_once(module: ManualTraining, batch: Tensor) -> None:
    optimizer = module.optimizers()
    optimizer.zero_grad()
    module.manual_backward(loss_of(module.net, batch))
    optimizer.step()


def one_optimizer_per_layer(net: nn.Sequential, kind: str = "plain"):
    return lambda _: [OPTIMIZERS[kind](net.first.parameters()), OPTIMIZERS[kind](net.last.parameters())]


def test_one_optimizer(fit) -> None:
    module, data = ManualTraining(step_once), batches(3)
    fit(module, data, ZNormCallback(EPS))
    assert_every_step(module, data, method=z)


def test_backward_of_ones_own(fit) -> None:
    def script(module: ManualTraining, batch: Tensor) -> None:
        optimizer = module.optimizers()
        optimizer.zero_grad()
        loss_of(module.net, batch).backward()
        optimizer.step()

    module, data = ManualTraining(script), batches(3)
    fit(module, data, ZNormCallback(EPS))
    assert_every_step(module, data, method=z)


@pytest.mark.parametrize("kind", ["plain", "fused"])
@pytest.mark.parametrize("arguments", [dict, lambda: amp(init_scale=2.0**8)], ids=["32", "16-mixed"])
def test_step_that_follows_in_the_next_batch(fit, kind: str, arguments) -> None:
    def script(module: ManualTraining, batch: Tensor) -> None:
        optimizer = module.optimizers()
        if module.net.last.weight.grad is not None:
            optimizer.step()
            optimizer.zero_grad()
        module.manual_backward(loss_of(module.net, batch))

    module, data = ManualTraining(script, optimizer=OPTIMIZERS[kind]), batches(3)
    fit(module, data, ZNormCallback(EPS), **arguments())
    assert module.moved == [False, True, True]
    for before, batch, after in zip(module.weights[1:], data, module.weights[2:], strict=False):
        assert_weights(after, stepped(module.net, before, [batch], z), 1e-3 if arguments() else 1e-6)


def test_accumulation(fit) -> None:
    def script(module: ManualTraining, batch: Tensor) -> None:
        module.manual_backward(loss_of(module.net, batch))
        module.batches = getattr(module, "batches", 0) + 1
        if module.batches % 2 == 0:
            module.optimizers().step()
            module.optimizers().zero_grad()

    module, data = ManualTraining(script), batches(4)
    fit(module, data, GradientTransform(double))
    assert module.moved == [False, True, False, True]
    for start in (0, 2):
        expected = stepped(module.net, module.weights[start], data[start : start + 2], double, accumulate=1)
        assert_weights(module.weights[start + 2], expected)


def test_closure_runs_once_and_its_gradients_are_transformed(fit) -> None:
    runs = []

    def script(module: ManualTraining, batch: Tensor) -> None:
        optimizer = module.optimizers()

        def closure() -> None:
            runs.append(batch)
            optimizer.zero_grad()
            module.manual_backward(loss_of(module.net, batch))

        optimizer.step(closure=closure)

    module, data = ManualTraining(script), batches(3)
    fit(module, data, ZNormCallback(EPS))
    assert_every_step(module, data, method=z)
    assert len(runs) == 3


def test_only_the_stepping_optimizers_gradients_change(fit) -> None:
    seen = []

    def script(module: ManualTraining, batch: Tensor) -> None:
        first, last = module.optimizers()
        first.zero_grad()
        last.zero_grad()
        module.manual_backward(loss_of(module.net, batch))  # leaves gradients in both
        before = module.net.last.weight.grad.clone(), module.net.last.weight.detach().clone()
        first.step()
        seen.append((before, (module.net.last.weight.grad.clone(), module.net.last.weight.detach().clone())))
        last.step()

    net, data = network(), batches(3)
    module = ManualTraining(script, net=net, optimizer=one_optimizer_per_layer(net))
    fit(module, data, GradientTransform(double))
    assert_every_step(module, data, method=double)  # each once
    for (grad, weight), (grad_after, weight_after) in seen:
        assert torch.equal(grad, grad_after)
        assert torch.equal(weight, weight_after)


class GAN(nn.Module):
    """A generator and a discriminator of samples of six numbers."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.generator = nn.Linear(6, 6, bias=False)
        self.discriminator = nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))

    def loss(self, player: str, batch: Tensor) -> Tensor:
        if player == "generator":
            return self.discriminator(self.generator(batch)).square().sum(1).mean()
        return (self.discriminator(self.generator(batch).detach()) - self.discriminator(batch)).sin().sum(1).mean()


@pytest.mark.parametrize("toggle", [False, True], ids=["stale-gradients", "toggled"])
@pytest.mark.parametrize("precision", ["32", "16-mixed", "16-mixed-fused"])
def test_gan(fit, precision: str, toggle: bool) -> None:
    """Each player moves by the z-score of its own gradient, taken at the weights that it met."""
    kind = "fused" if precision.endswith("fused") else "plain"
    seen: list[tuple[str, Tensor, dict[str, Tensor], dict[str, Tensor]]] = []

    def configure(_):
        return [OPTIMIZERS[kind](module.net.generator.parameters()),
                OPTIMIZERS[kind](module.net.discriminator.parameters())]  # fmt: skip

    def script(module: ManualTraining, batch: Tensor) -> None:
        for player, optimizer in zip(["generator", "discriminator"], module.optimizers(), strict=True):
            if toggle:
                module.toggle_optimizer(optimizer)
            before = {name: param.detach().clone() for name, param in module.net.named_parameters()}
            loss = module.net.loss(player, batch)
            optimizer.zero_grad()
            module.manual_backward(loss)  # the generator's reaches the discriminator too
            optimizer.step()
            after = {name: param.detach().clone() for name, param in module.net.named_parameters()}
            seen.append((player, batch, before, after))
            if toggle:
                module.untoggle_optimizer(optimizer)

    module, data = ManualTraining(script, net=GAN(), optimizer=configure), batches(3)
    arguments = amp(init_scale=2.0**10, growth_interval=4) if precision.startswith("16") else {}
    fit(module, data, ZNormCallback(EPS), **arguments)

    assert len(seen) == 6
    twin = GAN().double()
    for player, batch, before, after in seen:
        twin.load_state_dict(before)
        own = {name: param for name, param in twin.named_parameters() if name.startswith(player)}
        grads = torch.autograd.grad(twin.loss(player, batch.double()), list(own.values()))
        expected = {name: weight.double() for name, weight in before.items()}
        for name, grad in zip(own, grads, strict=True):
            expected[name] = expected[name] - LR * z(grad)
        assert_weights(after, expected, atol=1e-6 if precision == "32" else 2e-3)
    if precision.startswith("16"):
        # One update of the scale per optimizer step, as without the callback.
        assert module.scales == [2.0**10, 2.0**11, 2.0**11]


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:GradScaler is going to stop passing itself:FutureWarning")
def test_overflow_of_one_of_two_optimizers_skips_its_step_alone(fit, kind: str) -> None:
    def script(module: ManualTraining, batch: Tensor) -> None:
        for index, optimizer in enumerate(module.optimizers()):
            module.toggle_optimizer(optimizer)
            loss = loss_of(module.net, batch)
            optimizer.zero_grad()
            module.manual_backward(loss * (torch.inf if index == 1 and batch is data[1] else 1))
            optimizer.step()
            module.untoggle_optimizer(optimizer)

    scales = []
    for callbacks in ([], [ZNormCallback(EPS)]):
        net, data = network(), batches(3)
        module = ManualTraining(script, net=net, optimizer=one_optimizer_per_layer(net, kind))
        fit(module, data, *callbacks, **amp(init_scale=2.0**10))
        scales.append(module.scales)
    assert scales[0] == scales[1] == [2.0**10, 2.0**9, 2.0**9]
    before, after = module.weights[1:3]
    expected = stepped(net, before, [data[1]], z)
    assert_weights(after, expected | {"last.weight": before["last.weight"].double()}, atol=2e-3)


def test_one_optimizer_steps_twice_as_often(fit) -> None:
    def script(module: ManualTraining, batch: Tensor) -> None:
        first, last = module.optimizers()
        for optimizer in (first, last, first):
            first.zero_grad()
            last.zero_grad()
            module.manual_backward(loss_of(module.net, batch))
            optimizer.step()

    net, data = network(), batches(2)
    module = ManualTraining(script, net=net, optimizer=one_optimizer_per_layer(net))
    fit(module, data, ZNormCallback(EPS))
    for before, batch, after in zip(module.weights, data, module.weights[1:], strict=False):
        expected = before
        for layer in ("first", "last", "first"):
            step = stepped(net, expected, [batch], z)
            expected = {name: step[name] if name.startswith(layer) else expected[name].double() for name in before}
        assert_weights(after, expected)


@pytest.mark.parametrize("steps_per_batch", [1, 3])
def test_lr_scheduler_of_ones_own_sees_every_step(fit, steps_per_batch: int) -> None:
    """The callback adds no step and takes none away."""
    counted = []

    class Counting(SGD):
        def step(self, closure=None):
            counted.append(self)
            return super().step(closure)

    def script(module: ManualTraining, batch: Tensor) -> None:
        for _ in range(steps_per_batch):
            step_once(module, batch)

    def configure(parameters) -> Optimizer:
        return Counting(parameters, LR)

    trainer = fit(ManualTraining(script, optimizer=configure), batches(2), ZNormCallback())
    assert len(counted) == trainer.global_step == 2 * steps_per_batch
