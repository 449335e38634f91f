"""Hyperparameters as plain values, because a checkpoint with other values cannot be loaded again."""

import copy
import io
import os
from argparse import Namespace
from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any

import numpy as np
import torch
from lightning.pytorch.core.mixins import HyperparametersMixin
from typing_extensions import override

from lightning_znorm.errors import ZNormValueError

_REMEDY = "pass a number, a text, or a list or dict of these"
# Python's type for each kind of NumPy scalar. Dates, durations and records have none.
_KINDS: dict[str, type] = {"b": bool, "i": int, "u": int, "f": float, "c": complex, "S": bytes, "U": str}
_SCALARS: tuple[Any, ...] = (bool, int, float, complex, bytes)


class PlainHyperparameters(HyperparametersMixin):
    """Save hyperparameters as plain values, in modules and data modules.

    Callables, such as networks and functions that make optimizers, and dictionaries and lists of them, are not
    hyperparameters. They are left out, and must be passed to ``load_from_checkpoint`` again. LightningCLI describes the
    objects that it builds by plain values.
    """

    # `save_hyperparameters` finds arguments in the frame that calls it, so it cannot be overridden. It passes all
    # values through this method, also those that subclasses add.
    @override
    def _set_hparams(self, hp: Any) -> None:
        values = vars(hp) if isinstance(hp, Namespace) else hp
        if isinstance(values, Mapping):
            hp = {name: plain_value(name, value) for name, value in values.items() if not _is_object(value)}
        super()._set_hparams(hp)


def plain_values(**arguments: object) -> list[Any]:
    """Return arguments as plain values, in order.

    Args:
        **arguments: The arguments, by the names that messages use.

    Raises:
        ValueError: If an argument has no plain value.

    Example:
        >>> plain_values(num_classes=np.int64(10), root=np.str_("data"), weights=np.array([0.5, 2.0]))
        [10, 'data', [0.5, 2.0]]
    """
    return [plain_value(name, value) for name, value in arguments.items()]


def plain_value(name: str, value: Any, remedy: str = _REMEDY) -> Any:
    """Return a value as a plain one: Python's number for NumPy's and torch's, text for a path, a list for an array.

    Args:
        name: What a message calls the value.
        value: The value. Plain values stay as they are.
        remedy: What a message advises.

    Raises:
        ValueError: If ``torch.load(..., weights_only=True)`` accepts no plain value in its place.
    """
    if isinstance(value, np.ndarray) and value.ndim:
        return [plain_value(f"{name}[{index}]", each, remedy) for index, each in enumerate(value)]
    if isinstance(value, (np.generic, np.ndarray)):
        value = value.item() if value.dtype.kind == "O" else _python_scalar(value)
    elif isinstance(value, torch.Tensor) and value.ndim == 0:
        value = value.item()
    elif isinstance(value, os.PathLike):
        return os.fsdecode(value)
    if isinstance(value, str):
        return str.__str__(value)  # `str` of an enum's member would be its name
    for kind in _SCALARS:
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {
            plain_value(f"a key of {name}", key, remedy): plain_value(f"{name}[{key!r}]", each, remedy)
            for key, each in value.items()
        }
    if isinstance(value, (Sequence, Set)) and not isinstance(value, bytearray):
        kept = [plain_value(f"{name}[{index}]", each, remedy) for index, each in enumerate(value)]
        return tuple(kept) if isinstance(value, tuple) else set(kept) if isinstance(value, Set) else kept
    if not _can_be_loaded(value):
        found = f"the class {value.__name__}" if isinstance(value, type) else f"of type {type(value).__name__}"
        raise ZNormValueError(
            f"{name} is {found}, and hyperparameters are plain values, or no checkpoint could be loaded: {remedy}."
        )
    return value


def not_loadable(hyperparameters: Mapping[str, Any]) -> list[str]:
    """Return the names of hyperparameters that ``torch.load(weights_only=True)`` refuses.

    Args:
        hyperparameters: The hyperparameters of a module or data module.
    """
    # A network is not tried, because a copy of it may fill the memory.
    return [
        name
        for name, value in hyperparameters.items()
        if isinstance(value, torch.nn.Module) or not _can_be_loaded(value)
    ]


def python_scalars(value: Any) -> Any:
    """Return the content of a checkpoint with Python's numbers in place of NumPy's. Everything else stays as it is.

    NumPy's numbers come from users: optimizers and schedulers save the learning rate that they were given, and
    callbacks their settings.

    Args:
        value: The content, or a part of it.
    """
    if isinstance(value, (np.generic, np.ndarray)) and value.ndim == 0:
        return _python_scalar(value)
    if isinstance(value, dict):
        keys, values = ([python_scalars(each) for each in part] for part in (value, value.values()))
        if _same(keys, value) and _same(values, value.values()):
            return value
        converted = copy.copy(value)  # it may be a Counter
        converted.clear()
        for key, each in zip(keys, values, strict=True):
            converted[key] = each
        return converted
    if type(value) in (list, tuple):
        parts = [python_scalars(each) for each in value]
        return value if _same(parts, value) else type(value)(parts)
    return value


def _python_scalar(value: Any) -> Any:
    """Return Python's scalar for NumPy's, if there is one, else NumPy's."""
    scalar = value[()] if isinstance(value, np.ndarray) else value
    kind = _KINDS.get(value.dtype.kind)
    return scalar if kind is None else kind(scalar)


def _can_be_loaded(value: object) -> bool:
    file = io.BytesIO()
    try:
        torch.save(value, file)
        file.seek(0)
        torch.load(file, weights_only=True)
    except Exception:  # an object may define how it is pickled, and may raise any exception
        return False
    return True


def _is_object(value: Any) -> bool:
    parts = value.values() if isinstance(value, Mapping) else value if isinstance(value, (list, tuple)) else ()
    return callable(value) or any(map(callable, parts))


def _same(new: Iterable[object], old: Iterable[object]) -> bool:
    return all(one is other for one, other in zip(new, old, strict=True))
