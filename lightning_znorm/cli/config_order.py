"""A method must never vanish without a word.

Config files are laid over one another in the order in which they are named: a later one overrides an earlier one, and
a plain ``callbacks:`` replaces the callbacks named before it. What would undo a method in this way is refused here.
"""

import shlex
from collections.abc import Iterable, Sequence
from typing import Any

from lightning_znorm.cli.config_files import ConfigFile
from lightning_znorm.errors import ZNormValueError


def check_order(files: Sequence[ConfigFile]) -> None:
    """Refuse files that undo a method, in the order in which they are named.

    Args:
        files: All that were named, in order.

    Raises:
        ValueError: If a file is named twice, an experiment after what is to be laid over it, or a file after a method
            that it overrides.
    """
    for i, later in enumerate(files):
        for earlier in files[:i]:
            if later.path == earlier.path:
                raise ZNormValueError(f"{later.name} is named twice: name it once.")
            if later.is_experiment and not earlier.is_experiment:
                right = sorted(files, key=lambda file: not file.is_experiment)
                raise ZNormValueError(
                    f"{later.name} is an experiment and overrides what is named before it, {earlier.name}: name "
                    f"experiments first, as in {' '.join(f'--config {shlex.quote(file.name)}' for file in right)}"
                )
            if earlier.is_method:
                _check_laid_over(earlier, later)


def check_callbacks(files: Iterable[ConfigFile], callbacks: Sequence[dict[str, Any]], methods: Iterable[str]) -> None:
    """Refuse a run that lost a gradient method which a file names, or that applies one twice.

    Args:
        files: All that were named.
        callbacks: The trainer's callbacks, each by its ``class_path`` and ``init_args``.
        methods: Class names of all gradient methods.

    Raises:
        ValueError: If a method is missing among the callbacks, or there twice with the same arguments.
    """
    kept = [_class_name(callback["class_path"]) for callback in callbacks]
    for file in files:
        for name in map(_class_name, file.callbacks):
            if name in methods and name not in kept:
                raise ZNormValueError(
                    f"{name} of {file.name} is lost, for --trainer.callbacks replaces all callbacks: append with "
                    "--trainer.callbacks+= (in a file, `callbacks+:`)."
                )
    for i, name in enumerate(kept):
        if name in methods and callbacks[i] in callbacks[:i]:
            raise ZNormValueError(f"{name} is twice among the callbacks: name it once.")


def _check_laid_over(method: ConfigFile, later: ConfigFile) -> None:
    for key, value in later.settings.items():
        undone = next((own for own in method.settings if _overrides(key, own)), None)
        if undone is None or (key == undone and value == method.settings[key]):
            continue
        if undone.endswith("+"):
            way_out = "write `callbacks+:` there, which appends"
        elif later.is_method:
            way_out = "name one of the two"
        else:
            way_out = f"leave it out there, and override it by --{key} if that is meant"
        raise ZNormValueError(f"{later.name} sets {key} and so undoes {method.name}, named before it: {way_out}.")


def _overrides(key: str, earlier: str) -> bool:
    earlier = earlier.removesuffix("+")
    return earlier in (key, key.removesuffix(".class_path")) or earlier.startswith(f"{key}.")


def _class_name(class_path: str) -> str:
    return class_path.rpartition(".")[2]
