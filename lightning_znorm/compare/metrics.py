"""Which logged numbers decide: the names are the experiment's, whatever they are."""

import re
from collections.abc import Collection

from lightning_znorm.compare.study import StudyError

_STAGE = re.compile(r"^(train|validation|valid|val|test)(?=[/_.-])")


def choose(
    asked: str | None, mode: str | None, monitor: tuple[str, str] | None, logged: Collection[str]
) -> tuple[str, str]:
    """The metric by which methods are compared, and whether ``"max"`` or ``"min"`` of it is better.

    Args:
        asked: Name that the user gave, if any.
        mode: Mode that the user gave, if any.
        monitor: Metric and mode of the experiment's own `ModelCheckpoint`, if it has them.
        logged: All names that the experiment logs.

    Raises:
        StudyError: If nothing logs the metric, or it or its mode cannot be guessed.

    Example:
        >>> choose(None, None, ("val/accuracy", "max"), ["val/accuracy", "test/accuracy"])
        ('test/accuracy', 'max')
    """
    names = ", ".join(sorted(logged)) or "nothing"
    if asked is None:
        if monitor is None:
            raise StudyError(
                "Which metric decides? The experiment has no ModelCheckpoint that monitors one: add --metric NAME "
                f"--mode min|max. It logs {names}."
            )
        asked = at_stage(monitor[0], "test", logged) or monitor[0]
    if asked not in logged:
        raise StudyError(f"--metric {asked}: nothing logs it. The experiment logs {names}.")
    if mode is None and monitor and _unstaged(asked) == _unstaged(monitor[0]):
        mode = monitor[1]
    if mode is None:
        mode = direction(asked)
    if mode is None:
        raise StudyError(f"--metric {asked}: add --mode max if more of it is better, else --mode min.")
    return asked, mode


def at_stage(name: str, stage: str, logged: Collection[str]) -> str | None:
    """The metric of the same name at another stage (``"val"``, ``"test"``), if it is logged.

    Example:
        >>> at_stage("val_dice", "test", ["test_dice"])
        'test_dice'
    """
    # A name without a stage, which tests and training log alike, is named with one where it is of a test.
    other = _STAGE.sub(stage, name) if _STAGE.match(name) else f"{stage}/{name}"
    return other if other in logged else None


def stage(name: str) -> str | None:
    """``"train"``, ``"val"`` or ``"test"``, where the name says it."""
    found = _STAGE.match(name)
    return None if found is None else {"v": "val", "t": found[1]}[found[1][0]]


def direction(name: str) -> str | None:
    """``"min"`` for a loss or an error; unknown otherwise."""
    return "min" if re.search(r"loss|error", name.lower()) else None


def train_loss(logged: Collection[str]) -> str | None:
    """The training loss among the names, per epoch rather than per step."""
    found = [name for name in sorted(logged) if stage(name) in ("train", None) and "loss" in name.lower()]
    found.sort(key=lambda name: (stage(name) is None, name.endswith("_step"), name))
    return found[0] if found else None


def _unstaged(name: str) -> str:
    return _STAGE.sub("", name).strip("/_.-")
