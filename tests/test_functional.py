"""attach: a method in a plain loop, with and without mixed precision."""

import copy
import functools
import gc
import pickle
import types
import warnings
import weakref
from collections import OrderedDict
from typing import Any

import pytest
import torch
from lightning.fabric import Fabric
from timm.optim import Lookahead, create_optimizer_v2
from torch import Tensor, nn

from lightning_znorm.functional import attach, is_attached
from lightning_znorm.gradients import (
    Centralization,
    NonFiniteGradientError,
    UnsupportedGradientError,
    ZScore,
    optimizers,
    slots,
)
from tests.gradients.reference import centralized, zscore

# Steps as large as their z-scores are easy to read, and too large for the weights.
pytestmark = pytest.mark.filterwarnings("ignore:ZScore.* is attached. with lr=.*the steps of SGD are about")

LR = 0.1
EPS = 0.3  # as large as the deviations, so that a wrong scale is seen


class ScalerAware(torch.optim.SGD):
    """Takes the scaler in its step and always divides by the loss scale, like Transformer Engine's FusedAdam."""

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
    """Return a parameter, and what it should be after one step."""
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
    weight.grad = torch.ones_like(weight)  # its z-score is zero
    before = weight.detach().clone()
    optimizer.step()
    torch.testing.assert_close(weight.data, before - LR)


def test_fabric() -> None:
    """The method is attached before Fabric gets the optimizer."""
    weight, expected = weight_and_reference()
    module = nn.Module()
    module.weight = weight
    optimizer = torch.optim.SGD(module.parameters(), lr=LR)
    attach(optimizer, ZScore(EPS))
    fabric = Fabric(accelerator="cpu", devices=1)
    module, optimizer = fabric.setup(module, optimizer)
    fabric.backward(loss_of(module.weight))
    optimizer.step()
    torch.testing.assert_close(module.weight.data.double(), expected, rtol=0, atol=1e-6)


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
    # An optimizer that takes the scaler divides a second time after unscale_, with or without this package.
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


class FirstAndSecondStep(torch.optim.Optimizer):
    """SAM in its usual form: two steps of its own, and a base optimizer that descends (github.com/davda54/sam)."""

    def __init__(self, params: Any, rho: float = 0.05, **kwargs: Any) -> None:
        super().__init__(params, {"rho": rho, **kwargs})
        self.base_optimizer = torch.optim.SGD(self.param_groups, **kwargs)
        self.param_groups = self.base_optimizer.param_groups

    @torch.no_grad()
    def first_step(self) -> None:
        norm = torch.stack([p.grad.norm() for group in self.param_groups for p in group["params"]]).norm()
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p]["climb"] = p.grad * (group["rho"] / norm)
                p.add_(self.state[p]["climb"])
        self.zero_grad()

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(self.state[p]["climb"])
        self.base_optimizer.step()

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        raise NotImplementedError


class Unhooked(torch.optim.Optimizer):
    """Like timm's Lookahead, which has the hooks, and a step that does not run them."""

    def __init__(self, wrapped: torch.optim.Optimizer) -> None:
        self._optimizer_step_pre_hooks: dict[int, Any] = OrderedDict()
        self._optimizer_step_post_hooks: dict[int, Any] = OrderedDict()
        self._wrapped = wrapped
        self.param_groups = wrapped.param_groups

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self._wrapped.step()


class Sharing(Unhooked):
    """Like Fabric's and Lightning's wrappers, which share the hooks of the optimizer that they wrap."""

    def __init__(self, wrapped: torch.optim.Optimizer) -> None:
        super().__init__(wrapped)
        self._optimizer_step_pre_hooks = wrapped._optimizer_step_pre_hooks


class OverlappingWithDDP(torch.optim.SGD):
    """Like ZeroRedundancyOptimizer with this option."""

    _overlap_with_ddp = True


class Placeholder:
    """Like Accelerate's and DeepSpeed's DummyOptim."""

    def __init__(self, params: Any) -> None:
        self.param_groups = [{"params": params}]


def sgd() -> torch.optim.SGD:
    return torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=1.0)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(2, 2), "Linear is a module: give the optimizer of its parameters"),
        (lambda: Placeholder([]), "Placeholder runs no hooks before its step.*no torch.optim.Optimizer"),
        (lambda: torch.optim.lr_scheduler.StepLR(sgd(), 1), "StepLR runs no hooks .*no torch.optim.Optimizer"),
        (lambda: [sgd()], "attach takes one optimizer at a time, got a list"),
        (lambda: Unhooked(sgd()), "Unhooked runs no hooks before its step: attach to the SGD that it wraps"),
        (lambda: Lookahead(sgd()), "Lookahead runs no hooks before its step: attach to the SGD that it wraps"),
        (
            lambda: create_optimizer_v2(nn.Linear(2, 2), "lookahead_adamw", lr=0.1),
            "Lookahead runs no hooks before its step: attach to the AdamW that it wraps",
        ),
        (
            lambda: FirstAndSecondStep([nn.Parameter(torch.zeros(2))], lr=0.1),
            r"FirstAndSecondStep climbs .*attach to its SGD, which descends.*examples/sam\.py",
        ),
        (lambda: OverlappingWithDDP([nn.Parameter(torch.zeros(2))], lr=0.1), "steps in the backward pass"),
    ],
    ids=["module", "placeholder", "scheduler", "list", "unhooked", "lookahead", "timm", "SAM", "overlapping"],
)
def test_what_never_runs_its_hook_is_refused(make: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        attach(make())


def test_base_optimizer_of_sam_descends_by_the_z_score() -> None:
    start = torch.linspace(-1, 1, 12).view(3, 4)
    climb = start.double().requires_grad_()
    loss_of(climb).backward()
    assert climb.grad is not None
    way = 0.05 * climb.grad / climb.grad.norm()
    reached = (start.double() + way).requires_grad_()
    loss_of(reached).backward()
    assert reached.grad is not None

    weight = nn.Parameter(start.clone())
    sam = FirstAndSecondStep([weight], lr=LR)
    attach(sam.base_optimizer, ZScore(EPS))
    loss_of(weight).backward()
    sam.first_step()
    torch.testing.assert_close(weight.data.double(), start + way, rtol=0, atol=1e-6)
    loss_of(weight).backward()
    sam.second_step()
    torch.testing.assert_close(weight.data.double(), start - LR * zscore(reached.grad, EPS), rtol=0, atol=1e-6)


def test_release_that_does_not_tell_where_hooks_run_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = sgd()
    monkeypatch.setattr(optimizers, "_around_step", lambda: None)
    with pytest.raises(UnsupportedGradientError, match=r"PyTorch .* torch\.optim\.Optimizer has no `profile_hook_st"):
        attach(optimizer)


def plain_step(self: torch.optim.Optimizer, closure: Any = None) -> None:
    """Like the function that Intel's extension puts in place of the step."""
    for group in self.param_groups:
        for param in group["params"]:
            param.data -= group["lr"] * param.grad


def replaced(optimizer: torch.optim.SGD, step: Any) -> torch.optim.SGD:
    optimizer.step = step  # type: ignore[method-assign]
    return optimizer


def named_like_the_original(optimizer: torch.optim.SGD) -> torch.optim.SGD:
    @functools.wraps(optimizer.step)
    def step(closure: Any = None) -> None:
        plain_step(optimizer)

    return replaced(optimizer, step)


def kept_for_later(optimizer: Any) -> Any:
    optimizer.original_step = optimizer.step
    return replaced(optimizer, lambda closure=None: plain_step(optimizer))


@pytest.mark.parametrize(
    ("make", "by"),
    [
        (lambda one: replaced(one, types.MethodType(plain_step, one)), "plain_step"),
        (lambda one: replaced(one, functools.partial(plain_step, one)), "partial"),
        (lambda one: replaced(one, sgd().step), r".*step"),
        (lambda one: replaced(one, types.MethodType(type(one).step.__wrapped__, one)), r"SGD\.step"),
        (named_like_the_original, r"SGD\.step"),
        (kept_for_later, r"kept_for_later\.<locals>\.<lambda>"),
    ],
    ids=["method", "partial", "of-another", "without-hooks", "named-alike", "kept-for-later"],
)
def test_step_that_has_been_replaced_and_runs_no_hooks(make: Any, by: str) -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = make(torch.optim.SGD([weight], lr=1.0))
    handle = attach(optimizer)
    weight.grad = torch.tensor([2.0, 3.0])
    message = f"SGD has stepped without the attached ZScore.*: its step has been replaced by {by}, which does not call"
    for _ in range(2):
        with pytest.raises(RuntimeError, match=message):
            optimizer.step()
    handle.remove()
    optimizer.step()


WRAPPED: dict[str, Any] = {
    "lookahead": lambda weight: Lookahead(attached(weight), alpha=1.0, k=1),
    "sharing": lambda weight: shared(weight),
    "scheduler before": lambda weight: scheduled(torch.optim.SGD([weight], lr=LR), True),
    "scheduler after": lambda weight: scheduled(torch.optim.SGD([weight], lr=LR), False),
    "step of the object": lambda weight: wrapped_again(weight),
    "function": lambda weight: counting(weight, lambda original, count: lambda *args: (count(), original(*args))),
    "object": lambda weight: counting(weight, Counting),
    "method": lambda weight: counting(weight, lambda original, count: Counting(original, count).step),
    "dictionary": lambda weight: counting(weight, lambda original, _: in_dictionary({"step": original})),
    "attribute": lambda weight: kept_as_attribute(weight),
    "by its class": lambda weight: by_class(weight),
    "default": lambda weight: counting(weight, lambda original, _: with_default(original)),
    "class of self": lambda weight: class_of_self(weight),
    "many": lambda weight: counting(weight, lambda original, _: functools.reduce(once_more, range(9), original)),
    "compiled": lambda weight: counting(weight, lambda original, _: torch.compile(original, backend="eager")),
    "deep copy": lambda weight: attach_to_copy(weight, copy.deepcopy),
    "pickle": lambda weight: attach_to_copy(weight, lambda optimizer: pickle.loads(pickle.dumps(optimizer))),
    "state loaded": lambda weight: loaded(weight),
    "timm": lambda weight: attached(weight, create_optimizer_v2([weight], "momentum", lr=LR, momentum=0.0)),
}


def attached(weight: nn.Parameter, optimizer: Any = None) -> Any:
    optimizer = optimizer or torch.optim.SGD([weight], lr=LR)
    attach(optimizer, ZScore(EPS))
    return optimizer


def shared(weight: nn.Parameter) -> Any:
    return attached(weight, Sharing(torch.optim.SGD([weight], lr=LR)))


def scheduled(optimizer: Any, first: bool) -> Any:
    if first:
        torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    attach(optimizer, ZScore(EPS))
    if not first:
        torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    return optimizer


def wrapped_again(weight: nn.Parameter) -> Any:
    optimizer = torch.optim.SGD([weight], lr=LR)
    optimizer.step = functools.partial(optimizer.step)  # type: ignore[method-assign]
    return attached(weight, optimizer)


class Counting:
    def __init__(self, original: Any, count: Any) -> None:
        self.original, self.count = original, count

    def __call__(self, closure: Any = None) -> Any:
        self.count()
        return self.original(closure)

    def step(self, closure: Any = None) -> Any:
        return self(closure)


def in_dictionary(originals: dict[str, Any]) -> Any:
    return lambda closure=None: originals["step"](closure)


def with_default(original: Any) -> Any:
    def step(closure: Any = None, _original: Any = original) -> Any:
        return _original(closure)

    return step


def once_more(step: Any, _: int) -> Any:
    return lambda closure=None: step(closure)


def class_of_self(weight: nn.Parameter) -> Any:
    optimizer = torch.optim.SGD([weight], lr=LR)
    step = types.MethodType(lambda self, closure=None: type(self).step(self, closure), optimizer)
    return attached(weight, replaced(optimizer, step))


def kept_as_attribute(weight: nn.Parameter) -> Any:
    optimizer: Any = torch.optim.SGD([weight], lr=LR)
    optimizer.original_step = optimizer.step
    return attached(weight, replaced(optimizer, lambda closure=None: optimizer.original_step(closure)))


def by_class(weight: nn.Parameter) -> Any:
    optimizer = torch.optim.SGD([weight], lr=LR)
    return attached(weight, replaced(optimizer, lambda closure=None: torch.optim.SGD.step(optimizer, closure)))


def counting(weight: nn.Parameter, around: Any) -> Any:
    """Accelerate does so, to know whether a step was skipped."""
    optimizer = torch.optim.SGD([weight], lr=LR)
    return attached(weight, replaced(optimizer, around(optimizer.step, int)))


def attach_to_copy(weight: nn.Parameter, copied: Any) -> Any:
    """Attach to a copy of an attached optimizer, which has no hooks."""
    made = copied(attached(weight))
    assert not made._optimizer_step_pre_hooks
    made.param_groups[0]["params"] = [weight]
    return attached(weight, made)


def loaded(weight: nn.Parameter) -> Any:
    optimizer = attached(weight)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    return optimizer


@pytest.mark.parametrize("kind", WRAPPED)
def test_hook_runs_in_whatever_steps(kind: str) -> None:
    weight, expected = weight_and_reference()
    optimizer = WRAPPED[kind](weight)
    loss_of(weight).backward()
    optimizer.step()
    torch.testing.assert_close(weight.data.double(), expected, rtol=0, atol=1e-6)


class Once(torch.optim.SGD):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Twice(Once):
    def step(self, closure: Any = None) -> Any:
        return super().step(closure)


class Failing(torch.optim.SGD):
    fails = True

    def step(self, closure: Any = None) -> Any:
        if self.fails:
            raise ArithmeticError
        return super().step(closure)


@pytest.mark.parametrize("cls", [Once, Twice])
def test_method_runs_once_where_a_step_calls_that_of_its_base(cls: Any) -> None:
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)  # makes torch put its hooks around the base's step
    weight = nn.Parameter(torch.zeros(2))
    optimizer = cls([weight], lr=1.0)
    attach(optimizer, torch.square)
    for _ in range(2):
        weight.grad = torch.tensor([2.0, 3.0])
        optimizer.step()
    assert weight.tolist() == [-8.0, -18.0]


def test_schedulers_follow_a_checked_step() -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    first = torch.optim.lr_scheduler.ConstantLR(optimizer, factor=1.0)
    attach(optimizer, torch.square)
    second = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    for _ in range(2):
        weight.grad = torch.tensor([2.0, 3.0])
        optimizer.step()
        first.step()
        second.step()
    assert weight.tolist() == [-6.0, -13.5]


def test_method_runs_once_where_a_step_calls_the_one_it_replaces(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1)  # makes torch put its hooks around the step
    step = torch.optim.SGD.step
    monkeypatch.setattr(torch.optim.SGD, "step", lambda self, closure=None: step(self, closure))
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    attach(optimizer, torch.square)
    weight.grad = torch.tensor([2.0, 3.0])
    optimizer.step()
    assert weight.tolist() == [-4.0, -9.0]


class SharesHooks(torch.optim.Optimizer):
    """Wraps an optimizer, and torch runs its hooks in both steps."""

    def __init__(self, wrapped: torch.optim.Optimizer) -> None:
        super().__init__(wrapped.param_groups, {})
        self.wrapped = wrapped
        self._optimizer_step_pre_hooks = wrapped._optimizer_step_pre_hooks

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        self.wrapped.step()


@pytest.mark.parametrize("inner", [True, False])
def test_method_runs_once_where_a_wrapper_shares_the_hooks(inner: bool) -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    wrapper = SharesHooks(optimizer)
    attach(optimizer if inner else wrapper, torch.square)
    weight.grad = torch.tensor([2.0, 3.0])
    wrapper.step()
    assert weight.tolist() == [-4.0, -9.0]


def test_compiled_step_says_nothing(recwarn: pytest.WarningsRecorder) -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    attach(optimizer, torch.square)
    weight.grad = torch.tensor([2.0, 3.0])
    torch.compile(lambda: optimizer.step(), backend="eager")()
    assert weight.tolist() == [-4.0, -9.0]
    assert not [str(warning.message) for warning in recwarn if "Dynamo" in str(warning.message)]


def test_method_runs_again_after_a_step_that_failed() -> None:
    weight = nn.Parameter(torch.zeros(2))
    optimizer = Failing([weight], lr=1.0)
    attach(optimizer, torch.square)
    weight.grad = torch.tensor([2.0, 3.0])
    with pytest.raises(ArithmeticError):
        optimizer.step()
    optimizer.fails = False
    weight.grad = torch.tensor([2.0, 3.0])
    optimizer.step()
    assert weight.tolist() == [-4.0, -9.0]


def test_step_without_any_gradient_warns_once() -> None:
    weight, other = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([weight, other], lr=1.0)
    attach(optimizer)
    other.grad = torch.tensor([2.0, 6.0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()
    other.grad = None
    with pytest.warns(UserWarning, match="SGD steps, and none of its parameters has a gradient for the attached"):
        optimizer.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.step()


@pytest.mark.parametrize("flat", [torch.zeros(6), torch.zeros(8), torch.zeros(3)])
def test_parameters_that_were_replaced_by_flat_ones_are_refused(flat: Tensor) -> None:
    """DeepSpeed gives the optimizer a part of the flattened weights, with or without padding."""
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=1.0)
    attach(optimizer)
    flat = flat.clone()
    flat.grad = torch.arange(float(len(flat)))
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(UnsupportedGradientError, match=r"parameters that SGD had .*replaced .*DeepSpeed"):
        optimizer.step()
    assert not flat.any()


def test_tensors_that_take_the_place_of_others_of_their_shape_take_part() -> None:
    """Copies in higher precision take part, too, and other tensors that a program optimizes."""
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    attach(optimizer)
    copies = [parameter.detach().clone() for parameter in model.parameters()]
    optimizer.param_groups[0]["params"] = copies
    latent = torch.zeros(2, requires_grad=True)
    optimizer.add_param_group({"params": [latent]})
    latent.grad = torch.tensor([2.0, 6.0])
    optimizer.step()
    assert latent.tolist() == [1.0, -1.0]


def test_groups_added_later_take_part() -> None:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    attach(optimizer)
    weight = nn.Parameter(torch.zeros(2))
    optimizer.add_param_group({"params": [weight]})
    weight.grad = torch.tensor([2.0, 6.0])
    optimizer.step()
    assert weight.tolist() == [1.0, -1.0]


class Net(nn.Module):
    """Two layers, the second of which shares its weight with the first."""

    def __init__(self) -> None:
        super().__init__()
        self.hidden = nn.Linear(3, 3)
        self.tied = nn.Linear(3, 3)
        self.tied.weight = self.hidden.weight
        self.output = nn.Linear(3, 2)


class TestChoice:
    """``attach`` with patterns on names, or with a least number of dimensions."""

    def moved(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> set[str]:
        """Return the parameters that stepped by their z-scores; all others must have stepped by their gradients."""
        generator = torch.Generator().manual_seed(0)
        before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=generator) + 2
        plain = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
        optimizer.step()
        normalized = set()
        for name, parameter in model.named_parameters():
            if torch.allclose(before[name] - parameter, zscore(plain[name]).float(), atol=1e-5):
                normalized.add(name)
            else:
                torch.testing.assert_close(before[name] - parameter, plain[name], rtol=0, atol=1e-5)
        return normalized

    @pytest.mark.parametrize(
        ("choice", "expected"),
        [
            ({"exclude": "output.*"}, {"hidden.weight", "hidden.bias", "tied.bias"}),
            ({"include": ["output.*", "tied.bias"]}, {"output.weight", "output.bias", "tied.bias"}),
            ({"include": "tied.*"}, {"hidden.weight", "tied.bias"}),
            ({"include": "*.weight", "exclude": "tied.weight"}, {"output.weight"}),
            ({"min_ndim": 2}, {"hidden.weight", "output.weight"}),
            ({"min_ndim": 2, "exclude": ["output.*"]}, {"hidden.weight"}),
            ({}, {"hidden.weight", "hidden.bias", "tied.bias", "output.weight", "output.bias"}),
        ],
    )
    def test_the_chosen_ones_take_part(self, choice: dict[str, Any], expected: set[str]) -> None:
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        # A generator, which is used up by the first step at the latest.
        attach(optimizer, named_parameters=model.named_parameters(remove_duplicate=False), **choice)
        assert self.moved(model, optimizer) == expected
        assert self.moved(model, optimizer) == expected

    def test_least_number_of_dimensions_needs_no_names(self) -> None:
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        attach(optimizer, min_ndim=2)
        assert self.moved(model, optimizer) == {"hidden.weight", "output.weight"}

    def test_optimizer_that_knows_the_names(self) -> None:
        model = Net()
        optimizer = torch.optim.SGD(model.named_parameters(), lr=1.0)
        attach(optimizer, exclude="output.*")
        assert self.moved(model, optimizer) == {"hidden.weight", "hidden.bias", "tied.bias"}

    def test_names_without_what_compilation_puts_in(self) -> None:
        model = torch.compile(Net())
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        attach(optimizer, named_parameters=model.named_parameters(), include="output.*")
        assert self.moved(model._orig_mod, optimizer) == {"output.weight", "output.bias"}

    def test_groups_that_come_later(self) -> None:
        model = Net()
        optimizer = torch.optim.SGD([*model.hidden.parameters(), model.tied.bias], lr=1.0)
        attach(optimizer, named_parameters=model.named_parameters(), exclude="*.bias")
        optimizer.add_param_group({"params": list(model.output.parameters())})
        assert self.moved(model, optimizer) == {"hidden.weight", "output.weight"}
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))]})
        with pytest.raises(ValueError, match="parameter 0 of group 2 of SGD has none: give named_parameters"):
            optimizer.step()

    @pytest.mark.parametrize(
        ("choice", "message"),
        [
            ({"exclude": "ouput.*"}, r"the pattern 'ouput\.\*' matches none .* nearest names are output"),
            ({"include": "output.*", "exclude": "output.*"}, "together leave none"),
            ({"min_ndim": 5}, "together leave none"),
        ],
    )
    def test_choice_that_does_not_fit_is_refused_at_once(self, choice: dict[str, Any], message: str) -> None:
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        with pytest.raises(ValueError, match=message):
            attach(optimizer, named_parameters=model.named_parameters(), **choice)
        assert not is_attached(optimizer)

    def test_optimizer_of_which_nothing_is_chosen_is_refused(self) -> None:
        model = Net()
        optimizer = torch.optim.SGD(model.output.parameters(), lr=1.0)
        with pytest.raises(
            ValueError, match=r"of the 2 parameters of SGD none is chosen .* the first is output.weight"
        ):
            attach(optimizer, named_parameters=model.named_parameters(), include="hidden.*")

    def test_patterns_without_names_are_refused(self) -> None:
        optimizer = torch.optim.SGD(Net().parameters(), lr=1.0)
        with pytest.raises(ValueError, match="parameter 0 of group 0 of SGD has none: give named_parameters"):
            attach(optimizer, exclude="output.*")

    @pytest.mark.parametrize("wrong", [[torch.zeros(2)], 3, {"a": torch.zeros(2)}, [("a", 1)], "ab", [("a", 1, 2)]])
    def test_what_is_no_pair_is_refused(self, wrong: Any) -> None:
        optimizer = torch.optim.SGD(Net().parameters(), lr=1.0)
        with pytest.raises(TypeError, match="named_parameters must be pairs of a name and a parameter"):
            attach(optimizer, named_parameters=wrong)

    def test_generator_that_is_used_up_is_refused(self) -> None:
        model = Net()
        named = model.named_parameters()
        optimizer = torch.optim.SGD(list(named), lr=1.0)
        for choice in ({}, {"exclude": "output.*"}):
            with pytest.raises(ValueError, match=r"named_parameters must hold all .*, and is empty or used up"):
                attach(optimizer, named_parameters=named, **choice)

    def test_names_without_what_fabric_puts_in(self) -> None:
        fabric = Fabric(accelerator="cpu", devices=1)
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        wrapped, _ = fabric.setup(model, optimizer)
        attach(optimizer, named_parameters=wrapped.named_parameters(), exclude="output.*")
        assert self.moved(model, optimizer) == {"hidden.weight", "hidden.bias", "tied.bias"}

    def test_nonfinite_gradient_of_any_parameter_is_named(self) -> None:
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        attach(
            optimizer,
            error_if_nonfinite=True,
            named_parameters=model.named_parameters(),
            exclude="output.*",
        )
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        model.output.bias.grad[0] = torch.inf
        with pytest.raises(NonFiniteGradientError, match=r"gradients of output\.bias \("):
            optimizer.step()

    @pytest.mark.parametrize("choice", [{}, {"min_ndim": 2}, {"exclude": "output.*"}], ids=str)
    def test_optimizer_is_freed_at_once(self, choice: dict[str, Any]) -> None:
        """The hook must not hold the optimizer that holds it."""
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        attach(optimizer, named_parameters=model.named_parameters(), **choice)
        self.moved(model, optimizer)
        gone = weakref.ref(optimizer)
        gc.disable()
        try:
            del optimizer
            assert gone() is None
        finally:
            gc.enable()

    def test_names_are_matched_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        model = Net()
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        attach(optimizer, named_parameters=model.named_parameters(), exclude="output.*")
        self.moved(model, optimizer)
        monkeypatch.setattr(slots, "fnmatchcase", None)
        assert self.moved(model, optimizer) == {"hidden.weight", "hidden.bias", "tied.bias"}

    def test_lazy_layer_shows_its_dimensions_later(self) -> None:
        model = nn.Sequential(nn.LazyLinear(2))
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        attach(optimizer, min_ndim=2)
        model(torch.ones(1, 3))
        assert self.moved(model, optimizer) == {"0.weight"}
