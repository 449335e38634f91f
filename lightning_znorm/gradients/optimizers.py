"""What optimizers tell of their steps: whether these run hooks, and whether one runs inside another."""

import sys

from torch.optim import Optimizer


def runs_hooks(optimizer: Optimizer) -> bool:
    """Whether torch has put hooks around the step; a scheduler, for one, may have put something around that."""
    steps = (type(optimizer).step, optimizer.step)
    return any(getattr(step, "hooked", False) for step in steps)


def is_nested_step() -> bool:
    """Whether the step whose hook asks was called by another step of the same optimizer.

    So it is where a step calls that of a base class, or one that has been put in its place calls the original: torch
    then runs the hooks twice. To be called from the hook itself. Read from the call stack, in microseconds: a counter
    would not go back where a step raises, because torch then runs no hook after it.
    """
    frame = sys._getframe(2)  # torch's, around the step
    optimizer, around, outer = frame.f_locals.get("self"), frame.f_code, frame.f_back
    while outer is not None:
        if outer.f_code is around and outer.f_locals.get("self") is optimizer:
            return True
        outer = outer.f_back
    return False


def takes_two_steps(optimizer: object) -> bool:
    """Whether an optimizer has the two steps of SAM, of which the first one climbs."""
    return hasattr(optimizer, "first_step") and hasattr(optimizer, "second_step")


def wrapped_by(optimizer: object) -> list[Optimizer]:
    """Return the optimizers that an optimizer keeps as attributes."""
    return [value for value in getattr(optimizer, "__dict__", {}).values() if isinstance(value, Optimizer)]
