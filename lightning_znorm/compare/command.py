"""The command line of a study, and its way through the rooms: ``python -m lightning_znorm compare``."""

import argparse
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from lightning_znorm.compare.cores import cores, thread_variables
from lightning_znorm.compare.engines import Resources, notes_on_sharing, open_engine
from lightning_znorm.compare.files import DamagedError, InUseError, locked, reason_of, with_path, write_json
from lightning_znorm.compare.formatting import relative_path
from lightning_znorm.compare.plan import make_plan, read_record, write_first_look
from lightning_znorm.compare.processes import Processes, interruptible
from lightning_znorm.compare.progress import Preparation, Progress, watch
from lightning_znorm.compare.report import build_report, write_report
from lightning_znorm.compare.results import Measurement, read_run, write_results
from lightning_znorm.compare.runner import repair_if_idle, shell_line
from lightning_znorm.compare.settings import note_on_order, same_settings
from lightning_znorm.compare.statistics import Table, look_at, make_rows
from lightning_znorm.compare.study import Outcome, Plan, Study, StudyError, parse_timeout
from lightning_znorm.compare.sweep import tune, tuned

_DESCRIPTION = """\
Does a method help? Runs every method with every seed, each in its own process: fit, then test of the best checkpoint.
Writes DIR/report.html, report.md and results.csv. After an interruption, the same command runs what is missing.
Methods may be added; with more seeds, the report is exploratory. All other options are those of `fit`.

  {program} compare --config configs/digits/resnet20.yaml \\
      --methods configs/methods/baseline.yaml configs/methods/znorm.yaml --seeds 0 1 2 --output studies/digits

To compare each method at its own best learning rate, add
  --sweep model.init_args.optimizer.init_args.lr 0.0001 0.001 0.01
"""


def main(args: Sequence[str], program: str = "python -m lightning_znorm") -> int:
    """Run a study.

    Args:
        args: The arguments behind ``compare``.
        program: What the user types in front of ``compare``.

    Returns:
        The exit code: 1 if a run failed, or a part of the report could not be written; 130 after an interruption.

    Raises:
        SystemExit: With one sentence on stderr, before the first run, if something is wrong with the study.
    """
    try:
        return _main(args, program)
    except StudyError as error:
        sys.exit(f"error: {error}")


def run_study(study: Study, resources: Resources, console: Console) -> tuple[Table, list[str]]:
    """Run what is missing of a study, and report on all of it.

    Args:
        study: The study.
        resources: What it runs on.
        console: Where progress is shown.

    Returns:
        The table, and a sentence on each part of the report that could not be written.

    Raises:
        StudyError: Before the first run, if something is wrong with the study.
    """
    processes = Processes(study.timeout)
    with interruptible(), _folder_lock(study), processes.forking(thread_variables(resources.jobs)):
        plan = _make_plan(study, resources, processes, console)
        outcomes = _execute(plan, resources, processes, console)
        for outcome in outcomes:
            _say(console, (f"{outcome.run.name}: {note}" for note in outcome.notes))
        return _report(plan, resources, [outcome for outcome in outcomes if outcome.error], console)


def remaining_commands(study: Study, resources: Resources, console: Console) -> list[str]:
    """Validate a study, and return the remaining runs: a line for a shell for each.

    Args:
        study: The study.
        resources: What it would run on.
        console: Where notes are shown.

    Raises:
        StudyError: If something is wrong with the study.
    """
    processes = Processes(study.timeout)
    with interruptible(), _folder_lock(study), processes.forking(thread_variables(resources.jobs)):
        plan = _make_plan(study, resources, processes, console)
        remaining = [run for run in study.runs if not run.is_done]
        with _os_errors_refuse():
            for run in remaining:
                notes = repair_if_idle(run, plan.monitored, resumes=True)
                _say(console, (f"{run.name}: {note}" for note in notes))
        return [shell_line(run, plan.monitored) for run in remaining]


def command_line(study: Study, resources: Resources) -> str:
    """Return the command that runs a study."""
    words = ["python", "-m", "lightning_znorm", "compare"]
    for config in study.configs:
        words += ["--config", config]
    for key, values in study.sweep:
        words += ["--sweep", key, *values]
    words += ["--methods", *study.methods, "--seeds", *map(str, study.seeds), "--output", relative_path(study.output)]
    timeout = None if study.timeout is None else f"{study.timeout:.15g}"
    given = {"--metric": study.metric, "--mode": study.mode, "--timeout": timeout}
    if resources.ray is None:
        given["--jobs"] = str(resources.jobs) if resources.jobs > 1 else None
    else:
        given |= {"--ray": resources.ray, "--cpus": f"{resources.cpus:g}", "--gpus": f"{resources.gpus:g}"}
    for option, value in given.items():
        words += [option, value] if value else []
    return shlex.join([*words, *study.args])


def _main(args: Sequence[str], program: str) -> int:
    options, fit_options = make_parser(program).parse_known_args(args)
    study = Study(
        tuple(options.config),
        tuple(options.methods),
        tuple(options.seeds),
        Path(options.output).absolute(),
        options.metric,
        options.mode,
        tuple(fit_options),
        parse_timeout(options.timeout),
        tuple((key, tuple(values)) for key, *values in options.sweep),
    )
    resources = Resources(options.jobs, options.ray, options.cpus, options.gpus)
    try:
        if options.dry_run:
            print("\n".join(remaining_commands(study, resources, Console(stderr=True))))
            return 0
        table, problems = run_study(study, resources, Console())
    except KeyboardInterrupt:
        with suppress(OSError):  # the terminal may be gone
            print("Interrupted. The same command goes on from here.", file=sys.stderr)
        return 130
    for outcome in table.failures:
        print(f"\n{outcome.run.name} failed: {outcome.error}", file=sys.stderr)
    print(f"\n{table}\n")
    for problem in problems:
        print(f"error: the report is not complete. {problem}", file=sys.stderr)
    if not problems:
        print(f"report           {table.output / 'report.html'}")
    return 1 if table.failures or problems else 0


def make_parser(program: str) -> argparse.ArgumentParser:
    """Return the parser of the command's own flags. All other flags are those of ``fit``.

    Args:
        program: What the user types in front of ``compare``.
    """
    parser = argparse.ArgumentParser(
        f"{program} compare",
        usage=f"{program} compare --config FILE ... --methods FILE ... --output DIR [--KEY VALUE ...]",
        description=_DESCRIPTION.format(program=program),
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("-c", "--config", action="append", default=[], metavar="FILE", help="the experiment")
    add(
        "--methods",
        nargs="+",
        required=True,
        metavar="FILE",
        help="method files; the others are compared with the first",
    )
    add(
        "--seeds",
        nargs="+",
        type=int,
        default=[0, 1, 2],
        metavar="N",
        help="seeds, each for every method (default: 0 1 2)",
    )
    add(
        "--sweep",
        action="append",
        nargs="+",
        default=[],
        metavar=("KEY", "VALUE"),
        help="a setting and the values to try with every method and seed; may be repeated, for a grid. The validation "
        "metric, mean over seeds, chooses each method's values, and the methods are compared at those",
    )
    add("--output", required=True, metavar="DIR", help="folder of the study")
    add(
        "--metric",
        metavar="NAME",
        help="metric that decides (default: the test metric of the experiment's ModelCheckpoint)",
    )
    add("--mode", choices=("min", "max"), help="whether less or more of it is better")
    add(
        "--jobs",
        type=int,
        default=1,
        metavar="N",
        help="number of runs side by side; if there are several GPUs, each run has its own (default: 1)",
    )
    add(
        "--timeout",
        metavar="TIME",
        help="longest time of one `fit` or `test`, such as 90 (seconds), 30m, 2h or 1d: a run that takes longer is "
        "ended and counts as failed, and the same command resumes it from its last checkpoint (default: none)",
    )
    add("--dry-run", action="store_true", help="try every method on one batch, and print a command for each run")
    add(
        "--ray",
        nargs="?",
        const="auto",
        metavar="ADDRESS",
        help="run on a Ray cluster; without ADDRESS, on the one that this machine belongs to",
    )
    add("--cpus", type=float, default=1, metavar="N", help="CPU cores of each run on Ray (default: 1)")
    add("--gpus", type=float, default=0, metavar="N", help="GPUs of each run on Ray, or a fraction (default: 0)")
    return parser


@contextmanager
def _folder_lock(study: Study) -> Iterator[None]:
    with ExitStack() as stack:
        with _os_errors_refuse():
            if study.output.exists() and not study.output.is_dir():
                raise StudyError(f"{study.output} is a file: choose another --output.")
            try:
                stack.enter_context(locked(study.output / ".lock"))
            except InUseError as error:
                raise StudyError(
                    f"{study.output} is in use by another study ({error}): wait until it ends, or choose another "
                    "--output."
                ) from error
        yield


@contextmanager
def _os_errors_refuse() -> Iterator[None]:
    """Refuse the study if the system refuses to read or write one of its files."""
    try:
        yield
    except OSError as error:
        raise StudyError(f"{reason_of(error)}.") from error


def _make_plan(study: Study, resources: Resources, processes: Processes, console: Console) -> Plan:
    _say(console, ["Reading settings, and trying new methods on one batch ..."])
    with Preparation(console, len(study.files)) as preparation, _os_errors_refuse():
        plan = make_plan(study, processes, min(cores(), max(resources.jobs, 2)), preparation.tell)
    _say(console, [*note_on_order(study.configs), *plan.notes])
    _say(console, notes_on_sharing(plan, resources))
    _say(console, (f"{' and '.join(methods)} have the same settings." for methods in same_settings(plan.settings)))
    return plan


def _say(console: Console, sentences: Iterable[str]) -> None:
    for sentence in sentences:
        console.print(sentence, highlight=False, markup=False, soft_wrap=True)


def _execute(plan: Plan, resources: Resources, processes: Processes, console: Console) -> list[Outcome]:
    remaining = [run for run in plan.study.runs if not run.is_done]
    if not remaining:
        return []
    with _os_errors_refuse():
        record = read_record(plan.study.output) or {}
        record["alone"] = record.get("alone", True) and resources.jobs == 1 and resources.ray is None
        write_json(plan.study.output / "study.json", record)
    progress = Progress(plan.study.runs, resources.jobs, plan.metric)
    with open_engine(plan, resources, processes) as engine:
        watch({engine.submit(run): run for run in remaining}, progress, console)
    return list(progress.outcomes.values())


def _report(plan: Plan, resources: Resources, failures: list[Outcome], console: Console) -> tuple[Table, list[str]]:
    """Write all parts of the report that can be written; return the table, and why the other parts are missing."""
    study = plan.study
    measurements: list[Measurement] = []
    for run in study.runs:
        if run.is_done:
            try:
                measurements += read_run(run)
            except (DamagedError, OSError) as error:
                failures.append(Outcome(run, _sentence(error, run.folder)))
                with suppress(OSError):  # the next command repairs it otherwise
                    _say(console, repair_if_idle(run, plan.monitored, resumes=False))
    sweep, compared, shown = None, plan, measurements
    if study.sweep:
        sweep = tune(plan, measurements)
        compared, shown = tuned(plan, measurements, sweep)
    chosen = {method: dict(point) for method, point in sweep.chosen.items()} if sweep else {}
    table = Table(plan.metric, tuple(make_rows(compared, shown)), tuple(failures), study.output, chosen)
    problems = []

    def attempt(write: Callable[[], None]) -> None:
        try:
            write()
        except (DamagedError, OSError) as error:
            problems.append(_sentence(error, study.output))
        except Exception:  # a bug, which must not hide what was measured
            _say(console, [str(table)])
            raise

    def write_all() -> None:
        # Commands of a dry run may have run side by side, so nothing is known about runs that no study started.
        alone = (read_record(study.output) or {}).get("alone", False)
        command = command_line(study, resources)
        write_report(build_report(compared, shown, table, command, alone, sweep), study.output)

    look = look_at(compared, table.rows)
    if study.output.is_dir():
        if look is not None and look != plan.first_look:
            attempt(lambda: write_first_look(study.output, look))
            if problems:  # otherwise the next command would take its look for the first one
                compared = replace(compared, unsettled="this first look could not be written down")
                table = replace(table, rows=tuple(make_rows(compared, shown)))
        attempt(lambda: write_results(study.output / "results.csv", measurements, study))
        attempt(write_all)
    else:
        problems.append(f"{study.output} was deleted while the study ran.")
    return table, problems


def _sentence(error: DamagedError | OSError, path: Path) -> str:
    return f"{reason_of(with_path(error, path))}." if isinstance(error, OSError) else str(error)
