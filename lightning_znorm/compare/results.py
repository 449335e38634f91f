"""What runs have logged, joined over the attempts at each."""

import csv
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import astuple, dataclass, fields
from io import StringIO
from pathlib import Path
from statistics import fmean

from lightning_znorm.compare.files import read_json, write_text
from lightning_znorm.compare.metrics import stage
from lightning_znorm.compare.study import Run

OWN = "compare/"
"""Begins the names of what is logged by the study and not by the experiment."""
GRADIENT_NORM = f"{OWN}gradient_norm"
STEP_SECONDS = f"{OWN}step_seconds"
TRAIN_SECONDS = f"{OWN}train_seconds"


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


def read_test(run: Run) -> Evaluation | None:
    """The test of a run; None where there is none, or none that says what was tested, as version 0.1.0 left them."""
    content = read_json(run.test_file)
    if not content or not isinstance(content.get("checkpoint"), dict):
        return None
    return Evaluation(content["metrics"], **content["checkpoint"])


def read_run(run: Run) -> list[Measurement]:
    """All that a run has logged, by epoch."""
    values: dict[tuple[int, str], list[float]] = defaultdict(list)
    for row in _rows(run):
        if epoch := row.get("epoch"):
            for metric, text in row.items():
                if metric not in ("epoch", "step") and (value := _number(text)) is not None:
                    values[int(float(epoch)), metric].append(value)
    fitted = {key: found[-1] if stage(key[1]) == "val" else fmean(found) for key, found in sorted(values.items())}
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


def _rows(run: Run) -> Iterator[dict[str, str]]:
    """Rows of all attempts at training; of what was done again after an interruption, the latter."""
    attempts = []
    for folder in run.logs.glob("version_*"):
        attempt = read_json(folder / "attempt.json")
        if attempt is not None and (folder / "metrics.csv").is_file():  # there is none for a test
            attempts.append((int(folder.name.rpartition("_")[2]), attempt["step"], folder / "metrics.csv"))
    attempts.sort()
    for i, (_, _, path) in enumerate(attempts):
        end = min((start for _, start, _ in attempts[i + 1 :]), default=math.inf)
        text = path.read_text(encoding="utf-8")
        whole = text[: text.rfind("\n") + 1]  # where the process died while it wrote, there is half a line
        for row in csv.DictReader(StringIO(whole)):
            if float(row["step"]) < end:
                yield row


def _number(text: str | None) -> float | None:
    try:
        return float(text) if text else None
    except ValueError:
        return None
