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
        epoch: Epoch, from 0; that of the best checkpoint for a test.
        metric: Name under which it was logged.
        value: Mean over what was logged under this name in the epoch; of validations, the last.
    """

    run: str
    seed: int
    method: str
    epoch: int
    metric: str
    value: float


def read_run(run: Run, monitor: tuple[str, str] | None) -> list[Measurement]:
    """All that a run has logged, by epoch.

    Args:
        run: The run.
        monitor: Metric that chooses the best checkpoint, and its mode.
    """
    values: dict[tuple[int, str], list[float]] = defaultdict(list)
    for row in _rows(run):
        if epoch := row.get("epoch"):
            for metric, text in row.items():
                if metric not in ("epoch", "step") and (value := _number(text)) is not None:
                    values[int(float(epoch)), metric].append(value)
    fitted = {key: found[-1] if stage(key[1]) == "val" else fmean(found) for key, found in sorted(values.items())}
    tested = read_json(run.test_file) or {}
    best = _tested_epoch(fitted, monitor)
    fitted |= {(best, metric): value for metric, value in tested.items()}
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
    names = {measurement.metric for measurement in read_run(run, None)}
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


def _tested_epoch(fitted: dict[tuple[int, str], float], monitor: tuple[str, str] | None) -> int:
    last = max((epoch for epoch, _ in fitted), default=0)
    if monitor is None:
        return last
    sign = 1 if monitor[1] == "min" else -1
    scores = [(sign * value, epoch) for (epoch, metric), value in fitted.items() if metric == monitor[0]]
    scores = [score for score in scores if not math.isnan(score[0])]
    return min(scores, default=(0.0, last))[1]
