"""What the runs logged, as one tidy table: one number a row, joined over the attempts at each run.

Metric names are those of the experiment. Their meaning is read from words in them, such as ``val/loss``.
"""

import csv
import math
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from dataclasses import astuple, dataclass, fields, replace
from io import StringIO
from pathlib import Path
from typing import Any

from lightning_znorm.compare.files import DamagedError, read_object, write_text
from lightning_znorm.compare.study import Run, Study

STUDY_PREFIX = "compare/"
"""Prefix of the names that the study logs, besides the experiment."""
GRADIENT_NORM = f"{STUDY_PREFIX}gradient_norm"
STEP_SECONDS = f"{STUDY_PREFIX}step_seconds"
TRAIN_SECONDS = f"{STUDY_PREFIX}train_seconds"
LOGGED_EPOCHS = "logged_epochs"
"""Key in `fit.json` and in checkpoints: epochs at whose end a run logged `TRAIN_SECONDS`."""

_FIT = {"epochs": int, "seconds": int | float, "parameters": int, "device": str, "threads": int, "versions": dict}
_FIT_OPTIONAL = {  # the first versions did not write these
    "weights": str | None,
    "optimizers": list,
    "schedulers": list,
    "methods": dict,
    "logged": list,
    LOGGED_EPOCHS: list,
    "logged_numbers": int,
}
_STAGE = re.compile(r"^(train|validation|valid|val|test)(?=[/_.-])")
_CHECKPOINT = {"path": str, "epoch": int, "monitor": str | None, "value": int | float | None}


@dataclass(frozen=True)
class Measurement:
    """One number.

    Args:
        run: Name of the run.
        seed: Its seed.
        method: Its method.
        epoch: Epoch, from 0; for a test, the epoch of the checkpoint that was tested.
        metric: Name of the metric.
        value: Mean of the values logged under this name in the epoch; for validation, the last value.
        count: Number of logged values that it is the mean of; 1 for a test and for validation. A value that was logged
            at a step is of one batch; one that was logged for an epoch (``on_epoch``) is a mean over its batches.
    """

    run: str
    seed: int
    method: str
    epoch: int
    metric: str
    value: float
    count: int = 1


@dataclass(frozen=True)
class Evaluation:
    """The test of a run.

    Args:
        metrics: What the test logged.
        path: The checkpoint that was tested.
        epoch: Epoch of that checkpoint, from 0.
        monitor: Metric that chose the checkpoint, if one did.
        value: Value of that metric in that epoch.
    """

    metrics: dict[str, float]
    path: str
    epoch: int
    monitor: str | None
    value: float | None


def read_fit(run: Run) -> dict[str, Any] | None:
    """Read what a run wrote down about its training.

    Returns:
        The content; ``None`` while training has not ended.

    Raises:
        DamagedError: If the file holds something else.
    """
    fit = read_object(run.fit_file, _FIT, _FIT_OPTIONAL)
    for name, classes in (fit or {}).get("methods", {}).items():
        if not isinstance(classes, list):
            raise DamagedError(run.fit_file, f"its methods.{name} is {classes!r}")
    return fit


def read_test(run: Run) -> Evaluation | None:
    """Read the test of a run.

    Returns:
        The test; ``None`` if there is none, or if it does not say what was tested, as versions before 0.1.0 wrote it.

    Raises:
        DamagedError: If the file holds something else.
    """
    content = read_object(run.test_file, {})
    if content is None:
        return None
    checkpoint, metrics = content.get("checkpoint"), content.get("metrics", content)
    if not isinstance(metrics, dict) or not all(isinstance(value, int | float) for value in metrics.values()):
        raise DamagedError(run.test_file, "its metrics are not numbers")
    if checkpoint is None and content:
        return None
    if not isinstance(checkpoint, dict) or not all(isinstance(checkpoint.get(k), t) for k, t in _CHECKPOINT.items()):
        raise DamagedError(run.test_file, "it does not say which checkpoint was tested")
    return Evaluation(metrics, **{key: checkpoint[key] for key in _CHECKPOINT})


def read_progress(run: Run) -> tuple[int, float] | None:
    """Read how many epochs a run has completed, and which share of its training.

    Returns:
        Epochs and share; ``None`` if the run has not begun.

    Raises:
        DamagedError: If the file holds something else.
    """
    content = read_object(run.progress_file, {"epoch": int, "share": int | float})
    return None if content is None else (content["epoch"], content["share"])


def read_run(run: Run) -> list[Measurement]:
    """Read everything that a run logged, by epoch.

    Raises:
        DamagedError: If training has ended and a part of its log is missing, or if a file holds something else.
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
        # The first versions did not count numbers.
        if sum(len(row.numbers) for row in rows) < fit.get("logged_numbers", min(fit["epochs"], 1)):
            raise DamagedError(run.logs, "it lacks numbers that were logged")
    fitted = {
        key: (found[-1], 1) if stage(key[1]) == "val" else (mean(found), len(found))
        for key, found in sorted(values.items())
    }
    if (tested := read_test(run)) is not None:
        fitted |= {(tested.epoch, metric): (value, 1) for metric, value in tested.metrics.items()}
    return [Measurement(run.name, run.seed, run.method, *key, *found) for key, found in fitted.items()]


def curves(measurements: Iterable[Measurement], metric: str) -> dict[str, dict[int, dict[int, float]]]:
    """Return the values of a metric by method, seed and epoch."""
    found: dict[str, dict[int, dict[int, float]]] = {}
    for m in measurements:
        if m.metric == metric:
            found.setdefault(m.method, {}).setdefault(m.seed, {})[m.epoch] = m.value
    return found


def last_counts(measurements: Iterable[Measurement], metric: str) -> dict[str, dict[int, int]]:
    """Return how many logged values the last value of a metric is the mean of, by method and seed."""
    found: dict[str, dict[int, tuple[int, int]]] = {}
    for m in measurements:
        if m.metric == metric:
            by_seed = found.setdefault(m.method, {})
            by_seed[m.seed] = max(by_seed.get(m.seed, (-1, 0)), (m.epoch, m.count))
    return {method: {seed: count for seed, (_, count) in by_seed.items()} for method, by_seed in found.items()}


def check_log(run: Run, epochs: Iterable[int]) -> int:
    """Check that the log of a run, whose training may continue, holds the epochs that the run has completed.

    Args:
        run: The run.
        epochs: The epochs that must be there.

    Returns:
        The last epoch in the log, -1 if the log is empty.

    Raises:
        DamagedError: If an epoch is missing, or if a file holds something else.
    """
    rows = list(_rows(run, has_ended=False))
    _check_epochs(run, rows, epochs)
    return max((row.epoch for row in rows if row.epoch is not None), default=-1)


def count_numbers(run: Run) -> int:
    """Count the numbers that a run logged in its training."""
    return sum(len(row.numbers) for row in _rows(run, has_ended=False))


def logged_names(run: Run) -> set[str]:
    """Return the names that the experiment itself logged in a run."""
    names = {measurement.metric for measurement in read_run(run)}
    return {name for name in names if not name.startswith(STUDY_PREFIX)}


def mean(values: Iterable[float]) -> float:
    """Return the mean; infinite or NaN if the values of a run that diverged make it so.

    Own code, because `statistics.fmean` and NumPy raise or overflow for values that a run that diverged logs.

    Example:
        >>> mean([1.0, 2.0]), mean([math.inf, -math.inf]), mean([1e308, 1e308])
        (1.5, nan, 1e+308)
    """
    values = list(values)
    try:
        return math.fsum(values) / len(values)
    except (OverflowError, ValueError):  # the sum is too large; infinities of both signs
        return sum(value / len(values) for value in values)


def stage(name: str) -> str | None:
    """Return ``"train"``, ``"val"`` or ``"test"`` if the name of a metric begins with it."""
    found = _STAGE.match(name)
    return None if found is None else {"v": "val", "t": found[1]}[found[1][0]]


def at_stage(name: str, stage: str, logged: Collection[str]) -> str | None:
    """Return the metric of the same name at another stage (``"val"``, ``"test"``), if it is logged.

    Example:
        >>> at_stage("val_dice", "test", ["test_dice"])
        'test_dice'
    """
    # The test's metric has a stage added if training and test log the same name.
    other = _STAGE.sub(stage, name) if _STAGE.match(name) else f"{stage}/{name}"
    return other if other in logged else None


def without_stage(name: str) -> str:
    """Return the name of a metric without its stage.

    Example:
        >>> without_stage("val/dice")
        'dice'
    """
    return _STAGE.sub("", name).strip("/_.-")


def is_count(name: str) -> bool:
    """Return whether a metric is a number of masks or patients, which says of how many others are means.

    Example:
        >>> is_count("val/masks_left_out"), is_count("val/dice")
        (True, False)
    """
    return re.match(r"(masks|patients)_(counted|left_out|foreground)\b", without_stage(name)) is not None


def default_mode(name: str) -> str | None:
    """Return ``"min"`` for a loss or an error; ``None`` otherwise."""
    return "min" if re.search(r"loss|error", name.lower()) else None


def train_loss(logged: Collection[str]) -> str | None:
    """Return the training loss among the names, per epoch rather than per step."""
    found = [name for name in sorted(logged) if stage(name) in ("train", None) and "loss" in name.lower()]
    found.sort(key=lambda name: (stage(name) is None, name.endswith("_step"), name))
    return found[0] if found else None


def write_results(path: Path, measurements: Iterable[Measurement], study: Study) -> None:
    """Write a tidy CSV file: one number a row. In a sweep, each swept setting has a column of its own.

    Args:
        path: The file.
        measurements: Everything that was logged.
        study: The study.
    """
    text = StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow([*(field.name for field in fields(Measurement)), *study.swept])
    for measurement in measurements:
        arm = study.arms[measurement.method]
        row = replace(measurement, method=arm.method)
        writer.writerow([*astuple(row), *(value for _, value in arm.point)])
    write_text(path, text.getvalue())


@dataclass(frozen=True)
class _LogRow:
    epoch: int | None
    numbers: dict[str, float]


def _rows(run: Run, has_ended: bool) -> Iterator[_LogRow]:
    """Yield the rows of all attempts at training. Where an attempt repeats steps, its rows replace the earlier ones."""
    attempts = []
    for folder in run.logs.glob("version_*"):
        version = folder.name.rpartition("_")[2]
        attempt = read_object(folder / "attempt.json", {"step": int})
        if (
            attempt is not None and version.isdecimal() and (folder / "metrics.csv").is_file()
        ):  # a test has no attempt.json
            attempts.append((int(version), attempt["step"], folder / "metrics.csv"))
    attempts.sort()
    for i, (_, _, path) in enumerate(attempts):
        end = min((start for _, start, _ in attempts[i + 1 :]), default=math.inf)
        for row in _read_csv(path, is_whole=has_ended and i == len(attempts) - 1):
            if _count(path, row["step"]) < end:
                epoch = _count(path, row["epoch"]) if row.get("epoch") else None
                items = ((metric, _number(text)) for metric, text in row.items() if metric not in ("epoch", "step"))
                yield _LogRow(epoch, {metric: value for metric, value in items if value is not None})


def _read_csv(path: Path, is_whole: bool) -> list[dict[str, str]]:
    """Read the rows of a log.

    Args:
        path: The log.
        is_whole: Whether its process ended normally; else the last line may be cut off.
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
        raise DamagedError(path, f"it is not CSV ({error})") from error
    if "\0" in text:
        raise DamagedError(path, "it holds NUL bytes")
    if rows and "step" not in (reader.fieldnames or ()):
        raise DamagedError(path, "it has no column named step")
    for number, row in enumerate(rows, 1):
        if None in row or None in row.values():
            raise DamagedError(path, f"row {number} does not have as many values as there are columns")
    return rows


def _check_epochs(run: Run, rows: Iterable[_LogRow], expected: Iterable[int]) -> None:
    missing = sorted(set(expected) - {row.epoch for row in rows if TRAIN_SECONDS in row.numbers})
    if missing:
        raise DamagedError(run.logs, f"it lacks epoch {', '.join(map(str, missing[:5]))}")


def _count(path: Path, text: str) -> int:
    try:
        return int(float(text))
    except (ValueError, OverflowError):  # also for NaN and infinity
        raise DamagedError(path, f"{text[:40]!r} is not a step or an epoch") from None


def _number(text: str) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None
