"""Wrong arguments of the callbacks, methods and functions: each is refused at once, in one sentence that names it."""

import inspect
import io
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import lightning_znorm
from lightning_znorm import (
    GradientCentralizationCallback,
    GradientMonitor,
    GradientTransform,
    SINGCallback,
    ZNormCallback,
)
from lightning_znorm.arguments import checked_integer, checked_number
from lightning_znorm.functional import attach, centralize_grads_, transform_grads_, zscore_grads_
from lightning_znorm.gradients import SING, AffineMethod, Statistics, ZScore

MODEL = nn.Linear(2, 2)


def sgd() -> torch.optim.SGD:
    return torch.optim.SGD(MODEL.parameters(), lr=0.1)


PATTERNS = [1, [1], None, [None], ["*", 2.0], b"*", [b"*"], {"*": 1}, torch.ones(1), [["*.weight"]]]
FLAGS = ["yes", "no", 1, None, 0.0]
NUMBERS = ["1e-8", None, True, [1e-8], torch.tensor(1e-8), -1e-8, float("nan"), float("inf"), 1j]
METHODS = [None, "znorm", ZScore, [ZScore()], torch.ones(2), 3]
PARAMETERS = [None, 3, MODEL, "weight", [1], [None], sgd(), sgd().param_groups, ZScore(), [[MODEL.weight]]]
OPTIMIZERS: list[Any] = [None, torch.optim.SGD, [sgd()], (sgd(), sgd()), {"a": sgd()}, MODEL, "adam", ZScore(), 3]

# What is wrong for each argument, by its name.
WRONG: dict[str, list[Any]] = {
    "include": PATTERNS,
    "exclude": PATTERNS,
    "min_ndim": ["2", True, 2.0, None, -1, [2], torch.tensor(2), np.float64(2)],
    "allow_untested_strategy": FLAGS,
    "error_if_nonfinite": FLAGS,
    "per_parameter": FLAGS,
    "eps": NUMBERS,
    "sigma_threshold": NUMBERS,
    "centering": ["half", "Full", "", None, True, 1, ["full"], b"full"],
    "named_parameters": [
        3,
        MODEL,
        "weight",
        [MODEL.weight],
        MODEL.parameters(),
        dict(MODEL.named_parameters()),
        [None],
    ],
    "prefix": [1, None, "", ["grad"], b"grad"],
    "method": METHODS,
    "parameters": [*PARAMETERS, list(MODEL.named_parameters())],
    "optimizer": [*OPTIMIZERS, MODEL.parameters(), torch.optim.lr_scheduler.StepLR(sgd(), 1)],
}
# What else an argument is called in the sentence.
ALSO = {"method": "method", "parameters": r"parameters\(\)", "optimizer": "(?i)optimizer"}

CALLS: dict[str, tuple[Callable[..., Any], tuple[Any, ...]]] = {
    "ZNormCallback": (ZNormCallback, ()),
    "GradientCentralizationCallback": (GradientCentralizationCallback, ()),
    "SINGCallback": (SINGCallback, ()),
    "GradientTransform": (GradientTransform, (torch.sign,)),
    "GradientMonitor": (GradientMonitor, ()),
    "ZScore": (ZScore, ()),
    "SING": (SING, ()),
    "zscore_grads_": (zscore_grads_, (MODEL.weight,)),
    "centralize_grads_": (centralize_grads_, (MODEL.weight,)),
    "transform_grads_": (transform_grads_, (MODEL.weight, torch.sign)),
    "attach": (attach, (sgd(),)),
}
# Every argument that there is, also one that comes later.
CASES = [(call, name) for call, (function, _) in CALLS.items() for name in inspect.signature(function).parameters]


@pytest.mark.parametrize(("call", "name"), CASES)
def test_wrong_argument(call: str, name: str) -> None:
    function, given = CALLS[call]
    names = list(inspect.signature(function).parameters)
    for value in WRONG[name]:
        if call == "attach" and name == "method" and value is None:  # which is ZNorm
            continue
        arguments = dict(zip(names, given, strict=False)) | {name: value}
        with pytest.raises((TypeError, ValueError), match=ALSO.get(name, rf"^{name} must")) as error:
            function(**arguments)
        message = str(error.value)
        assert "\n" not in message
        assert len(message) < 350
        assert Path(lightning_znorm.__file__).parent in error.traceback[-1].path.parents  # and not torch's or Python's


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (torch.optim.SGD, r"^SGD is a class: give an optimizer, SGD\(model\.parameters\(\), \.\.\.\)"),
        ([sgd(), sgd()], "^attach takes one optimizer at a time, got a list: attach to each optimizer by itself"),
        ({"gen": sgd()}, "^attach takes one optimizer at a time, got a dict: attach to each optimizer by itself"),
        (MODEL.parameters(), "^attach takes one optimizer at a time, got a generator: attach to each"),
        (None, "^None is no optimizer: give a torch.optim.Optimizer"),
        (MODEL, "^Linear is a module: give the optimizer of its parameters"),
    ],
)
def test_what_is_no_optimizer(given: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        attach(given)


def test_numbers_and_texts_of_numpy_are_taken_and_saved_as_pythons() -> None:
    callback = ZNormCallback(
        np.float64(1e-3), [np.str_("*.weight")], min_ndim=np.int64(2), error_if_nonfinite=np.bool_(True)
    )
    twin = ZNormCallback(1e-3, ["*.weight"], min_ndim=2, error_if_nonfinite=True)
    assert callback.state_key == twin.state_key
    stream = io.BytesIO()
    torch.save(callback.state_dict(), stream)
    stream.seek(0)
    assert torch.load(stream, weights_only=True) == twin.state_dict()


def test_patterns_of_a_set_have_one_order() -> None:
    names = [f"layer{number}.*" for number in range(20)]
    keys = {ZNormCallback(include=given).state_key for given in (set(names), frozenset(reversed(names)), names)}
    assert len({ZNormCallback(include=set(names)).state_key, ZNormCallback(include=sorted(names)).state_key}) == 1
    assert len(keys) == 2  # a list keeps its own order


class Made(AffineMethod):
    """Returns what a function makes of the statistics."""

    def __init__(self, make: Callable[[Statistics], Any]) -> None:
        self.make = make

    def affine(self, stats: Statistics) -> Any:
        return self.make(stats)


class MadeByRow(Made):
    over = "row"


class MadeOfRowsAndTensors(Made):
    over = "row"
    std_over = "tensor"


MAPS: dict[str, tuple[Callable[[Statistics], Any], str]] = {
    "one tensor": (lambda stats: stats.mean, r"a tensor of shape \(\d,\)"),
    "one tensor of two": (lambda stats: torch.zeros(2), r"a tensor of shape \(2,\)"),
    "a stack": (lambda stats: torch.stack([stats.mean, stats.std]), r"a tensor of shape \(2, \d\)"),
    "nothing": (lambda stats: None, "None$"),
    "a number": (lambda stats: 2.0, r"2\.0$"),
    "two numbers": (lambda stats: (0.0, 2.0), r"\[0\.0, 2\.0\]$"),
    "three": (lambda stats: (stats.mean, stats.std, stats.count), r"\[a tensor .*, a tensor"),
    "one in a tuple": (lambda stats: (stats.mean,), r"\[a tensor [^,]*,[^,]*\]$"),
    "a dictionary": (lambda stats: {"shift": stats.mean, "scale": None}, r"\{'shift': "),
    "text": (lambda stats: "ab", "'ab'"),
    "another shape": (lambda stats: (None, torch.ones(7)), r"\[None, a tensor of shape \(7,\)"),
    "a scalar": (lambda stats: (stats.mean.sum(), None), r"\[a tensor of shape \(\)"),
    "complex": (lambda stats: (None, stats.std + 1j), r"\[None, a tensor .* torch\.complex64"),
    "another device": (lambda stats: (None, torch.ones_like(stats.std, device="meta")), r"\[None, a tensor .*on meta"),
}


@pytest.mark.parametrize("kind", [Made, MadeByRow, MadeOfRowsAndTensors])
@pytest.mark.parametrize("name", MAPS)
def test_what_is_no_map(name: str, kind: type[Made]) -> None:
    make, what = MAPS[name]
    for numel in (6, 3000):  # each for a kernel of its own
        weights = [nn.Parameter(torch.zeros(3, numel // 3)) for _ in range(2)]
        for weight in weights:
            weight.grad = torch.randn(weight.shape)
        message = (
            rf"^{kind.__name__}\.affine must return a shift and a scale, each None or a real tensor of shape \(\d,\)"
        )
        with pytest.raises(TypeError, match=rf"{message} on cpu like the statistics, and returned {what}") as error:
            transform_grads_(weights, kind(make))
        assert "\n" not in str(error.value)


def test_map_of_a_complex_gradient_may_have_a_complex_shift() -> None:
    weight = nn.Parameter(torch.zeros(3, dtype=torch.complex64))
    weight.grad = torch.tensor([1j, 2.0, 3.0])
    transform_grads_(weight, Made(lambda stats: (stats.mean, None)))
    torch.testing.assert_close(weight.grad, torch.tensor([1j, 2.0, 3.0]) - (5 + 1j) / 3)


def test_list_is_a_map_too() -> None:
    weight = nn.Parameter(torch.zeros(2))
    weight.grad = torch.tensor([1.0, 3.0])
    transform_grads_(weight, Made(lambda stats: [stats.mean, None]))
    assert weight.grad.tolist() == [-1.0, 1.0]


@pytest.mark.parametrize(
    "use", [lambda method: transform_grads_(MODEL.weight, method), GradientTransform, partial(attach, sgd())]
)
def test_statistics_over_something_else(use: Callable[[AffineMethod], Any]) -> None:
    method = Made(lambda stats: (None, None))
    method.over = "column"  # type: ignore[assignment, misc]
    with pytest.raises(TypeError, match=r"over must be 'tensor' or 'row', got 'column'"):
        use(method)


@pytest.mark.parametrize(
    ("check", "value", "options", "message"),
    [
        (checked_number, float("nan"), {"minimum": 0}, "size must be at least 0, got nan."),
        (checked_number, float("inf"), {"minimum": 0, "finite": True}, "size must be finite and at least 0, got inf."),
        (checked_number, float("nan"), {"finite": True}, "size must be finite, got nan."),
        (checked_integer, 0, {"minimum": 1}, "size must be at least 1, got 0."),
        (
            checked_integer,
            2**31,
            {"minimum": 1, "bits": 31},
            "size must be at least 1 and less than 2**31, got 2147483648.",
        ),
    ],
)
def test_messages_name_all_bounds(check: Callable[..., Any], value: Any, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        check("size", value, **options)


def test_numbers_within_bounds_become_pythons() -> None:
    assert checked_number("size", float("inf"), minimum=0) == float("inf")
    assert checked_number("size", 10**400, minimum=0, finite=True) == 10**400  # too large for a float
    assert checked_integer("size", 2**31 - 1, minimum=1, bits=31) == 2**31 - 1
    for check, value in ((checked_number, np.float32(0.5)), (checked_integer, np.int64(3))):
        checked = check("size", value)
        assert checked == value
        assert type(checked) in (int, float)
