"""A study from beginning to end."""

import math
import shlex
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from lightning_znorm.compare.files import DamagedError, named, said, write_json
from lightning_znorm.compare.findings import Findings
from lightning_znorm.compare.gradient_setup import same_settings
from lightning_znorm.compare.live import Progress, watch
from lightning_znorm.compare.locks import InUseError, locked
from lightning_znorm.compare.one_run import Outcome, mend_unused, shell_line
from lightning_znorm.compare.pool import Pool, cores, pool
from lightning_znorm.compare.prepare import Plan, prepare, read_record
from lightning_znorm.compare.process import Processes, interruptible
from lightning_znorm.compare.ray import RayCluster, ray_cluster
from lightning_znorm.compare.report import write_report
from lightning_znorm.compare.report_conditions import near
from lightning_znorm.compare.results import Measurement, read_run, write_results
from lightning_znorm.compare.study import Study, StudyError
from lightning_znorm.compare.tables import Table, make_rows


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


def conduct(study: Study, means: Means, console: Console) -> tuple[Table, list[str]]:
    """Run what is missing of a study, and report on all of it.

    Returns:
        The table, and a sentence on each part of the report that could not be written.

    Raises:
        StudyError: Before the first run, if something is wrong with the study.
    """
    with interruptible(), _claimed(study):
        processes = Processes(study.timeout)
        plan = _prepared(study, means, processes, console)
        outcomes = _run(plan, means, processes, console)
        for outcome in outcomes:
            _say(console, (f"{outcome.run.name}: {note}" for note in outcome.notes))
        return _report(plan, means, [outcome for outcome in outcomes if outcome.error], console)


def commands(study: Study, means: Means, console: Console) -> list[str]:
    """Prepare a study, and return what is left to run: a line for a shell for each run.

    Raises:
        StudyError: If something is wrong with the study.
    """
    with interruptible(), _claimed(study):
        plan = _prepared(study, means, Processes(study.timeout), console)
        left = [run for run in study.runs if not run.is_done]
        with _refused():
            for run in left:
                notes = mend_unused(run, plan.monitored, goes_on=True)
                _say(console, (f"{run.name}: {note}" for note in notes))
        return [shell_line(run, plan.monitored) for run in left]


@contextmanager
def _claimed(study: Study) -> Iterator[None]:
    with ExitStack() as claim:
        with _refused():
            if study.output.exists() and not study.output.is_dir():
                raise StudyError(f"{study.output} is a file: choose another --output.")
            try:
                claim.enter_context(locked(study.output / ".lock"))
            except InUseError as error:
                raise StudyError(
                    f"{study.output} is in use by another study ({error}): wait for its end, or choose another "
                    "--output."
                ) from error
        yield


@contextmanager
def _refused() -> Iterator[None]:
    """Refuse a study where the system keeps a file of it from being read or written."""
    try:
        yield
    except OSError as error:
        raise StudyError(f"{said(error)}.") from error


def _prepared(study: Study, means: Means, processes: Processes, console: Console) -> Plan:
    _say(console, ["Reading settings, and trying new methods on one batch ..."])
    with _refused():
        plan = prepare(study, processes, min(cores(), max(means.jobs, 2)))
    _say(console, plan.notes)
    _say(console, (f"{' and '.join(methods)} have the same settings." for methods in same_settings(plan.settings)))
    return plan


def _say(console: Console, sentences: Iterable[str]) -> None:
    for sentence in sentences:
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)


def _run(plan: Plan, means: Means, processes: Processes, console: Console) -> list[Outcome]:
    left = [run for run in plan.study.runs if not run.is_done]
    if not left:
        return []
    with _refused():
        record = read_record(plan.study.output) or {}
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


def _report(plan: Plan, means: Means, failures: list[Outcome], console: Console) -> tuple[Table, list[str]]:
    """Write all files of the report that can be written; return the table, and why the others are not there."""
    study = plan.study
    measurements: list[Measurement] = []
    for run in study.runs:
        if run.is_done:
            try:
                measurements += read_run(run)
            except (DamagedError, OSError) as error:
                failures.append(Outcome(run, _why(error, run.folder)))
                with suppress(OSError):  # else the next command sees to it
                    _say(console, mend_unused(run, plan.monitored, goes_on=False))
    table = Table(plan.metric, tuple(make_rows(plan, measurements)), tuple(failures), study.output)
    problems = []

    def attempt(write: Callable[[], None]) -> None:
        try:
            write()
        except (DamagedError, OSError) as error:
            problems.append(_why(error, study.output))
        except Exception:  # a bug, with which what was found is not to be lost
            _say(console, [str(table)])
            raise

    def write_rest() -> None:
        # Commands of a dry run may have gone on anywhere, so nothing is known of runs that no study has started.
        alone = (read_record(study.output) or {}).get("alone", False)
        write_report(Findings(plan, measurements, failures, _typed(study, means), alone), study.output)

    if study.output.is_dir():
        attempt(lambda: write_results(study.output / "results.csv", measurements))
        attempt(write_rest)
    else:
        problems.append(f"{study.output} was deleted while the study ran.")
    return table, problems


def _why(error: DamagedError | OSError, path: Path) -> str:
    return f"{said(named(error, path))}." if isinstance(error, OSError) else str(error)


def _typed(study: Study, means: Means) -> str:
    words = ["python", "-m", "lightning_znorm", "compare"]
    for config in study.configs:
        words += ["--config", config]
    words += ["--methods", *study.methods, "--seeds", *map(str, study.seeds), "--output", near(study.output)]
    timeout = None if study.timeout is None else f"{study.timeout:.15g}"
    given = {"--metric": study.metric, "--mode": study.mode, "--timeout": timeout}
    if means.ray is None:
        given["--jobs"] = str(means.jobs) if means.jobs > 1 else None
    else:
        given |= {"--ray": means.ray, "--cpus": f"{means.cpus:g}", "--gpus": f"{means.gpus:g}"}
    for option, value in given.items():
        words += [option, value] if value else []
    return shlex.join([*words, *study.args])
