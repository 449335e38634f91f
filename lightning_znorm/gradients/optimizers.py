"""The steps of optimizers: whether they run hooks, and whether one runs inside another."""

import inspect
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType, FrameType
from typing import Any

from torch.optim import Optimizer


def runs_hooks(optimizer: Optimizer) -> bool:
    """Return whether the optimizer's step is still the function that torch puts around it to run hooks."""
    function, owner = (getattr(optimizer.step, name, None) for name in ("__func__", "__self__"))
    return owner is optimizer and getattr(function, "__code__", None) is _around_step()


def is_nested_step(optimizer: Optimizer) -> bool:
    """Return whether the optimizer's hooks, one of which calls this, run inside a step that has run them already.

    This happens if a step calls that of a base class, if a step that replaced the original one calls it, or if an
    optimizer wraps another one and shares its hooks. It is read from the call stack, in microseconds: a counter would
    not be reset if a step raises, because torch then runs no hook after it.
    """
    hooks = step_pre_hooks(optimizer)
    optimizers = (frame.f_locals.get("self") for frame in _callers() if frame.f_code is _around_step())
    return sum(step_pre_hooks(optimizer) is hooks for optimizer in optimizers) > 1


def marks_steps() -> bool:
    """Return whether this release of torch puts a function around each step that can be recognized."""
    return _around_step() is not None


def step_pre_hooks(optimizer: object) -> dict[int, Any] | None:
    """Return the hooks that an optimizer runs before its step, ``None`` if it has none.

    torch has no public name for them. Optimizers that wrap another one may share its hooks.
    """
    hooks: dict[int, Any] | None = getattr(optimizer, "_optimizer_step_pre_hooks", None)
    return hooks


def steps_in_backward(optimizer: object) -> bool:
    """Return whether an optimizer steps in the backward pass: ``ZeroRedundancyOptimizer(overlap_with_ddp=True)``."""
    return bool(getattr(optimizer, "_overlap_with_ddp", False))  # torch has no public name for it


def takes_two_steps(optimizer: object) -> bool:
    """Return whether an optimizer has the two steps of SAM, of which the first one climbs."""
    return hasattr(optimizer, "first_step") and hasattr(optimizer, "second_step")


def wrapped_by(optimizer: object) -> list[Optimizer]:
    """Return the optimizers that an optimizer keeps as attributes."""
    return [value for value in getattr(optimizer, "__dict__", {}).values() if isinstance(value, Optimizer)]


@lru_cache(maxsize=1)
def _around_step() -> CodeType | None:
    """Return the code of the function that torch puts around each step, which runs the hooks."""
    wrap = getattr(Optimizer, "profile_hook_step", None)
    return None if wrap is None else wrap(lambda self: None).__code__


def _callers() -> Iterator[FrameType]:
    frame = inspect.currentframe()
    while frame is not None:
        yield frame
        frame = frame.f_back
