"""A study from beginning to end."""

import math
import shlex
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass

from rich.console import Console

from lightning_znorm.compare.files import read_json, write_json
from lightning_znorm.compare.findings import Findings
from lightning_znorm.compare.gradient_setup import same_settings
from lightning_znorm.compare.live import Progress, watch
from lightning_znorm.compare.locks import InUseError, locked
from lightning_znorm.compare.one_run import Outcome, shell_line
from lightning_znorm.compare.pool import Pool, cores, pool
from lightning_znorm.compare.prepare import Plan, prepare
from lightning_znorm.compare.process import Processes
from lightning_znorm.compare.ray import RayCluster, ray_cluster
from lightning_znorm.compare.report import write_report
from lightning_znorm.compare.report_conditions import near
from lightning_znorm.compare.results import read_run, write_results
from lightning_znorm.compare.study import Study, StudyError
from lightning_znorm.compare.tables import Table


@dataclass(frozen=True)
class Means:
    """What a study runs on.

    Args:
        jobs: Runs side by side on this machine.
        ray: Address of a Ray cluster to run on instead.
        cpus: CPU cores of each run on Ray.
        gpus: GPUs of each run on Ray.
    """

    jobs: int = 1
    ray: str | None = None
    cpus: float = 1
    gpus: float = 0

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise StudyError(f"--jobs is how many runs go on side by side, at least 1: {self.jobs}.")
        for name, number in (("cpus", self.cpus), ("gpus", self.gpus)):
            if not 0 <= number < math.inf:
                raise StudyError(f"--{name} is what each run takes of a Ray cluster, 0 or more: {number:g}.")


def conduct(study: Study, means: Means, console: Console) -> Table:
    """Run what is missing of a study, and report on all of it.

    Raises:
        StudyError: Before the first run, if something is wrong with the study.
    """
    with _claimed(study):
        processes = Processes()
        plan = _prepared(study, means, processes, console)
        outcomes = _run(plan, means, processes, console)
        return _report(plan, means, [outcome for outcome in outcomes if outcome.error])


def commands(study: Study, means: Means, console: Console) -> list[str]:
    """Prepare a study, and return what is left to run: a line for a shell for each run.

    Raises:
        StudyError: If something is wrong with the study.
    """
    with _claimed(study):
        plan = _prepared(study, means, Processes(), console)
        return [shell_line(run, plan.monitored) for run in study.runs if not run.is_done]


@contextmanager
def _claimed(study: Study) -> Iterator[None]:
    if study.output.exists() and not study.output.is_dir():
        raise StudyError(f"{study.output} is a file: choose another --output.")
    try:
        with locked(study.output / ".lock"):
            yield
    except InUseError as error:
        raise StudyError(
            f"{study.output} is in use by another study ({error}): wait for its end, or choose another --output."
        ) from error


def _prepared(study: Study, means: Means, processes: Processes, console: Console) -> Plan:
    console.print("Reading settings, and trying new methods on one batch ...", highlight=False)
    plan = prepare(study, processes, min(cores(), max(means.jobs, 2)))
    for methods in same_settings(plan.settings):
        console.print(f"{' and '.join(methods)} have the same settings.", highlight=False)
    return plan


def _run(plan: Plan, means: Means, processes: Processes, console: Console) -> list[Outcome]:
    left = [run for run in plan.study.runs if not run.is_done]
    if not left:
        return []
    record = read_json(plan.study.output / "study.json")
    record["alone"] = record.get("alone", True) and means.jobs == 1 and means.ray is None
    write_json(plan.study.output / "study.json", record)
    progress = Progress(plan.study.runs, means.jobs, plan.metric)
    engine: AbstractContextManager[Pool | RayCluster] = (
        pool(means.jobs, _devices(plan), plan.monitored, processes)
        if means.ray is None
        else ray_cluster(means.ray, means.cpus, means.gpus, plan.monitored)
    )
    with engine as opened:
        watch({opened.submit(run): run for run in left}, progress, console)
    return list(progress.outcomes.values())


def _devices(plan: Plan) -> int | None:
    """How many GPUs each run asks for; none where one names its own."""
    asked = [settings["trainer"].get("devices", "auto") for settings in plan.settings.values()]
    if any(isinstance(devices, list) or "," in str(devices) for devices in asked):
        return None
    # "auto" and -1 are for all there are: a share of them.
    return max(int(devices) if str(devices).isdecimal() else 1 for devices in asked)


def _report(plan: Plan, means: Means, failures: list[Outcome]) -> Table:
    study = plan.study
    measurements = [m for run in study.runs if run.is_done for m in read_run(run)]
    write_results(study.output / "results.csv", measurements)
    # Commands of a dry run may have gone on anywhere, so that nothing is known of runs that no study has started.
    alone = read_json(study.output / "study.json").get("alone", False)
    findings = Findings(plan, measurements, failures, _typed(study, means), alone)
    write_report(findings, study.output)
    return Table(plan.metric, tuple(findings.rows), tuple(failures), study.output)


def _typed(study: Study, means: Means) -> str:
    words = ["python", "-m", "lightning_znorm", "compare"]
    for config in study.configs:
        words += ["--config", config]
    words += ["--methods", *study.methods, "--seeds", *map(str, study.seeds), "--output", near(study.output)]
    given = {"--metric": study.metric, "--mode": study.mode}
    if means.ray is None:
        given["--jobs"] = str(means.jobs) if means.jobs > 1 else None
    else:
        given |= {"--ray": means.ray, "--cpus": f"{means.cpus:g}", "--gpus": f"{means.gpus:g}"}
    for option, value in given.items():
        words += [option, value] if value else []
    return shlex.join([*words, *study.args])
