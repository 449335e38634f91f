"""Checks of the data modules' arguments: what came, and what is expected."""

from pathlib import Path
from typing import Any

from lightning_znorm.errors import ZNormTypeError, ZNormValueError


def check_number(name: str, value: Any, kind: type, least: float | None = None, bits: int | None = None) -> None:
    """Refuse an argument that is no number, or one out of range.

    Args:
        name: What a message calls it.
        value: Plain.
        kind: ``int`` or ``float``, of which a whole number is one too.
        least: The least that it may be.
        bits: It is less than two to the power of this.

    Raises:
        TypeError: If it is no number of the kind.
        ValueError: If it is out of range, or NaN.

    Example:
        >>> check_number("batch_size", 64, int, least=1)
    """
    if isinstance(value, bool) or not isinstance(value, int if kind is int else (int, float)):
        raise ZNormTypeError(f"{name} must be a {'whole ' if kind is int else ''}number, got {value!r}.")
    too_small, too_large = least is not None and not value >= least, bits is not None and not value < 2**bits
    if too_small or too_large:
        bounds = [] if least is None else [f"at least {least}"]
        bounds += [] if bits is None else [f"less than 2**{bits}"]
        raise ZNormValueError(f"{name} must be {' and '.join(bounds)}, got {value}.")


def checked_folder(name: str, value: Any) -> Path:
    """Return a folder's absolute path, in which ``~`` is a home directory.

    Args:
        name: What a message calls it.
        value: A path.

    Raises:
        TypeError: If it is no path.
        ValueError: If nobody has that home directory.
    """
    if not isinstance(value, str | Path):
        raise ZNormTypeError(f"{name} must be a path, got {value!r}.")
    try:
        return Path(value).expanduser().absolute()
    except RuntimeError as error:
        raise ZNormValueError(f"{name} is {value}, and there is no such home directory.") from error
