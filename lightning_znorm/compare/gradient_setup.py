"""What each method does with gradients, from the settings of its runs."""

import os
import pkgutil
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, get_type_hints

from lightning_znorm.compare.settings import as_list, class_name
from lightning_znorm.compare.study import Study, StudyError


def gradient_callbacks(settings: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the callbacks that transform gradients: every `GradientTransform`, also a user's own."""
    return [entry for entry in as_list(settings["trainer"].get("callbacks")) if _transforms_gradients(entry)]


def check_experiment(study: Study, settings: dict[str, dict[str, Any]]) -> None:
    """Refuse an experiment that holds a gradient method itself: every method would be laid over it.

    Args:
        study: The study.
        settings: Resulting settings of each method.

    Raises:
        StudyError: If a run has a gradient method that is not of its method's file.
    """
    for method, resolved in settings.items():
        transforms = Counter(class_name(entry) for entry in gradient_callbacks(resolved))
        for name in transforms - _names(study.files[method]) if transforms else ():
            holders = (config for config in study.configs if name in _names(config))
            raise StudyError(
                f"{next(holders, 'An option of `fit`')} adds {name} to every method, so that {method} is not what "
                f"{study.files[method]} says: move {name} into a method file of its own (`trainer: callbacks+:`), and "
                "name that among --methods."
            )


def check_tried(study: Study, method: str, settings: dict[str, Any], found: dict[str, list[str]]) -> None:
    """Refuse a method that was tried out, and trained with a gradient method that its settings do not name.

    Args:
        study: The study.
        method: Name of the method.
        settings: Its resulting settings.
        found: Classes of the gradient methods that worked, as the run recorded them.

    Raises:
        StudyError: If there are more than the settings account for.
    """
    file, entries = study.files[method], gradient_callbacks(settings)
    if found["added"] and not _sets_model(file):
        raise StudyError(
            f"{found['added'][0]} trains under {file}, which does not name it: the model's configure_callbacks, or "
            "other code, adds it to the Trainer. Take it out there, and name it in a method file of its own "
            "(`trainer: callbacks+:`), or let a setting of the model decide, which a method file makes."
        )
    if len(found["given"]) > len(entries):
        name = next(iter(Counter(found["given"]) - Counter(map(class_name, entries))))
        raise StudyError(
            f"{name} trains under {file}, and no callback in the settings says that it is one: a function, or an "
            f"installed plugin of Lightning's, seems to make it. Name the class, or annotate the function: `-> {name}`."
        )
    if found["attached"] and not _sets_model(file):
        raise StudyError(
            f"A gradient method that is attached to {found['attached'][0]} trains under {file}, which sets nothing of "
            "the model: its code, or the optimizer's, calls lightning_znorm.functional.attach. Leave that to a setting "
            "of the model, which a method file makes."
        )


def same_settings(settings: dict[str, dict[str, Any]]) -> list[list[str]]:
    """Group the methods whose resulting settings are the same."""
    groups: list[list[str]] = []
    for method, resolved in settings.items():
        for group in groups:
            if settings[group[0]] == resolved:
                group.append(method)
                break
        else:
            groups.append([method])
    return [group for group in groups if len(group) > 1]


def described(entry: dict[str, Any]) -> str:
    """Write an object of the settings as a call.

    Example:
        >>> described({"class_path": "lightning_znorm.SINGCallback", "init_args": {"eps": 0.1, "include": "*"}})
        "SINGCallback(eps=0.1, include='*')"
    """
    arguments = (entry.get("init_args") or {}).items()
    return f"{class_name(entry)}({', '.join(f'{key}={value!r}' for key, value in arguments)})"


def _transforms_gradients(entry: dict[str, Any]) -> bool:
    from lightning_znorm.callbacks import GradientTransform

    with _importable_from_here():
        found = pkgutil.resolve_name(entry["class_path"])
    if not isinstance(found, type):  # a function that makes a callback
        try:
            found = get_type_hints(found).get("return")
        except NameError:  # of a type that is imported for type checkers alone: nothing is known of it
            return False
    return isinstance(found, type) and issubclass(found, GradientTransform)


@contextmanager
def _importable_from_here() -> Iterator[None]:
    """Import from the working directory too, as the processes of the runs do."""
    here = os.getcwd()
    if here in sys.path:
        yield
        return
    sys.path.append(here)
    try:
        yield
    finally:
        sys.path.remove(here)


def _sets_model(file: str) -> bool:
    """Whether a file sets anything of the model, such as its optimizer."""
    from lightning_znorm.cli.config_files import read_config

    return any(key.partition(".")[0] == "model" for key in read_config(file).settings)


def _names(file: str) -> Counter[str]:
    """Class names of the callbacks that a file adds."""
    from lightning_znorm.cli.config_files import read_config  # the room above, whose commands a study runs

    return Counter(name.rpartition(".")[2] for name in read_config(file).callbacks)
