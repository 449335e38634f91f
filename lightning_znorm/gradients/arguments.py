"""Checks of arguments that several functions and callbacks share: what came, and what is expected."""

import math
from collections.abc import Iterable, Mapping
from numbers import Integral, Real
from typing import Any

from torch import Tensor

from lightning_znorm.errors import ZNormTypeError, ZNormValueError

_LONGEST = 120  # characters of a value in a message


def shown(value: Any) -> str:
    """A value in one short line, for messages."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and type {value.dtype} on {value.device}"
    is_list = type(value) in (list, tuple)
    text = f"[{', '.join(map(shown, value))}]" if is_list else " ".join(repr(value).split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def checked_number(name: str, value: Any) -> float:
    """Return a finite number from 0 on, as a number of Python's.

    Raises:
        TypeError: If it is no number.
        ValueError: If it is negative, infinite or NaN.
    """
    if type(value) not in (int, float):
        if isinstance(value, bool) or not isinstance(value, Real):  # PyYAML reads 1e-10 as text, 1.0e-10 as a number
            raise ZNormTypeError(f"{name} must be a number, got {shown(value)}")
        value = float(value)  # one of NumPy's would give a method another name, by which checkpoints know it
    if not 0 <= value < math.inf:
        raise ZNormValueError(f"{name} must be a finite number that is not negative, got {value}")
    number: float = value
    return number


def checked_count(name: str, value: Any) -> int:
    """Return a whole number from 0 on, as one of Python's.

    Raises:
        TypeError: If it is no whole number.
        ValueError: If it is negative.
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ZNormTypeError(f"{name} must be a whole number, got {shown(value)}")
    if value < 0:
        raise ZNormValueError(f"{name} must not be negative, got {value}")
    return int(value)


def checked_flag(name: str, value: Any) -> bool:
    """Return a flag, one of NumPy's as one of Python's; any string, "no" too, would count as true.

    Raises:
        TypeError: If it is neither ``True`` nor ``False``.
    """
    if type(value).__name__ not in ("bool", "bool_"):
        raise ZNormTypeError(f"{name} must be True or False, got {shown(value)}")
    return bool(value)


def checked_patterns(name: str, value: Any) -> list[str]:
    """Return one or several patterns as a list; those of a set, which has no order of its own, sorted.

    Raises:
        TypeError: If something is no string.
    """
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, Iterable) or isinstance(value, (Mapping, Tensor)):
        raise ZNormTypeError(
            f"{name} must be a pattern or a list of patterns on names of parameters, got {shown(value)}"
        )
    patterns = list(value)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ZNormTypeError(
                f"{name} must hold patterns on names of parameters, which are strings such as '*.weight', got "
                f"{shown(pattern)} in {shown(value)}"
            )
    # Python's own strings: those of a subclass, such as NumPy's, would stand as such in checkpoints.
    patterns = [str.__str__(pattern) for pattern in patterns]
    return sorted(patterns) if isinstance(value, (set, frozenset)) else patterns
