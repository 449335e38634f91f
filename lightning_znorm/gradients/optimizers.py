"""What optimizers tell of their steps: whether these run hooks, and whether one runs inside another."""

import sys
from collections.abc import Iterator
from functools import lru_cache
from types import CodeType, FrameType

from torch.optim import Optimizer


def runs_hooks(optimizer: Optimizer) -> bool:
    """Whether the step is the function that torch puts around it to run hooks, and nothing has taken its place."""
    function, owner = (getattr(optimizer.step, name, None) for name in ("__func__", "__self__"))
    return owner is optimizer and getattr(function, "__code__", None) is _around_step()


def is_nested_step(optimizer: Optimizer) -> bool:
    """Whether the optimizer's hooks, from one of which this is called, run inside a step that has run them already.

    So it is where a step calls that of a base class, or one that has been put in its place calls the original, or an
    optimizer wraps another one and shares its hooks. Read from the call stack, in microseconds: a counter would not go
    back where a step raises, because torch then runs no hook after it.
    """
    hooks = optimizer._optimizer_step_pre_hooks
    steps = (frame.f_locals.get("self") for frame in _callers() if frame.f_code is _around_step())
    return sum(getattr(step, "_optimizer_step_pre_hooks", None) is hooks for step in steps) > 1


def marks_steps() -> bool:
    """Whether this release of torch puts the hooks around a step in a way that can be seen."""
    return _around_step() is not None


def takes_two_steps(optimizer: object) -> bool:
    """Whether an optimizer has the two steps of SAM, of which the first one climbs."""
    return hasattr(optimizer, "first_step") and hasattr(optimizer, "second_step")


def wrapped_by(optimizer: object) -> list[Optimizer]:
    """Return the optimizers that an optimizer keeps as attributes."""
    return [value for value in getattr(optimizer, "__dict__", {}).values() if isinstance(value, Optimizer)]


@lru_cache(maxsize=1)
def _around_step() -> CodeType | None:
    """The code of the function that torch puts around each step, which runs the hooks."""
    wrap = getattr(Optimizer, "profile_hook_step", None)
    return None if wrap is None else wrap(lambda self: None).__code__


def _callers() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
