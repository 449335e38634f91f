"""The warning of SGD whose steps are too large for the weights that they move."""

import copy
import math
import pickle
import re
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import ASGD, SGD, Adam, AdamW, Optimizer, RMSprop

from lightning_znorm import (
    GradientCentralizationCallback,
    GradientTransform,
    SINGCallback,
    ZNormCallback,
)
from lightning_znorm.data import DigitsDataModule
from lightning_znorm.functional import attach
from lightning_znorm.gradients import SING, AffineMethod, Centralization, ZScore
from lightning_znorm.gradients.slots import ParameterSlot
from lightning_znorm.gradients.step_sizes import LARGEST_STEP, effective_rate, is_proportional, relative_steps
from lightning_znorm.models import resnet20
from tests.callbacks.training import ManualTraining, Training, batches, loss_of, network


@pytest.fixture
def warned() -> Iterator[Callable[[], list[str]]]:
    """The warnings of large steps so far."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.filterwarnings("always", r".*the steps of \w+ are about")
        yield lambda: [str(warning.message) for warning in caught]


def rms(net: nn.Module) -> float:
    """Of all weights of two dimensions, by hand."""
    weights = [weight.detach().double().flatten() for weight in net.parameters() if weight.ndim > 1]
    return float(torch.cat(weights).square().mean().sqrt())


def rate_for(step: float, momentum: float = 0.0) -> float:
    """The learning rate at which SGD under ZNorm moves weights by so many times their size."""
    return step * rms(network()) * math.sqrt(1 - momentum**2)


def sgd(step: float, momentum: float = 0.0, **kwargs: Any) -> Callable[[Any], Optimizer]:
    return lambda own: SGD(own, rate_for(step, momentum), momentum=momentum, **kwargs)


ZNORM = ZScore()


class RMSNorm(AffineMethod):
    def affine(self, stats):
        return None, (stats.std.square() + stats.mean.abs().square()).rsqrt()


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize(("step", "count"), [(0.49, 0), (0.51, 1)])
def test_steps_are_compared_with_the_weights(fit, warned, momentum: float, step: float, count: int) -> None:
    fit(Training(optimizer=sgd(step, momentum)), batches(3), ZNormCallback(), max_epochs=2)
    assert len(warned()) == count


def test_the_warning_names_the_rate_and_a_good_one(fit, warned) -> None:
    fit(Training(optimizer=sgd(20.0, 0.9)), batches(1), ZNormCallback())
    (message,) = warned()
    assert message == (
        f"ZNormCallback: with lr={rate_for(20.0, 0.9):g} and momentum=0.9, the steps of SGD are about 20 times as "
        "large as the weights that they move, because the transformed gradients have a fixed size, however small the "
        f"loss. Training fails or suffers above 0.5 times: set lr to about {rate_for(0.03, 0.9):.0e}, or use Adam, "
        "which divides the size of the gradients out"
    )


@pytest.mark.parametrize(
    ("callback", "count"),
    [
        (lambda: ZNormCallback(centering="adaptive"), 1),
        (lambda: ZNormCallback(min_ndim=2), 1),
        (lambda: GradientTransform(ZScore(1e-8)), 1),
        (lambda: ZNormCallback(include="*.bias"), 0),  # of which nothing is known, because they begin at zero
        (GradientCentralizationCallback, 0),
        (lambda: GradientTransform(RMSNorm()), 0),
        (lambda: GradientTransform(torch.sign), 0),
        (SINGCallback, 0),  # whose gradients are smaller
        (lambda: ZNormCallback(eps=1.0), 0),  # of small gradients, it makes smaller ones
        (lambda: ZNormCallback(eps=1e-4), 1),
    ],
)
def test_methods(fit, warned, callback, count: int) -> None:
    fit(Training(optimizer=sgd(1.5)), batches(2), callback())
    assert len(warned()) == count


def test_sing_is_judged_by_norms(fit, warned) -> None:
    """Its two gradients have norm 1 each, so the step has norm sqrt(2) times the rate."""
    norm = rms(network()) * math.sqrt(5 * 6 + 3 * 5)
    for step, count in ((0.49, 0), (0.51, 1)):
        fit(Training(optimizer=partial(SGD, lr=step * norm / math.sqrt(2))), batches(1), SINGCallback())
        assert len(warned()) == count


class LARS(SGD):
    """Derives from SGD, and steps otherwise."""

    def step(self, closure: Any = None) -> Any:
        loss = None if closure is None else closure()
        with torch.no_grad():
            for weight in self.param_groups[0]["params"]:
                if weight.grad is not None:
                    weight -= 1e-3 * weight.norm() / weight.grad.norm() * weight.grad
        return loss


class Named(SGD):
    """Derives from SGD, and steps as it does."""


@pytest.mark.parametrize(
    ("make", "count"),
    [
        (partial(SGD, nesterov=True, momentum=0.5), 1),
        (partial(SGD, maximize=True), 1),
        (partial(SGD, fused=True), 1),
        (partial(SGD, weight_decay=1e-4), 1),
        (partial(SGD, momentum=0.9, dampening=0.5), 1),
        (Named, 1),
        (ASGD, 1),
        (Adam, 0),
        (AdamW, 0),
        (RMSprop, 0),
        (LARS, 0),
    ],
)
def test_optimizers(fit, warned, make, count: int) -> None:
    fit(Training(optimizer=partial(make, lr=rate_for(1.5))), batches(1), ZNormCallback())
    assert len(warned()) == count


@pytest.mark.parametrize(("damping", "count"), [(0.0, 1), (0.9, 0)])
def test_dampening_makes_up_for_momentum(fit, warned, damping: float, count: int) -> None:
    fit(
        Training(optimizer=lambda own: SGD(own, rate_for(0.5), momentum=0.9, dampening=damping)),
        batches(1),
        ZNormCallback(),
    )
    assert len(warned()) == count


def test_timm_optimizers() -> None:
    timm = pytest.importorskip("timm.optim")
    weight = nn.Parameter(torch.ones(2, 2))
    proportional = {name: is_proportional(timm.create_optimizer_v2([weight], name, lr=0.1)) for name in
                    ("sgdp", "sgdw", "lars", "lamb", "adamp")}  # fmt: skip
    assert proportional == {"sgdp": True, "sgdw": True, "lars": False, "lamb": False, "adamp": False}


def test_groups_are_judged_by_themselves(fit, warned) -> None:
    def groups(first: float, last: float) -> Callable[[Any], Optimizer]:
        def make(own: Any) -> Optimizer:
            weight, bias, output = own
            return SGD([{"params": [weight, bias], "lr": first}, {"params": [output], "lr": last}], lr=1.0)

        return make

    net = network()
    sizes = [rms(net.first), rms(net.last)]
    fit(Training(optimizer=groups(0.49 * sizes[0], 0.49 * sizes[1])), batches(1), ZNormCallback())
    assert warned() == []
    fit(Training(optimizer=groups(0.3 * sizes[0], 3 * sizes[1])), batches(1), ZNormCallback())
    (message,) = warned()
    assert f"with lr={3 * sizes[1]:g} in one of its parameter groups, the steps of SGD are about 3 times" in message
    # A group that does not take part has its own rate.
    fit(Training(optimizer=groups(0.3 * sizes[0], 3 * sizes[1])), batches(1), ZNormCallback(exclude="*last*"))
    assert len(warned()) == 1


def test_group_of_biases_alone_is_not_judged(fit, warned) -> None:
    def groups(own: Any) -> Optimizer:
        weight, bias, output = own
        return SGD([{"params": [weight, output], "lr": 1e-3}, {"params": [bias], "lr": 10.0}], lr=1.0)

    fit(Training(optimizer=groups), batches(3), ZNormCallback())
    assert warned() == []


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("rate", [1e-3, 1e-1])
@pytest.mark.parametrize("is_warmed_up", [False, True])
def test_weights_that_begin_at_zero_are_not_judged_by_their_first_steps(
    warned, momentum: float, rate: float, is_warmed_up: bool
) -> None:
    """At any rate, they are as small as the steps that they have grown from, if gradients have nothing in common."""
    weight = nn.Parameter(torch.zeros(50, 50))
    optimizer = SGD([weight], lr=rate, momentum=momentum)
    attach(optimizer)
    generator = torch.Generator().manual_seed(0)
    for number in range(100):
        weight.grad = torch.randn(50, 50, generator=generator)
        if is_warmed_up:
            optimizer.param_groups[0]["lr"] = rate * (number + 1) / 100
        optimizer.step()
    assert warned() == []


def test_weights_that_begin_at_zero_are_looked_at_again() -> None:
    weight = nn.Parameter(torch.zeros(4, 4))
    optimizer = SGD([weight], lr=1.0)
    attach(optimizer, ZScore())
    counts = []
    for number in range(1, 34):
        weight.grad = torch.randn(4, 4)
        if number == 3:
            nn.init.constant_(weight, 0.0)
        if number > 3:
            nn.init.constant_(weight, 0.1)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        counts.append(len(caught))
    assert [number for number, count in enumerate(counts, 1) if count] == [16]


class Scheduled(Training):
    """Follows given rates, one a step."""

    def __init__(self, *steps: float) -> None:
        super().__init__(optimizer=sgd(1.0))
        self.steps = steps
        self.told: list[int] = []

    def configure_optimizers(self) -> Any:
        optimizer = super().configure_optimizers()
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda number: self.steps[min(number, 5)])
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


@pytest.mark.parametrize(
    ("steps", "counts"),
    [
        ((0.01, 0.1, 0.3, 0.4, 0.45, 0.45), [0, 0, 0, 0, 0, 0]),
        ((0.01, 0.1, 0.3, 9.0, 9.0, 9.0), [0, 0, 0, 1, 1, 1]),
        ((9.0, 0.1, 9.0, 99.0, 0.1, 0.1), [1, 1, 1, 1, 1, 1]),
    ],
)
def test_warm_up_is_seen_when_it_gets_there(fit, warned, steps, counts) -> None:
    found = []

    class Counting(Scheduled):
        def on_train_batch_end(self, *_: Any) -> None:
            super().on_train_batch_end()
            found.append(len(warned()))

    fit(Counting(*steps), batches(6), ZNormCallback())
    assert found == counts


def test_weights_that_have_grown_are_measured_again(fit, warned) -> None:
    class Growing(Scheduled):
        def on_train_batch_start(self, *_: Any) -> None:
            with torch.no_grad():
                self.net.first.weight *= 2
                self.net.last.weight *= 2

    fit(Growing(0.25, 0.6, 1.2, 2.4, 4.8, 4.8), batches(6), ZNormCallback())
    assert warned() == []
    fit(Growing(0.25, 0.6, 1.2, 2.4, 99.0, 4.8), batches(6), ZNormCallback())
    assert len(warned()) == 1


def test_one_cycle(fit, warned) -> None:
    class Cycle(Training):
        def configure_optimizers(self) -> Any:
            optimizer = SGD(self.parameters(), 1.0, momentum=0.9)
            schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.highest, total_steps=12)
            return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    for highest, count in ((rate_for(0.3, 0.9), 0), (rate_for(50.0, 0.9), 1)):
        module = Cycle()
        module.highest = highest
        fit(module, batches(10), ZNormCallback())
        assert len(warned()) == count


def test_only_what_has_grown_is_measured(fit, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_znorm.gradients import step_sizes

    calls = []
    measured = step_sizes.relative_steps
    monkeypatch.setattr(step_sizes, "relative_steps", lambda *args, **kw: calls.append(1) or measured(*args, **kw))
    fit(Training(optimizer=sgd(0.3)), batches(5), ZNormCallback(), max_epochs=2)
    assert len(calls) == 1
    fit(Scheduled(0.01, 0.1, 0.2, 0.3, 0.35, 0.45), batches(6), ZNormCallback())
    assert len(calls) == 2


class OnDevice(Tensor):
    """A tensor that says that it is on another device, and counts how often it is read."""

    reads = 0

    @property
    def device(self) -> Any:
        return torch.device("meta")

    def __float__(self) -> float:
        type(self).reads += 1
        return float(self.as_subclass(Tensor))


def test_rate_that_is_a_tensor(fit, warned) -> None:
    fit(
        Training(optimizer=lambda own: SGD(own, torch.tensor(rate_for(3.0)), foreach=False)),
        batches(1),
        ZNormCallback(),
    )
    assert len(warned()) == 1
    assert "the steps of SGD are about 3 times" in warned()[0]


def test_rate_on_a_device_is_read_at_few_steps() -> None:
    weight = nn.Parameter(torch.ones(4, 4))
    optimizer = SGD([weight], lr=0.1)
    attach(optimizer)
    counts = []
    for _ in range(16):
        weight.grad = torch.randn(4, 4)
        optimizer.param_groups[0]["lr"] = torch.tensor(0.1).as_subclass(OnDevice)
        hook = next(iter(optimizer._optimizer_step_pre_hooks.values()))
        before = OnDevice.reads
        hook(optimizer, (optimizer,), {})
        counts.append(OnDevice.reads - before)
    assert [bool(count) for count in counts] == [number in (1, 2, 4, 8, 16) for number in range(1, 17)]


@pytest.mark.parametrize(
    ("clipping", "count"),
    [
        ({"gradient_clip_val": 0.1}, 0),
        ({"gradient_clip_val": 0.01, "gradient_clip_algorithm": "value"}, 0),
        ({"gradient_clip_val": 1e3}, 1),
        ({"gradient_clip_val": 0.0}, 1),
    ],
)
def test_clipping_bounds_the_steps(fit, warned, clipping, count: int) -> None:
    fit(Training(optimizer=sgd(5.0)), batches(1), ZNormCallback(), **clipping)
    assert len(warned()) == count


def test_a_modules_own_clipping_may_do_anything(fit, warned) -> None:
    class Own(Training):
        def configure_gradient_clipping(self, optimizer: Any, *_: Any, **__: Any) -> None:
            for weight in self.parameters():
                weight.grad *= 1e-3

    fit(Own(optimizer=sgd(5.0)), batches(1), ZNormCallback())
    assert warned() == []


@pytest.mark.filterwarnings("ignore:GradientTransform transforms the gradients of")
def test_a_later_method_may_do_anything(fit, warned) -> None:
    fit(Training(optimizer=sgd(5.0)), batches(1), ZNormCallback(), GradientTransform(lambda grad: 1e-3 * grad))
    assert not [message for message in warned() if "the steps of" in message]
    # But not to the parameters of others.
    two = ZNormCallback(include="*first*"), GradientTransform(torch.sign, include="*last*")
    fit(Training(optimizer=sgd(5.0)), batches(1), *two)
    assert len([message for message in warned() if "the steps of" in message]) == 1


def test_manual_optimization_and_two_optimizers(fit, warned) -> None:
    def script(module: LightningModule, batch: Tensor) -> None:
        for optimizer in module.optimizers():
            optimizer.zero_grad()
            module.manual_backward(loss_of(module.net, batch))
            optimizer.step()

    def two(first: float, last: float) -> ManualTraining:
        net = network()
        made = [SGD(net.first.parameters(), first * rms(net.first)), Adam(net.last.parameters(), last)]
        return ManualTraining(script, net=net, optimizer=lambda _: made)

    fit(two(0.45, 5.0), batches(3), ZNormCallback())
    assert warned() == []
    fit(two(5.0, 5.0), batches(3), ZNormCallback())
    assert len(warned()) == 1


def test_each_training_warns_anew(fit, warned) -> None:
    callback = ZNormCallback()
    for count in (1, 2):
        fit(Training(optimizer=sgd(5.0)), batches(2), callback)
        assert len(warned()) == count
        assert pickle.loads(pickle.dumps(callback)).description == callback.description
        assert copy.deepcopy(callback).description == callback.description


def test_gradients_that_are_attached_to(warned) -> None:
    for step, count in ((0.49, 0), (0.51, 1)):
        net = network()
        optimizer = sgd(step)(net.parameters())
        attach(optimizer)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            for batch in batches(3):
                optimizer.zero_grad()
                loss_of(net, batch).backward()
                optimizer.step()
        assert len(caught) == count
        if caught:
            assert str(caught[0].message).startswith("ZScore(eps=1e-10) is attached: with lr=")
            assert caught[0].filename == __file__


@pytest.mark.parametrize(
    ("choice", "count"), [({"min_ndim": 2}, 1), ({"exclude": "*weight"}, 0), ({"method": SING()}, 0)]
)
def test_attached_to_some(choice, count: int) -> None:
    net = network()
    optimizer = SGD(net.named_parameters(), rate_for(1.0))
    attach(optimizer, **choice)
    loss_of(net, batches(1)[0]).backward()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    assert len(caught) == count


def test_relative_steps_by_hand() -> None:
    weights = [torch.randn(3, 4, dtype=torch.float64), torch.randn(7, 1, 2).bfloat16(), torch.randn(5)]
    slots = [ParameterSlot((str(number),), nn.Parameter(weight)) for number, weight in enumerate(weights)]
    norms = [float(weight.double().norm()) for weight in weights]
    norm = math.hypot(*norms[:2])

    def relative(*groups: list[ParameterSlot], method: AffineMethod = ZNORM, **clipping: float) -> Any:
        return pytest.approx(relative_steps(groups, method, **clipping))

    assert relative(slots) == [math.sqrt(12 + 14) / norm]
    assert relative(slots, method=SING()) == [math.sqrt(2) / norm]
    assert relative(slots[:1], slots[1:]) == [math.sqrt(12) / norms[0], math.sqrt(14) / norms[1]]
    # Clipped by the norm of all groups, with the vector, which is one of the gradients too.
    clipped = 0.5 / math.sqrt(31)
    assert relative(slots, clip_norm=0.5) == [math.sqrt(26) / norm * clipped]
    assert relative(slots[:1], slots[1:], clip_norm=0.5) == [
        math.sqrt(12) / norms[0] * clipped,
        math.sqrt(14) / norms[1] * clipped,
    ]
    assert relative(slots, clip_value=0.25) == [0.25 * math.sqrt(26) / norm]
    assert relative(slots[2:], [], slots[:2]) == [0.0, 0.0, math.sqrt(26) / norm]
    for method in (ZScore(1.0), SING(0.01), Centralization()):
        assert relative(slots, method=method) == [0.0]


def test_all_weights_are_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = (torch.float32, torch.bfloat16, torch.float64, torch.complex64)
    slots = [ParameterSlot((str(kind),), torch.randn(2, 2, dtype=kind)) for kind in kinds for _ in range(5)]
    slots.append(ParameterSlot(("of 8 bits",), torch.ones(2, 2, dtype=torch.uint8)))
    reads = []
    for name in ("tolist", "item", "__float__"):
        method = getattr(Tensor, name)
        monkeypatch.setattr(Tensor, name, lambda tensor, method=method, name=name: reads.append(name) or method(tensor))
    assert all(relative_steps([slots[:7], slots[7:]], ZScore()))
    assert reads == ["tolist"]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"momentum": 0.9},
        {"momentum": 0.5, "dampening": 0.4},
        {"momentum": 0.9, "dampening": 0.9},
        {"momentum": 0.9, "nesterov": True},
        {"momentum": 0.5, "nesterov": True},
    ],
)
def test_size_of_steps_along_gradients_with_nothing_in_common(options: dict[str, Any]) -> None:
    weight = nn.Parameter(torch.zeros(100, 1000))
    optimizer = SGD([weight], lr=0.1, **options)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        before = weight.detach().clone()
        weight.grad = torch.randn(100, 1000, generator=generator)
        optimizer.step()
    moved = float((weight.detach() - before).square().mean().sqrt())
    assert moved == pytest.approx(effective_rate(optimizer.param_groups[0]), rel=0.02)


def test_clipping_takes_the_norm_of_all_groups(fit, warned) -> None:
    class Chain(Training):
        def configure_optimizers(self) -> Any:
            norms = [float(layer.weight.detach().norm()) for layer in self.net]
            # Clipped by themselves, the steps of each would be as large as its weights.
            return SGD(
                [{"params": layer.parameters(), "lr": norm} for layer, norm in zip(self.net, norms, strict=True)],
                lr=1.0,
            )

    net = nn.Sequential(*(nn.Linear(6, 6, bias=False) for _ in range(25)))
    fit(Chain(copy.deepcopy(net)), batches(2), ZNormCallback(), gradient_clip_val=1.0)  # a fifth
    assert warned() == []
    fit(Chain(net), batches(2), ZNormCallback(), gradient_clip_val=4.0)  # four fifths
    assert len(warned()) == 1


def digits() -> tuple[Tensor, Tensor]:
    images, labels = DigitsDataModule().load(train=True)
    return torch.as_tensor(images).flatten(1) / 16, torch.as_tensor(labels)


def trained_accuracy(data: tuple[Tensor, Tensor], method: AffineMethod, rate: float, momentum: float) -> float:
    """The accuracy of an MLP on what it has learned from, the mean of its last evaluations."""
    images, labels = data
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    optimizer = SGD(net.parameters(), rate, momentum=momentum)
    attach(optimizer, method)
    found = []
    for epoch in range(4):
        order = torch.randperm(len(labels))
        for number, batch in enumerate(order.split(64)):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(images[batch]), labels[batch]).backward()
            optimizer.step()
            if epoch == 3 and number % 5 == 0:
                found.append(float((net(images).argmax(1) == labels).float().mean()))
    return sum(found) / len(found)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("method", [ZScore(), SING()], ids=["ZNorm", "SING"])
def test_training_fails_where_it_warns_and_works_where_it_advises(method: AffineMethod, momentum: float) -> None:
    data = digits()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        failed = trained_accuracy(data, method, 10.0 * (1 if isinstance(method, SING) else 0.02), momentum)
        (message,) = [str(warning.message) for warning in caught]
    advised = float(re.search("set lr to about ([0-9.e+-]+),", message)[1])
    worked = trained_accuracy(data, method, advised, momentum)  # a warning would be an error
    assert failed < 0.6, message
    assert worked > 0.9, message


def test_the_rate_that_the_docs_advise_is_far_below_the_limit() -> None:
    """1e-4 with momentum 0.9, with which ResNet-20 learns the digits (docs/methods/znorm.md)."""
    named = resnet20(num_classes=10, in_chans=1).named_parameters()
    slots = [ParameterSlot((name,), parameter) for name, parameter in named]
    assert 0 < effective_rate({"lr": 1e-4, "momentum": 0.9}) * relative_steps([slots], ZNORM)[0] < LARGEST_STEP / 10


class Frozen(Training):
    """Its optimizer is also given weights that are frozen, very large or very small."""

    def __init__(self, size: float, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.frozen = nn.Parameter(torch.full((500, 500), size), requires_grad=False)


@pytest.mark.parametrize("size", [1e-6, 1e6])
@pytest.mark.parametrize(("step", "count"), [(0.49, 0), (0.51, 1)])
def test_frozen_weights_do_not_count(fit, warned, size: float, step: float, count: int) -> None:
    fit(Frozen(size, optimizer=sgd(step)), batches(1), ZNormCallback())
    assert len(warned()) == count


@pytest.mark.parametrize("size", [1e-6, 1e6])
@pytest.mark.parametrize(("step", "count"), [(0.49, 0), (0.51, 1)])
def test_frozen_weights_of_an_attached_optimizer_do_not_count(size: float, step: float, count: int) -> None:
    net, frozen = network(), nn.Parameter(torch.full((500, 500), size), requires_grad=False)
    optimizer = SGD([*net.parameters(), frozen], rate_for(step))
    attach(optimizer)
    loss_of(net, batches(1)[0]).backward()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer.step()
    assert len(caught) == count
