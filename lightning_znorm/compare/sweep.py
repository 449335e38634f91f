"""Tuned against tuned: the validation metric chooses each method's values, and only those are compared."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from lightning_znorm.compare.plan import tuning_metric
from lightning_znorm.compare.plots import read_numbers
from lightning_znorm.compare.results import Measurement, curves, mean, read_fit, read_test
from lightning_znorm.compare.study import Plan, Point, Study, short_key


@dataclass(frozen=True)
class Trial:
    """A method at one point of a sweep.

    Args:
        method: Name of the method.
        point: The values of the swept settings.
        validation: For each seed that is done, the validation metric in the epoch of the tested checkpoint.
        values: For each of these seeds, the metric that decides.
        chosen: Whether the method is compared at this point.
    """

    method: str
    point: Point
    validation: dict[int, float]
    values: dict[int, float]
    chosen: bool = False

    @property
    def score(self) -> float:
        """Mean of the validation metric over seeds; NaN if no seed is done."""
        return mean(self.validation.values()) if self.validation else math.nan


@dataclass(frozen=True)
class Sweep:
    """The result of a sweep.

    Args:
        metric: The validation metric that chooses.
        mode: Whether ``"max"`` or ``"min"`` of it is better.
        trials: Every method at every point, in the order of the study.
        warnings: A sentence for each method whose values are not settled: the best one is the least or the greatest
            that was tried, or runs of it are missing.
        unsettled: Why methods are not compared yet, as the end of a sentence; empty if they are.
        done: Number of runs that are done.
        total: Number of runs.
        seconds: Time of all trainings.
    """

    metric: str
    mode: str
    trials: list[Trial]
    warnings: list[str]
    unsettled: str
    done: int
    total: int
    seconds: float

    @property
    def chosen(self) -> dict[str, Point]:
        """The point of each method."""
        return {trial.method: trial.point for trial in self.trials if trial.chosen}


def tune(plan: Plan, measurements: Sequence[Measurement]) -> Sweep:
    """Choose each method's point: that of the best validation metric, as a mean over seeds.

    The metric is that of the epoch whose checkpoint is tested. Of points with fewer finished seeds than others, because
    runs failed, none is chosen. Neither is one with a value that is not finite, unless there is no other.

    Args:
        plan: A study with a sweep.
        measurements: Everything that was logged by the runs that are done.
    """
    metric, mode = tuning_metric(plan.metric, plan.mode, plan.monitor, plan.logged)
    trials = _read_trials(plan, measurements, metric)
    chosen: dict[str, Trial] = {}
    for method in dict.fromkeys(trial.method for trial in trials):
        chosen[method] = best_trial([trial for trial in trials if trial.method == method], mode)
    trials = [replace(trial, chosen=chosen.get(trial.method) is trial) for trial in trials]
    done = sum(len(trial.validation) for trial in trials)
    edges = _at_edges(plan.study, trials)
    warnings = [*edges, *_incomplete(plan.study, trials)]
    reasons = {
        "a best value is the least or the greatest that was tried": bool(edges),
        "not all seeds are done at all values": any(0 < len(t.validation) < len(plan.study.seeds) for t in trials),
        "no value has a finite validation metric": any(t.chosen and not math.isfinite(t.score) for t in trials),
    }
    unsettled = next((reason for reason, holds in reasons.items() if holds), "")
    read = {(m.method, m.seed) for m in measurements}  # without runs whose files are damaged
    fits = (read_fit(run) for run in plan.study.runs if (run.method, run.seed) in read)
    seconds = sum(fit["seconds"] for fit in fits if fit is not None)
    return Sweep(metric, mode, trials, warnings, unsettled, done, len(plan.study.runs), seconds)


def tuned(plan: Plan, measurements: Sequence[Measurement], sweep: Sweep) -> tuple[Plan, list[Measurement]]:
    """Return the part of a study in which each method runs at its chosen point, under the method's name.

    Args:
        plan: The study.
        measurements: Everything that was logged by the runs that are done.
        sweep: Its result.
    """
    study = plan.study
    names = {name: arm.method for name, arm in study.arms.items() if sweep.chosen.get(arm.method) == arm.point}
    settings = {method: plan.settings[name] for name, method in names.items()}
    found = [replace(m, method=names[m.method]) for m in measurements if m.method in names]
    return replace(plan, study=study.at(sweep.chosen), settings=settings, unsettled=sweep.unsettled), found


def best_trial(trials: Sequence[Trial], mode: str) -> Trial:
    """Return the trial with the best mean over seeds, among those with the most finished seeds and finite values.

    Args:
        trials: Trials of one method.
        mode: Whether ``"max"`` or ``"min"`` of the metric is better.
    """
    most = max(len(trial.validation) for trial in trials)
    complete = [trial for trial in trials if len(trial.validation) == most]
    finite = [trial for trial in complete if math.isfinite(trial.score)]
    pick = max if mode == "max" else min
    return pick(finite, key=lambda trial: trial.score) if finite else complete[0]


def _read_trials(plan: Plan, measurements: Sequence[Measurement], metric: str) -> list[Trial]:
    validation, deciding = curves(measurements, metric), curves(measurements, plan.metric)
    epochs = {}
    for run in plan.study.runs:
        if run.is_done and run.seed in deciding.get(run.method, {}) and (tested := read_test(run)) is not None:
            epochs[run.method, run.seed] = tested.epoch
    trials = []
    for name, arm in plan.study.arms.items():
        scores, values = {}, {}
        for seed in plan.study.seeds:
            if (name, seed) in epochs:
                # A study may validate less often than each epoch.
                curve = validation.get(name, {}).get(seed, {})
                epoch = max((epoch for epoch in curve if epoch <= epochs[name, seed]), default=None)
                scores[seed] = math.nan if epoch is None else curve[epoch]
                curve = deciding[name][seed]
                values[seed] = curve[max(curve)]
        trials.append(Trial(arm.method, arm.point, scores, values))
    return trials


def _at_edges(study: Study, trials: Sequence[Trial]) -> list[str]:
    found = []
    for trial in trials:
        if not trial.chosen or not math.isfinite(trial.score):
            continue
        for key, value in trial.point:
            if edge := _edge(key, value, study):
                beyond = "smaller" if edge == "least" else "greater"
                found.append(
                    f"{trial.method}: its best {short_key(key, study.swept)}, {value}, is the {edge} that was tried. "
                    f"There may be a better one beyond it: add {beyond} values."
                )
    return found


def _incomplete(study: Study, trials: Sequence[Trial]) -> list[str]:
    found = []
    for method in dict.fromkeys(trial.method for trial in trials):
        of_method = [trial for trial in trials if trial.method == method]
        if missing := [trial for trial in of_method if len(trial.validation) < len(study.seeds)]:
            points = "; ".join(study.label(trial.point) for trial in missing)
            found.append(f"{method}: not all seeds are done at {points}.")
        if diverged := [trial for trial in of_method if trial.validation and not math.isfinite(trial.score)]:
            points = "; ".join(study.label(trial.point) for trial in diverged)
            found.append(f"{method}: the validation metric is not finite at {points}.")
        if any(trial.chosen and not math.isfinite(trial.score) for trial in of_method):
            found.append(f"{method}: no value has a finite validation metric, so the first one is shown.")
    return found


def _edge(key: str, value: str, study: Study) -> str:
    """Return whether a value is the ``"least"`` or the ``"greatest"`` of those that a numeric setting was given.

    Zero is not an edge: few settings go below it.
    """
    values = read_numbers(dict(study.sweep)[key])
    if values is None or len(values) < 2 or not float(value):
        return ""
    return {min(values): "least", max(values): "greatest"}.get(float(value), "")
