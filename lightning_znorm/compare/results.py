"""What runs have logged, joined over the attempts at each."""

import csv
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, fields
from io import StringIO
from pathlib import Path
from typing import Any

from lightning_znorm.compare.files import DamagedError, read_object, write_text
from lightning_znorm.compare.metrics import stage
from lightning_znorm.compare.numbers import mean
from lightning_znorm.compare.study import Run

OWN = "compare/"
"""Begins the names of what is logged by the study and not by the experiment."""
GRADIENT_NORM = f"{OWN}gradient_norm"
STEP_SECONDS = f"{OWN}step_seconds"
TRAIN_SECONDS = f"{OWN}train_seconds"
LOGGED_EPOCHS = "logged_epochs"
"""Key in `fit.json` and in checkpoints: epochs at whose end a run has logged `TRAIN_SECONDS`."""

_FIT = {"epochs": int, "seconds": int | float, "parameters": int, "device": str, "threads": int, "versions": dict}
_FIT_LATER = {  # the first versions wrote none of these
    "weights": str | None,
    "optimizers": list,
    "methods": dict,
    "logged": list,
    LOGGED_EPOCHS: list,
    "logged_numbers": int,
}
_CHECKPOINT = {"path": str, "epoch": int, "monitor": str | None, "value": int | float | None}


@dataclass(frozen=True)
class Measurement:
    """One number.

    Args:
        run: Name of the run.
        seed: Its seed.
        method: Its method.
        epoch: Epoch, from 0; for a test, that of the checkpoint that was tested.
        metric: Name under which it was logged.
        value: Mean over what was logged under this name in the epoch; of validations, the last.
    """

    run: str
    seed: int
    method: str
    epoch: int
    metric: str
    value: float


@dataclass(frozen=True)
class Evaluation:
    """The test of a run, and of what.

    Args:
        metrics: What it logged.
        path: The checkpoint that was tested.
        epoch: Epoch of that checkpoint, from 0.
        monitor: Metric that chose it, if one did.
        value: That metric in that epoch.
    """

    metrics: dict[str, float]
    path: str
    epoch: int
    monitor: str | None
    value: float | None


def read_fit(run: Run) -> dict[str, Any] | None:
    """What a run says of its training, once that has ended; None before.

    Raises:
        DamagedError: If it says something else.
    """
    fit = read_object(run.fit_file, _FIT, _FIT_LATER)
    for name, classes in (fit or {}).get("methods", {}).items():
        if not isinstance(classes, list):
            raise DamagedError(run.fit_file, f"its methods.{name} is {classes!r}")
    return fit


def read_test(run: Run) -> Evaluation | None:
    """The test of a run; None where there is none, or none that says what was tested, as version 0.1.0 left them.

    Raises:
        DamagedError: If it is no test.
    """
    content = read_object(run.test_file, {})
    if content is None:
        return None
    checkpoint, metrics = content.get("checkpoint"), content.get("metrics", content)
    if not isinstance(metrics, dict) or not all(isinstance(value, int | float) for value in metrics.values()):
        raise DamagedError(run.test_file, "its metrics are no numbers")
    if checkpoint is None and content:
        return None
    if not isinstance(checkpoint, dict) or not all(isinstance(checkpoint.get(k), t) for k, t in _CHECKPOINT.items()):
        raise DamagedError(run.test_file, "it does not say which checkpoint was tested")
    return Evaluation(metrics, **{key: checkpoint[key] for key in _CHECKPOINT})


def read_progress(run: Run) -> tuple[int, float] | None:
    """How many epochs a run has behind it, and which share of its training; None if it has not begun.

    Raises:
        DamagedError: If its file says something else.
    """
    content = read_object(run.progress_file, {"epoch": int, "share": int | float})
    return None if content is None else (content["epoch"], content["share"])


def read_run(run: Run) -> list[Measurement]:
    """All that a run has logged, by epoch.

    Raises:
        DamagedError: If its training has ended, and not all is there that it logged; or if a file holds something else.
    """
    fit = read_fit(run)
    rows = list(_rows(run, has_ended=fit is not None))
    values: dict[tuple[int, str], list[float]] = defaultdict(list)
    for row in rows:
        if row.epoch is not None:
            for metric, value in row.numbers.items():
                values[row.epoch, metric].append(value)
    if fit is not None:
        _check_epochs(run, rows, fit.get(LOGGED_EPOCHS, []))
        # The first versions did not count.
        if sum(len(row.numbers) for row in rows) < fit.get("logged_numbers", min(fit["epochs"], 1)):
            raise DamagedError(run.logs, "it lacks numbers that were logged")
    fitted = {key: found[-1] if stage(key[1]) == "val" else mean(found) for key, found in sorted(values.items())}
    if (tested := read_test(run)) is not None:
        fitted |= {(tested.epoch, metric): value for metric, value in tested.metrics.items()}
    return [Measurement(run.name, run.seed, run.method, key[0], key[1], value) for key, value in fitted.items()]


def curves(measurements: Iterable[Measurement], metric: str) -> dict[str, dict[int, dict[int, float]]]:
    """A metric by method, seed and epoch."""
    found: dict[str, dict[int, dict[int, float]]] = {}
    for m in measurements:
        if m.metric == metric:
            found.setdefault(m.method, {}).setdefault(m.seed, {})[m.epoch] = m.value
    return found


def check_log(run: Run, epochs: Iterable[int]) -> int:
    """See that the log of a run, whose training may go on, holds epochs that it has behind it.

    Args:
        run: The run.
        epochs: The epochs.

    Returns:
        The last epoch of which it holds anything, -1 if it is empty.

    Raises:
        DamagedError: If they are not there, or if a file holds something else.
    """
    rows = list(_rows(run, has_ended=False))
    _check_epochs(run, rows, epochs)
    return max((row.epoch for row in rows if row.epoch is not None), default=-1)


def count_numbers(run: Run) -> int:
    """How many numbers a run has logged in its training."""
    return sum(len(row.numbers) for row in _rows(run, has_ended=False))


def logged_names(run: Run) -> set[str]:
    """Names of what the experiment itself has logged in a run."""
    names = {measurement.metric for measurement in read_run(run)}
    return {name for name in names if not name.startswith(OWN)}


def write_results(path: Path, measurements: Iterable[Measurement]) -> None:
    """Write a tidy CSV file: a number in each row."""
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([field.name for field in fields(Measurement)])
    writer.writerows(astuple(measurement) for measurement in measurements)
    write_text(path, text.getvalue())


@dataclass(frozen=True)
class _Row:
    epoch: int | None
    numbers: dict[str, float]


def _rows(run: Run, has_ended: bool) -> Iterator[_Row]:
    """Rows of all attempts at training; of what was done again after an interruption, the latter."""
    attempts = []
    for folder in run.logs.glob("version_*"):
        version = folder.name.rpartition("_")[2]
        attempt = read_object(folder / "attempt.json", {"step": int})
        if attempt is not None and version.isdecimal() and (folder / "metrics.csv").is_file():  # none for a test
            attempts.append((int(version), attempt["step"], folder / "metrics.csv"))
    attempts.sort()
    for i, (_, _, path) in enumerate(attempts):
        end = min((start for _, start, _ in attempts[i + 1 :]), default=math.inf)
        for row in _read_csv(path, is_whole=has_ended and i == len(attempts) - 1):
            if _count(path, row["step"]) < end:
                epoch = _count(path, row["epoch"]) if row.get("epoch") else None
                items = ((metric, _number(text)) for metric, text in row.items() if metric not in ("epoch", "step"))
                yield _Row(epoch, {metric: value for metric, value in items if value is not None})


def _read_csv(path: Path, is_whole: bool) -> list[dict[str, str]]:
    """Read the rows of a log.

    Args:
        path: The log.
        is_whole: Whether who wrote it came to its end; else there may be half a line.
    """
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if is_whole and whole != content:
        raise DamagedError(path, "its last line is cut off")
    try:
        text = whole.decode("utf-8")
        reader = csv.DictReader(StringIO(text), strict=True)
        rows = list(reader)
    except UnicodeDecodeError as error:
        raise DamagedError(path, "it is not text in UTF-8") from error
    except csv.Error as error:
        raise DamagedError(path, f"it is no CSV ({error})") from error
    if "\0" in text:
        raise DamagedError(path, "it holds NUL bytes")
    if rows and "step" not in (reader.fieldnames or ()):
        raise DamagedError(path, "it has no column named step")
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise DamagedError(path, f"row {number} has not as many values as there are columns")
    return rows


def _check_epochs(run: Run, rows: Iterable[_Row], expected: Iterable[int]) -> None:
    missing = sorted(set(expected) - {row.epoch for row in rows if TRAIN_SECONDS in row.numbers})
    if missing:
        raise DamagedError(run.logs, f"it lacks epoch {', '.join(map(str, missing[:5]))}")


def _count(path: Path, text: str) -> int:
    try:
        return int(float(text))
    except (ValueError, OverflowError):  # of NaN and infinity too
        raise DamagedError(path, f"{text[:40]!r} is no step or epoch") from None


def _number(text: str) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None
