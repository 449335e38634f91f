"""Checks of arguments: each refuses a wrong value by the argument's name, or returns the value as a plain one."""

import math
from collections.abc import Iterable, Mapping, Sequence
from numbers import Integral, Real
from pathlib import Path
from typing import Any, TypeVar

from torch import Tensor

from lightning_znorm.errors import ZNormTypeError, ZNormValueError

Word = TypeVar("Word", bound=str)

_LONGEST = 120  # characters of a value in a message


def shown(value: Any) -> str:
    """Return a value in one short line, for messages."""
    if isinstance(value, Tensor):
        return f"a tensor of shape {tuple(value.shape)} and type {value.dtype} on {value.device}"
    is_list = type(value) in (list, tuple)
    text = f"[{', '.join(map(shown, value))}]" if is_list else " ".join(repr(value).split())
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."


def listed(names: Sequence[str], limit: int = 5) -> str:
    """Return names in one line, for messages: ``a, b and 3 more``.

    Args:
        names: The names.
        limit: How many are named.
    """
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def checked_number(name: str, value: Any, minimum: float | None = None, finite: bool = False) -> float:
    """Return a number as an ``int`` or ``float`` of Python.

    Args:
        name: The argument's name, for messages.
        value: What the user passed.
        minimum: Smallest number allowed. If given, NaN is refused too.
        finite: Whether infinity and NaN are refused.

    Raises:
        TypeError: If it is not a number.
        ValueError: If it is out of range.

    Example:
        >>> checked_number("eps", 1e-8, minimum=0, finite=True)
        1e-08
    """
    if type(value) not in (int, float):
        if isinstance(value, bool) or not isinstance(value, Real):  # PyYAML reads 1e-10 as text, 1.0e-10 as a number
            raise ZNormTypeError(f"{name} must be a number, got {shown(value)}.")
        value = float(
            value
        )  # a NumPy scalar has another repr, and checkpoints know methods by the repr of their options
    if (finite and not -math.inf < value < math.inf) or (minimum is not None and not value >= minimum):
        bounds = ["finite"] if finite else []
        bounds += [] if minimum is None else [f"at least {minimum}"]
        raise ZNormValueError(f"{name} must be {' and '.join(bounds)}, got {value}.")
    number: float = value
    return number


def checked_integer(name: str, value: Any, minimum: int | None = None, bits: int | None = None) -> int:
    """Return a whole number as an ``int`` of Python.

    Args:
        name: The argument's name, for messages.
        value: What the user passed.
        minimum: Smallest number allowed.
        bits: The number must be less than two to the power of this.

    Raises:
        TypeError: If it is not a whole number.
        ValueError: If it is out of range.

    Example:
        >>> checked_integer("batch_size", 64, minimum=1)
        64
    """
    if isinstance(value, bool) or not isinstance(value, Integral):
        raise ZNormTypeError(f"{name} must be a whole number, got {shown(value)}.")
    if (minimum is not None and value < minimum) or (bits is not None and value >= 2**bits):
        bounds = [] if minimum is None else [f"at least {minimum}"]
        bounds += [] if bits is None else [f"less than 2**{bits}"]
        raise ZNormValueError(f"{name} must be {' and '.join(bounds)}, got {value}.")
    return int(value)


def checked_flag(name: str, value: Any) -> bool:
    """Return ``True`` or ``False`` as a ``bool`` of Python; strings are refused, because "no" would count as true.

    Raises:
        TypeError: If it is neither ``True`` nor ``False``.
    """
    if type(value).__name__ not in ("bool", "bool_"):  # NumPy's, which this module does not import
        raise ZNormTypeError(f"{name} must be True or False, got {shown(value)}.")
    return bool(value)


def checked_choice(name: str, value: Any, choices: Sequence[Word]) -> Word:
    """Return a value that is one of several words.

    Args:
        name: The argument's name, for messages.
        value: What the user passed.
        choices: The words that are allowed.

    Raises:
        ValueError: If it is none of them.

    Example:
        >>> checked_choice("centering", "full", ("full", "adaptive"))
        'full'
    """
    if not isinstance(value, str) or value not in choices:
        *others, last = map(repr, choices)
        raise ZNormValueError(f"{name} must be {', '.join(others)} or {last}, got {shown(value)}.")
    # Not the value itself, which may be of a subclass of str: checkpoints know methods by the repr of their options.
    return next(choice for choice in choices if choice == value)


def checked_patterns(name: str, value: Any) -> list[str]:
    """Return one pattern or several as a list. The patterns of a set, which has no order of its own, are sorted.

    Raises:
        TypeError: If one is not a string.
    """
    if isinstance(value, str):
        value = [value]
    if not isinstance(value, Iterable) or isinstance(value, (Mapping, Tensor)):
        raise ZNormTypeError(
            f"{name} must be a pattern or a list of patterns on names of parameters, got {shown(value)}."
        )
    patterns = list(value)
    for pattern in patterns:
        if not isinstance(pattern, str):
            raise ZNormTypeError(
                f"{name} must hold patterns on names of parameters, which are strings such as '*.weight', got "
                f"{shown(pattern)} in {shown(value)}."
            )
    # Plain strings: a checkpoint would keep a subclass, such as NumPy's, as it is.
    patterns = [str.__str__(pattern) for pattern in patterns]
    return sorted(patterns) if isinstance(value, (set, frozenset)) else patterns


def checked_folder(name: str, value: Any) -> Path:
    """Return the absolute path of a folder, which need not exist. ``~`` stands for a home directory.

    Raises:
        TypeError: If it is not a path.
        ValueError: If ``~`` names a user who has no home directory.
    """
    if not isinstance(value, str | Path):
        raise ZNormTypeError(f"{name} must be a path, got {shown(value)}.")
    try:
        return Path(value).expanduser().absolute()
    except RuntimeError as error:
        raise ZNormValueError(f"{name} is {value}, and there is no such home directory.") from error
