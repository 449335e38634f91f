"""How a callback is shown: its class, and those of its options that are not the default ones."""

import inspect
import operator
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_znorm.arguments import shown


def represented(callback: object, owner: type, attributes: Mapping[str, str]) -> str:
    """Return the text of a callback, such as ``ZNormCallback(min_ndim=2)``.

    A subclass is shown with the options of the class that it derives from, whatever its own constructor takes.

    Args:
        callback: The callback. Options that it lacks, because its constructor has not run, are left out.
        owner: The class whose constructor has the options.
        attributes: For each option, where the callback keeps it: ``{"eps": "method.eps"}``.
    """
    defaults = {name: each.default for name, each in inspect.signature(owner).parameters.items()}
    options = []
    for name, path in attributes.items():
        try:
            value = _as_given(operator.attrgetter(path)(callback))
        except AttributeError:
            continue
        if value != _as_given(defaults[name]):
            options.append(f"{name}={shown(value)}")
    return f"{type(callback).__name__}({', '.join(options)})"


def _as_given(value: Any) -> Any:
    """Return an option in the form in which a user writes it."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, (set, frozenset)):
        return sorted(value)
    if isinstance(value, tuple):
        value = list(value)
    return value[0] if isinstance(value, list) and len(value) == 1 and isinstance(value[0], str) else value
