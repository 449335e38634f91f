"""What optimizers tell of their steps: whether these run hooks, and whether one runs inside another."""

import inspect
import sys
from collections.abc import Iterable, Iterator
from functools import lru_cache, partial
from types import CodeType, FrameType, FunctionType, MethodType, ModuleType
from typing import Any

from torch.nn import Module
from torch.optim import Optimizer

_DEPTH = 5  # from one object to what it refers to


def runs_hooks(optimizer: Optimizer) -> bool:
    """Whether the step is the function that torch has put around it to run hooks, or leads to that.

    The latter is so of what schedulers, accelerators and users put in its place, if they call the original: it is among
    what their names stand for, or in an object or a collection there.
    """
    seen: dict[int, object] = {}
    waiting: list[tuple[Any, int]] = [(optimizer.step, 0)]
    while waiting:
        found, depth = waiting.pop()
        if id(found) in seen or depth > _DEPTH:
            continue
        seen[id(found)] = found
        if isinstance(found, FunctionType) and found.__code__ is _around_step():
            return True
        waiting += [(each, depth + 1) for each in _referred_to(found, optimizer)]
    return False


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


def _referred_to(found: Any, optimizer: Optimizer) -> Iterable[Any]:
    """What a call of something may call, as far as its names and attributes tell."""
    if isinstance(found, (type, ModuleType, Module)) or (isinstance(found, Optimizer) and found is not optimizer):
        return ()
    if isinstance(found, MethodType):
        is_others = isinstance(found.__self__, Optimizer) and found.__self__ is not optimizer
        return () if is_others else (found.__func__, found.__self__)
    if isinstance(found, FunctionType):
        return _named_in(found, optimizer)
    if isinstance(found, partial):
        return [found.func, *found.args, *found.keywords.values()]
    if isinstance(found, (list, tuple)):
        return found
    if isinstance(found, dict):
        return found.values()
    return [value for name, value in getattr(found, "__dict__", {}).items() if name != "step"]


def _named_in(function: FunctionType, optimizer: Optimizer) -> list[Any]:
    try:
        found = inspect.getclosurevars(function)
    except ValueError:  # one is not bound yet
        return []
    values = [*found.nonlocals.values(), *found.globals.values()]
    names = {*function.__code__.co_names, *function.__code__.co_freevars}
    if "step" in names:  # perhaps that of the optimizer's class, or of one of its base classes
        values += [cls.step for cls in type(optimizer).__mro__ if cls.__name__ in names and hasattr(cls, "step")]
    return values


def _callers() -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back
