"""Several gradient methods on the same parameters: two of a kind are refused, others said."""

from collections.abc import Iterable
from functools import partial
from typing import Any

from lightning_znorm.gradients import AffineMethod, GradientMethod
from lightning_znorm.gradients.slots import GradientSlot, ParameterFilter


def shared_names(first: ParameterFilter, second: ParameterFilter, slots: Iterable[GradientSlot]) -> list[str]:
    """The names of the parameters that two filters choose, one for each parameter."""
    return [slot.names[0] for slot in slots if first.matches(slot) and second.matches(slot)]


def is_same_method(first: GradientMethod, second: GradientMethod) -> bool:
    """Whether two methods are one and the same but for their options."""
    return bool(_kind(first) == _kind(second))


def _kind(method: Any) -> Any:
    if isinstance(method, partial):
        return _kind(method.func)
    return type(method) if isinstance(method, AffineMethod) else method
