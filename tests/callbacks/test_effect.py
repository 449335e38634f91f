"""A callback that does nothing says so after the first steps; one that does its work, or may yet, says nothing."""

import contextlib
import re
from collections.abc import Callable
from functools import partial

import pytest
import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import BaseFinetuning, EMAWeightAveraging
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import Tensor, nn
from torch.optim import SGD, Optimizer

from lightning_znorm import GradientMonitor, GradientTransform, ZNormCallback
from lightning_znorm.callbacks.missed_steps import FIRST_STEPS, MissedSteps
from lightning_znorm.functional import attach
from lightning_znorm.gradients.adapters.plain import PlainAdapter
from lightning_znorm.gradients.slots import ParameterFilter
from tests.callbacks.training import (
    LR,
    OPTIMIZERS,
    ManualTraining,
    Training,
    amp,
    assert_every_step,
    assert_weights,
    batches,
    loss_of,
    network,
    stepped,
)

BATCHES = FIRST_STEPS + 2


@pytest.fixture(autouse=True)
def no_pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(GradientMonitor, "_draw", lambda *_: None)


class Counting(Callback):
    """Counts the warnings after each batch."""

    def __init__(self, warned: Callable[[], list[str]]) -> None:
        self.warned = warned
        self.counts: list[int] = []

    def on_train_batch_end(self, *_) -> None:
        self.counts.append(len(self.warned()))


class InBackward(Training):
    """Steps in the backward pass, as in PyTorch's tutorial, which leaves no gradients behind."""

    def configure_optimizers(self) -> Optimizer:
        self.each = [SGD([parameter], LR) for parameter in self.parameters()]
        for parameter, optimizer in zip(self.parameters(), self.each, strict=True):

            def step(_: Tensor, optimizer: Optimizer = optimizer) -> None:
                optimizer.step()
                optimizer.zero_grad()

            parameter.register_post_accumulate_grad_hook(step)
        return SGD(self.parameters(), LR)


class ManuallyInBackward(InBackward):
    """Gives Lightning the optimizers that step in the backward pass, and never steps them itself."""

    automatic_optimization = False

    def training_step(self, batch: Tensor, batch_idx: int) -> None:
        self.manual_backward(loss_of(self.net, batch))

    def configure_optimizers(self) -> list[Optimizer]:
        super().configure_optimizers()
        return self.each


class MasterSGD(SGD):
    """Fills gradients of its own in `step`, those of copies in double precision."""

    def __init__(self, parameters) -> None:
        self.trained = list(parameters)
        super().__init__([parameter.detach().double().requires_grad_() for parameter in self.trained], LR)

    def step(self, closure=None):
        loss = None if closure is None else closure()
        masters = self.param_groups[0]["params"]
        for parameter, master in zip(self.trained, masters, strict=True):
            master.grad = parameter.grad.double()
        super().step()
        with torch.no_grad():
            for parameter, master in zip(self.trained, masters, strict=True):
                parameter.copy_(master)
                parameter.grad = None
        return loss


class LoRA(nn.Module):
    """A frozen layer, and two small ones that train beside it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.base = nn.Linear(6, 3).requires_grad_(False)
        self.down, self.up = nn.Linear(6, 2, bias=False), nn.Linear(2, 3, bias=False)

    def forward(self, batch: Tensor) -> Tensor:
        return self.base(batch) + self.up(self.down(batch))


def trainable(parameters) -> SGD:
    return SGD([parameter for parameter in parameters if parameter.requires_grad], LR)


def weights_alone(parameters) -> SGD:
    return SGD([parameter for parameter in parameters if parameter.ndim == 2], LR)


FROZEN = r"none of the 2 parameters that are chosen by the pattern 'net\.base\.\*' \(net\.base\.weight and 1 more\) .*"


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (InBackward, {}, r"of optimizer 0 \(SGD\), none of its 3 chosen parameters .* inside the backward pass"),
        (
            lambda: Training(optimizer=MasterSGD),
            {},
            r"of optimizer 0 \(MasterSGD\), none of its 3 .*\(parameter 0 of group 0 and 2 more\)",
        ),
        (lambda: Training(LoRA(), trainable), {"include": "net.base.*"}, FROZEN + r"They are frozen \(requires_grad"),
        (lambda: Training(LoRA()), {"include": "net.base.*"}, r"its 2 chosen parameters.*They are frozen"),
        (lambda: Training(LoRA(), trainable), {"include": ["net.up.*", "net.base.*"]}, FROZEN + "They are frozen"),
        (
            lambda: Training(optimizer=weights_alone),
            {"include": ["*.bias", "*.weight"]},
            r"none of the 1 parameter that .* '\*\.bias' \(net\.first\.bias\) .*They are in no optimizer",
        ),
        (
            lambda: Training(optimizer=lambda own: SGD([one for one in own if one.ndim == 1], LR)),
            {"min_ndim": 2},
            r"none of the 2 parameters .* '\*' \(net\.first\.weight and 1 more\) .*They are in no optimizer",
        ),
    ],
    ids=["in-backward", "master-gradients", "frozen", "frozen-in-optimizer", "frozen-too", "no-optimizer", "min_ndim"],
)
def test_no_gradient_to_be_found(fit, warned, make, options, message: str) -> None:
    module, counting, callbacks = make(), Counting(warned), [GradientMonitor(**options), ZNormCallback(**options)]
    fit(module, batches(BATCHES), *callbacks, counting, max_epochs=2, log_every_n_steps=1)
    assert all(module.moved)
    assert counting.counts[FIRST_STEPS - 2 : FIRST_STEPS + 1] == [0, 2, 2]
    for callback, verb, warning in zip(callbacks, ["shown", "transformed"], warned(), strict=True):
        assert f"{type(callback).__name__}: in the first {FIRST_STEPS} steps" in warning
        assert re.search(message, warning), warning
        assert f"had a gradient before the step that could be {verb}." in warning


@pytest.mark.parametrize("zeroed", [False, True], ids=["of-the-step-before", "none"])
@pytest.mark.parametrize("own_backward", [False, True])
def test_master_gradients_in_manual_optimization(fit, warned, zeroed: bool, own_backward: bool) -> None:
    """What is there before a step may be left from the one before. Lightning does not know of each backward pass."""

    def script(module: ManualTraining, batch: Tensor) -> None:
        optimizer = module.optimizers()
        if zeroed:
            optimizer.zero_grad()
        loss = loss_of(module.net, batch)
        loss.backward() if own_backward else module.manual_backward(loss)
        optimizer.step()

    fit(ManualTraining(script, optimizer=MasterSGD), batches(BATCHES), ZNormCallback())
    (warning,) = warned()
    assert "in the first 10 steps" in warning
    assert ("none of its 3 chosen parameters (parameter 0 of group 0 and 2 more)" in warning) == zeroed
    assert ("none of the 3 parameters that are chosen by the pattern '*' (net.first.weight" in warning) != zeroed
    assert "computes its gradients in `step`" in warning


def bypass(optimizer: Optimizer, module: ManualTraining, batch: Tensor) -> None:
    optimizer.zero_grad()
    module.manual_backward(loss_of(module.net, batch))
    optimizer.step()


def inner(module: ManualTraining, batch: Tensor) -> None:
    bypass(module.optimizers().optimizer, module, batch)


def raw(module: ManualTraining, batch: Tensor) -> None:
    bypass(module.optimizers(use_pl_optimizer=False), module, batch)


def second_raw(module: ManualTraining, batch: Tensor) -> None:
    bypass(module.optimizers()[0], module, batch)
    bypass(module.optimizers(use_pl_optimizer=False)[1], module, batch)


def alternating(module: ManualTraining, batch: Tensor) -> None:
    module.count = getattr(module, "count", 0) + 1
    bypass(module.optimizers(use_pl_optimizer=module.count % 2 == 0), module, batch)


def two_optimizers(net: nn.Sequential, kind: str = "plain") -> Callable:
    return lambda _: [OPTIMIZERS[kind](net.first.parameters()), OPTIMIZERS[kind](net.last.parameters())]


@pytest.mark.parametrize(
    ("script", "several", "name", "batch"),
    [
        (inner, False, "optimizer 0", 10),
        (raw, False, "optimizer 0", 10),
        (second_raw, True, "optimizer 1", 10),
        (alternating, False, "optimizer 0", 19),
    ],
    ids=["inner", "raw", "second-of-two", "every-other-step"],
)
def test_steps_past_lightning(fit, warned, script, several: bool, name: str, batch: int) -> None:
    net, counting = network(), Counting(warned)
    kind = {"optimizer": two_optimizers(net)} if several else {}
    callbacks = GradientMonitor(), ZNormCallback(), counting
    fit(ManualTraining(script, net=net, **kind), batches(20), *callbacks, max_epochs=2, log_every_n_steps=1)
    monitors, znorms = warned()
    assert f"GradientMonitor: {name} (SGD) stepped past Lightning 10 times, with gradients that were not s" in monitors
    assert f"ZNormCallback: {name} (SGD) stepped past Lightning 10 times, with gradients that were not tr" in znorms
    assert "attach(optimizer)" in znorms
    assert "attach(optimizer)" not in monitors
    assert counting.counts[batch - 2 : batch] == [0, 2]


@pytest.mark.parametrize("script", [inner, raw])
def test_less_than_the_first_steps_are_judged_after_the_epoch(fit, warned, script) -> None:
    counting = Counting(warned)
    fit(ManualTraining(script), batches(2), ZNormCallback(), counting, max_epochs=3)
    assert counting.counts == [0, 0, 1, 1, 1, 1]


def test_bypass_that_begins_in_a_later_epoch(fit, warned) -> None:
    def script(module: ManualTraining, batch: Tensor) -> None:
        bypass(module.optimizers(use_pl_optimizer=module.current_epoch == 0), module, batch)

    fit(ManualTraining(script), batches(2), ZNormCallback(), max_epochs=3)
    assert len(warned()) == 1


def test_optimizers_that_step_in_backward_and_are_lightnings(fit, warned) -> None:
    module = ManuallyInBackward()
    fit(module, batches(BATCHES), ZNormCallback())
    (warning,) = warned()
    assert "optimizer 0 (SGD), optimizer 1 (SGD), optimizer 2 (SGD) stepped past Lightning" in warning


@pytest.mark.filterwarnings("ignore:`LightningModule.configure_optimizers` returned `None`")
def test_no_optimizer_at_all_is_said_at_once(fit, warned) -> None:
    class Own(ManuallyInBackward):
        def configure_optimizers(self) -> None:
            super().configure_optimizers()

    counting = Counting(warned)
    fit(Own(), batches(BATCHES), ZNormCallback(), counting)
    assert counting.counts == [1] * BATCHES
    assert "gives Lightning no optimizer with parameters, so no gradient will be transformed" in warned()[0]


def test_optimizer_that_runs_no_hooks(fit, warned) -> None:
    class Wrapper(Optimizer):
        """Does not call torch's __init__, as timm's Lookahead and PostLocalSGDOptimizer."""

        def __init__(self, inner: Optimizer) -> None:
            self.inner, self.param_groups, self.state, self.defaults = inner, inner.param_groups, inner.state, {}

        def step(self, closure=None):
            return self.inner.step(closure)

        def zero_grad(self, set_to_none: bool = True) -> None:
            self.inner.zero_grad(set_to_none)

    fit(Training(optimizer=lambda own: Wrapper(SGD(own, LR))), batches(2), ZNormCallback())
    assert warned() == []
    module = ManualTraining(inner, optimizer=lambda own: Wrapper(SGD(own, LR)))
    fit(module, batches(2), ZNormCallback(), max_epochs=2)
    (warning,) = warned()
    assert "3 parameters (net.first.weight and 2 more) changed in this epoch without a step that Lightn" in warning


class OfItsOwn(Training):
    """Steps a part by an optimizer of which Lightning does not know."""

    def __init__(self) -> None:
        super().__init__(optimizer=lambda _: SGD(self.net.last.parameters(), LR))
        self.own = SGD(self.net.first.parameters(), LR)

    def on_before_optimizer_step(self, optimizer: Optimizer) -> None:
        self.own.step()
        self.own.zero_grad()


class Registered(Training):
    """Has copies of its weights among its parameters, with gradients that an optimizer fills in its step."""

    def __init__(self) -> None:
        super().__init__(optimizer=self.master)

    def master(self, _) -> Optimizer:
        optimizer = MasterSGD(self.net.parameters())
        self.masters = nn.ParameterList(optimizer.param_groups[0]["params"])
        optimizer.param_groups[0]["params"] = list(self.masters)
        return optimizer

    def optimizer_zero_grad(self, *_) -> None:
        self.net.zero_grad()


@pytest.mark.parametrize(
    ("make", "names"), [(OfItsOwn, "net.first.weight and 1 more"), (Registered, "net.first.weight and 2 more")]
)
def test_parameters_that_change_without_a_step_of_lightnings(fit, warned, make, names: str) -> None:
    fit(make(), batches(3), GradientMonitor(), ZNormCallback(), max_epochs=3, log_every_n_steps=1)
    for warning, verb in zip(warned(), ["shown", "transformed"], strict=True):
        assert f"({names}) changed in this epoch without a step that Lightning knows of" in warning
        assert f"If an optimizer changed them, it did so with gradients that were not {verb}. " in warning


def test_an_optimizer_of_its_own_with_an_attached_method(fit, warned) -> None:
    module = OfItsOwn()
    attach(module.own)
    fit(module, batches(3), ZNormCallback(), max_epochs=2)
    assert warned() == []


class SAM(Optimizer):
    """Climbs, and descends by an optimizer of its own; not by `step`."""

    def __init__(self, parameters) -> None:
        super().__init__(parameters, {"rho": 0.05})
        self.base_optimizer = SGD(self.param_groups, LR)

    def first_step(self) -> None:
        pass

    def second_step(self) -> None:
        self.base_optimizer.step()

    def step(self, closure=None) -> None:
        raise AssertionError


class Composite(Optimizer):
    """Whose parts are stepped one by one."""

    def __init__(self, parameters) -> None:
        parameters = list(parameters)
        super().__init__(parameters, {})
        self.parts = [SGD([parameter], LR) for parameter in parameters]


def in_two_steps(module: ManualTraining, batch: Tensor) -> None:
    optimizer = module.optimizers()
    for step in (optimizer.first_step, optimizer.second_step):
        optimizer.zero_grad()
        module.manual_backward(loss_of(module.net, batch))
        step()


def by_parts(module: ManualTraining, batch: Tensor) -> None:
    module.optimizers().zero_grad()
    module.manual_backward(loss_of(module.net, batch))
    for part in module.optimizers().parts:
        part.step()


def test_optimizers_inside_of_others_are_stepped(fit, warned) -> None:
    fit(ManualTraining(by_parts, optimizer=Composite), batches(2), ZNormCallback(), max_epochs=3)
    (warning,) = warned()
    assert "3 parameters (net.first.weight and 2 more) changed in this epoch without a step that Lightn" in warning


def test_an_optimizer_of_two_steps_is_said_at_once(fit, warned) -> None:
    counting = Counting(warned)
    fit(ManualTraining(in_two_steps, optimizer=SAM), batches(3), ZNormCallback(), counting, max_epochs=2)
    assert counting.counts[0] == 1
    assert "SAM takes two steps: it climbs along one gradient and descends along another" in warned()[0]


def test_an_attached_optimizer_of_two_steps(fit, warned) -> None:
    module = ManualTraining(in_two_steps, optimizer=SAM)

    class Attaching(Callback):
        def on_fit_start(self, trainer, pl_module) -> None:
            attach(trainer.optimizers[0].base_optimizer)

    fit(module, batches(3), Attaching(), ZNormCallback(), max_epochs=2)
    assert warned() == []


def test_a_step_that_raised_hides_no_bypass(fit, warned) -> None:
    """An optimizer's hook after the step does not run then."""

    def script(module: ManualTraining, batch: Tensor) -> None:
        def closure() -> Tensor:
            optimizer.zero_grad()
            loss = loss_of(module.net, batch)
            module.manual_backward(loss)
            module.count += 1
            if module.count == 1:
                raise MemoryError
            return loss

        optimizer = module.optimizers(use_pl_optimizer=False)
        with contextlib.suppress(MemoryError):
            optimizer.step(closure)

    module = ManualTraining(script)
    module.count = 0
    fit(module, batches(BATCHES), ZNormCallback())
    (warning,) = warned()
    assert "stepped past Lightning" in warning


def through_lightning(module: ManualTraining, batch: Tensor) -> None:
    bypass(module.optimizers(), module, batch)


@pytest.mark.parametrize("make", [Training, lambda: ManualTraining(through_lightning)], ids=["automatic", "manual"])
def test_a_step_without_gradients_misses_nothing(fit, warned, make) -> None:
    """As to have an optimizer step before its scheduler."""

    class First(Callback):
        def on_train_start(self, trainer, pl_module) -> None:
            for optimizer in trainer.optimizers:
                optimizer.step()

    fit(make(), batches(BATCHES), First(), ZNormCallback(), GradientMonitor(), log_every_n_steps=1)
    assert warned() == []


@pytest.mark.parametrize("kind", ["its base class's", "the one it replaces"])
def test_step_that_calls_another_is_one_step(fit, warned, monkeypatch: pytest.MonkeyPatch, kind: str) -> None:
    """torch runs the hooks of both."""
    SGD([nn.Parameter(torch.zeros(1))], LR)  # which has torch put its hooks around the step
    step = SGD.step
    if kind == "the one it replaces":
        monkeypatch.setattr(SGD, "step", lambda self, closure=None: step(self, closure))
    optimizer = OPTIMIZERS["scaler-taking" if kind == "its base class's" else "plain"]
    module, data = Training(optimizer=optimizer), batches(BATCHES)
    fit(module, data, ZNormCallback())
    assert_every_step(module, data)
    assert warned() == []


# What is no silent no-op


def never(module: ManualTraining, batch: Tensor) -> None:
    """An optimizer that waits for its turn."""
    bypass(module.optimizers()[0], module, batch)


def nothing_yet(module: ManualTraining, batch: Tensor) -> None:
    """Collects, and then trains."""
    module.count = getattr(module, "count", 0) + 1
    for optimizer in module.optimizers():
        if module.count > FIRST_STEPS + 1:
            module.manual_backward(loss_of(module.net, batch))
        optimizer.step()
        optimizer.zero_grad()


def toggled(module: ManualTraining, batch: Tensor) -> None:
    for optimizer in module.optimizers():
        module.toggle_optimizer(optimizer)
        bypass(optimizer, module, batch)
        module.untoggle_optimizer(optimizer)


@pytest.mark.parametrize("include", ["*", "net.last.*", ["net.first.*", "net.last.*"]], ids=str)
@pytest.mark.parametrize("script", [never, nothing_yet, toggled])
def test_optimizer_that_has_not_stepped_yet(fit, warned, script, include) -> None:
    net = network()
    module = ManualTraining(script, net=net, optimizer=two_optimizers(net))
    callbacks = ZNormCallback(include=include), GradientMonitor(include=include)
    fit(module, batches(2 * FIRST_STEPS), *callbacks, max_epochs=2, log_every_n_steps=1)
    assert warned() == []


class FullBatch(ManualTraining):
    """Steps once an epoch, after the callbacks have seen its end."""

    def __init__(self) -> None:
        super().__init__(lambda module, batch: module.manual_backward(loss_of(module.net, batch)))

    def on_train_epoch_end(self) -> None:
        self.optimizers().step()
        self.optimizers().zero_grad()


class Late(Training):
    """Only looks at gradients in the first epoch and in the last one."""

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure) -> None:
        if epoch == 1:
            super().optimizer_step(epoch, batch_idx, optimizer, optimizer_closure)
        else:
            optimizer_closure()


def across_epochs(module: ManualTraining, batch: Tensor) -> None:
    module.count = getattr(module, "count", 0) + 1
    module.manual_backward(loss_of(module.net, batch))
    if module.count % 5 == 0:
        module.optimizers().step()
        module.optimizers().zero_grad()


@pytest.mark.parametrize(
    "make", [FullBatch, lambda: ManualTraining(across_epochs), Late], ids=["full-batch", "across-epochs", "late"]
)
@pytest.mark.parametrize("others", [[], [partial(EMAWeightAveraging, decay=0.5)]], ids=["alone", "EMA"])
def test_epochs_without_a_step(fit, warned, make, others) -> None:
    """They miss nothing, also where another callback swaps the weights for a validation."""
    module = make()
    callbacks = [*(other() for other in others), ZNormCallback(), GradientMonitor()]
    fit(module, batches(3), *callbacks, max_epochs=3, log_every_n_steps=1)
    assert any(module.moved)
    assert warned() == []


def test_weights_that_are_clipped_in_epochs_of_another_optimizer(fit, warned) -> None:
    """As of a critic, which has gradients in the epochs of the generator."""

    def script(module: ManualTraining, batch: Tensor) -> None:
        bypass(module.optimizers()[module.current_epoch % 2], module, batch)
        with torch.no_grad():
            module.net.first.weight.clamp_(-0.1, 0.1)

    net = network()
    fit(ManualTraining(script, net=net, optimizer=two_optimizers(net)), batches(3), ZNormCallback(), max_epochs=4)
    assert warned() == []


def test_parameters_in_no_optimizer_that_have_gradients(fit, warned) -> None:
    """As under a probe, whose backbone has not been frozen."""
    net = network()
    module = Training(net, optimizer=lambda _: SGD(net.last.parameters(), LR))
    fit(module, batches(BATCHES), ZNormCallback(), max_epochs=2)
    assert warned() == []


def test_optimizer_that_is_put_in_the_place_of_another(fit, warned) -> None:
    class Replacing(Training):
        def on_train_epoch_start(self) -> None:
            if self.current_epoch == 1:
                self.trainer.strategy.optimizers = [SGD(self.parameters(), 2 * LR)]

    module, data = Replacing(), batches(BATCHES)
    fit(module, data, ZNormCallback(), GradientMonitor(), max_epochs=3, log_every_n_steps=1)
    before, after = module.weights[BATCHES : BATCHES + 2]
    assert_weights(after, stepped(module.net, before, data[:1], lr=2 * LR))
    assert warned() == []


def test_frozen_layer_that_was_made_in_inference_mode(fit, warned) -> None:
    with torch.inference_mode():
        frozen = nn.Linear(6, 6).requires_grad_(False)
    fit(Training(nn.Sequential(frozen, network()), trainable), batches(BATCHES), ZNormCallback())
    assert warned() == []


@pytest.mark.parametrize("kind", OPTIMIZERS)
@pytest.mark.filterwarnings("ignore:GradScaler is going to stop passing itself:FutureWarning")
def test_steps_that_the_scaler_skips(fit, kind: str) -> None:
    module = Training(optimizer=OPTIMIZERS[kind])
    fit(module, [batch * torch.inf for batch in batches(BATCHES)], ZNormCallback(), **amp())
    assert not any(module.moved)


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("precision", [dict, amp], ids=["32", "16-mixed"])
@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_training_steps_that_return_none(fit, accumulate: int, precision) -> None:
    module = Training(returns_none=range(3 * BATCHES))
    fit(module, batches(3 * BATCHES), ZNormCallback(), accumulate_grad_batches=accumulate, **precision())
    assert not any(module.moved)


class Unfreezing(BaseFinetuning):
    def freeze_before_training(self, module) -> None:
        self.freeze(module.net.first)

    def finetune_function(self, module, epoch: int, optimizer: Optimizer) -> None:
        if epoch == 2:
            self.make_trainable(module.net.first)
            held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
            if missing := [one for one in module.net.first.parameters() if id(one) not in held]:
                optimizer.add_param_group({"params": missing})


@pytest.mark.parametrize("optimizer", [trainable, OPTIMIZERS["plain"]], ids=["added-later", "held-while-frozen"])
def test_parameters_that_are_frozen_at_first(fit, optimizer) -> None:
    module, data = Training(optimizer=optimizer), batches(BATCHES)
    fit(module, data, Unfreezing(), ZNormCallback(include="net.first.*"), max_epochs=3)
    before, after = module.weights[2 * BATCHES : 2 * BATCHES + 2]
    assert_weights(after, stepped(module.net, before, data[:1], chosen=lambda name: name.startswith("first")))


def test_branch_that_is_seldom_used(fit, warned) -> None:
    class Branches(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.usual, self.seldom = nn.Linear(6, 3), nn.Linear(6, 3)
            self.count = 0

        def forward(self, batch: Tensor) -> Tensor:
            self.count += 1
            return (self.seldom if self.count % 7 == 0 else self.usual)(batch)

    fit(Training(Branches()), batches(BATCHES), ZNormCallback(include=["net.seldom.*", "net.usual.*"]))
    assert warned() == []


def test_bypass_by_an_optimizer_of_other_parameters(fit, warned) -> None:
    net = network()
    module = ManualTraining(second_raw, net=net, optimizer=two_optimizers(net))
    fit(module, batches(BATCHES), ZNormCallback(include="net.first.*"))
    assert warned() == []


def test_bypass_with_an_attached_method(fit, warned) -> None:
    """What the warning advises."""
    net, data = network(), batches(BATCHES)

    def configure(_) -> list[Optimizer]:
        optimizers = two_optimizers(net)(None)
        attach(optimizers[1])
        return optimizers

    fit(ManualTraining(second_raw, net=net, optimizer=configure), data, ZNormCallback())
    assert warned() == []


def test_exclude_pattern_for_what_does_not_train(fit, warned) -> None:
    fit(Training(LoRA(), trainable), batches(BATCHES), ZNormCallback(exclude="net.base.*"))
    assert warned() == []


# The user's optimizers


@pytest.mark.parametrize("fails", [False, True])
def test_optimizers_are_left_as_they_were(fit, fails: bool) -> None:
    class Failing(Training):
        def on_train_batch_end(self, *_) -> None:
            assert len(own._optimizer_step_post_hooks) == 3
            if fails:
                raise RuntimeError("user's own")

    def configure(parameters) -> Optimizer:
        nonlocal own
        own = SGD(parameters, LR)
        own.register_step_post_hook(lambda *_: None)
        return own

    own: Optimizer
    module = Failing(optimizer=configure)
    if fails:
        with pytest.raises(RuntimeError, match="user's own"):
            fit(module, batches(1), ZNormCallback(), GradientMonitor(), log_every_n_steps=1)
    else:
        fit(module, batches(1), ZNormCallback(), GradientMonitor(), log_every_n_steps=1)
    assert len(own._optimizer_step_post_hooks) == 1
    assert len(own._optimizer_step_pre_hooks) == 0


def test_wrappers_of_the_users_own(fit, tmp_path) -> None:
    """One that is Lightning's is taken off; one that merely has an attribute of that name is not."""

    class Holding(SGD):
        optimizer = None

    def script(module: ManualTraining, batch: Tensor) -> None:
        for optimizer in module.optimizers():
            bypass(optimizer, module, batch)

    for wrap in (LightningOptimizer, lambda optimizer: Holding(optimizer.param_groups[0]["params"], LR)):
        net = network()

        def configure(_, net=net, wrap=wrap) -> list[Optimizer]:
            return [wrap(optimizer) for optimizer in two_optimizers(net)(None)]

        made = fit(
            ManualTraining(script, net=net, optimizer=configure),
            batches(2),
            ZNormCallback(),
            GradientMonitor(),
            log_every_n_steps=1,
        )
        assert {"grad/0/norm", "grad/1/norm"} <= made.callback_metrics.keys()


def test_nothing_is_counted_once_gradients_have_been_found() -> None:
    net = network()
    optimizer, adapter = SGD(net.parameters(), LR), PlainAdapter(net)
    watch = MissedSteps("Callback", "transformed", "", ParameterFilter(), adapter, lambda _: False, is_finetuned=False)
    watch.start([optimizer])
    looks = []

    def found():
        looks.append(1)
        yield from adapter.slots()

    for _ in range(3):
        watch.search(optimizer, found(), may_miss_backwards=False)
    assert looks == [1]


def test_functions_are_watched_too(fit, warned) -> None:
    fit(InBackward(), batches(BATCHES), GradientTransform(torch.sign))
    assert len(warned()) == 1
