"""Everything that can go wrong is found before the first run, and the settings of all runs are written down."""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightning_znorm.compare.files import read_json, write_json, write_text
from lightning_znorm.compare.gradient_setup import check_experiment, check_tried
from lightning_znorm.compare.metrics import at_stage, choose, stage
from lightning_znorm.compare.one_run import command_to_fit, command_to_test
from lightning_znorm.compare.process import Processes, tail
from lightning_znorm.compare.results import logged_names, read_test
from lightning_znorm.compare.run_config import kept_callbacks, probe_config, run_config, validates
from lightning_znorm.compare.settings import differences, monitored
from lightning_znorm.compare.study import Run, Study, StudyError


@dataclass(frozen=True)
class Plan:
    """A study that is ready to run.

    Args:
        study: The study.
        settings: Resulting settings of each method.
        monitor: Metric that chooses the best checkpoint, and its mode.
        metric: Metric by which methods are compared.
        mode: Whether ``"max"`` or ``"min"`` of it is better.
        logged: Names of all that the experiment logs.
    """

    study: Study
    settings: dict[str, dict[str, Any]]
    monitor: tuple[str, str] | None
    metric: str
    mode: str
    logged: list[str]

    @property
    def monitored(self) -> bool:
        """Whether each run has a best checkpoint, which is tested; else its last one is."""
        return self.monitor is not None


def digest(settings: dict[str, Any]) -> str:
    """Name settings by their content."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode()).hexdigest()[:12]


def prepare(study: Study, processes: Processes, jobs: int) -> Plan:
    """See that a study can run, and write the settings of its runs into its folder, which must be locked.

    Args:
        study: The study.
        processes: Starts processes.
        jobs: How many at a time.

    Raises:
        StudyError: If a file is missing or wrong, if the folder holds something else or a study with other settings, if
            a method does not get through a batch of training, or has a gradient method that its file does not name, or
            if nothing logs the metric.
    """
    record = _record(study.output)
    resolved = processes.map(lambda name: _resolve(study, name, processes), study.files, jobs)
    settings = dict(zip(study.files, resolved, strict=True))
    _refuse_changes(study, record, settings)
    check_experiment(study, settings)
    monitor = monitored(next(iter(settings.values())))
    known = record.get("logged", [])
    missing = {name: settings[name] for name in settings if name not in record.get("methods", {})}
    if missing:
        known = sorted({*known, *_probe(study, missing, monitor, processes, jobs)})
    metric, mode = choose(study.metric, study.mode, monitor, known)
    if monitor is None and stage(metric) == "test" and all(map(validates, settings.values())):
        name = at_stage(metric, "val", known)
        monitor = (name, mode) if name else None
    chosen = list(monitor) if monitor else None
    if record.get("monitor", chosen) != chosen:
        raise StudyError(
            f"{study.output} holds runs whose best checkpoint was chosen by {record['monitor']}, and now it would be "
            f"{chosen}: choose another --output."
        )
    _refuse_other_tests(study, monitored_by=monitor)
    methods = record.get("methods", {}) | {
        name: {"hash": digest(found), "settings": found} for name, found in settings.items()
    }
    write_json(study.output / "study.json", {**record, "monitor": chosen, "logged": known, "methods": methods})
    for run in study.runs:
        if not run.is_done:
            config = run_config(settings[run.method], run, monitor)
            write_text(run.config, f"# {run.method}, seed {run.seed}\n{yaml.safe_dump(config, sort_keys=False)}")
    return Plan(study, settings, monitor, metric, mode, known)


def _record(output: Path) -> dict[str, Any]:
    """What an earlier command wrote down about the study."""
    record: dict[str, Any] | None = read_json(output / "study.json")
    if record is not None:
        return record
    if any(path.name not in (".lock", ".probe") for path in output.iterdir()):
        raise StudyError(f"{output} is not empty, and holds no study: choose another --output.")
    return {}


def _resolve(study: Study, name: str, processes: Processes) -> dict[str, Any]:
    code, out, errors = processes.capture([*study.fit_args(name), "--print_config"])
    if code:
        raise StudyError(f"`fit` refuses the settings of {name}. {_reason(errors)}")
    settings: dict[str, Any] = yaml.safe_load(out)
    if settings["trainer"].get("fast_dev_run"):
        raise StudyError("trainer.fast_dev_run keeps no logs and no checkpoints: leave it out of a study.")
    settings.pop("seed_everything", None)
    return settings


def _refuse_changes(study: Study, record: dict[str, Any], settings: dict[str, dict[str, Any]]) -> None:
    for name, new in settings.items():
        if name in record.get("methods", {}):
            changed = differences(_trained(record["methods"][name]["settings"]), _trained(new))
            if changed:
                shown = "; ".join(f"{key} was {old} and is {now}" for key, old, now in changed[:5])
                more = f"; and {len(changed) - 5} more" if len(changed) > 5 else ""
                raise StudyError(
                    f"{study.output} holds runs of {name} with other settings ({shown}{more}): choose another "
                    "--output, or restore them."
                )


def _trained(settings: dict[str, Any]) -> dict[str, Any]:
    """Settings without the callbacks that make way for the study's own."""
    return {**settings, "trainer": {**settings["trainer"], "callbacks": kept_callbacks(settings)}}


def _refuse_other_tests(study: Study, monitored_by: tuple[str, str] | None) -> None:
    """Refuse to report tests of other checkpoints than all runs are to be tested at."""
    wrong = []
    for run in study.runs:
        if run.is_done:
            tested, planned = read_test(run), run.tested(monitored_by is not None).name
            if tested is None:
                wrong.append(f"{run.name} by a version that tested last checkpoints and called them best")
            elif Path(tested.path).name != planned:
                wrong.append(f"{run.name} at {tested.path}")
    if wrong:
        raise StudyError(
            f"{study.output} holds tests of other checkpoints than each run's {planned}: {', '.join(wrong)}. Delete "
            "the test.json of these runs, and the same command tests them anew."
        )


def _probe(
    study: Study, settings: dict[str, Any], monitor: tuple[str, str] | None, processes: Processes, jobs: int
) -> set[str]:
    """Train each method for one batch, test the first; return the names of what was logged."""
    folder = study.output / ".probe"
    shutil.rmtree(folder, ignore_errors=True)
    runs = [Run(name, study.seeds[0], folder / name) for name in settings]

    def try_out(run: Run, command: list[str]) -> None:
        if processes.run(command, run.log):
            raise StudyError(
                f"{study.files[run.method]}: a first try at one batch failed in {command[0]}. {_reason(tail(run.log))}"
            )

    def probe(run: Run) -> set[str]:
        config = probe_config(run_config(settings[run.method], run, monitor))
        write_text(run.config, yaml.safe_dump(config, sort_keys=False))
        try_out(run, command_to_fit(run))
        fit = read_json(run.fit_file)
        if not fit["epochs"]:
            raise StudyError(
                f"{study.files[run.method]}: a first try at one batch has trained none, for there is none: give the "
                "training more images than a batch has, or smaller batches."
            )
        check_tried(study, run.method, settings[run.method], fit["methods"])
        if run is runs[0]:
            try_out(run, command_to_test(run, monitor is not None))
        return logged_names(run)

    try:
        return set().union(*processes.map(probe, runs, jobs))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _reason(output: str) -> str:
    """The sentence in which a command says why it ended, else the end of what it printed."""
    lines = output.strip().splitlines()
    for i in reversed(range(len(lines))):
        for mark in ("error: ", "fit: error: "):
            if mark in lines[i] and not lines[i].startswith(" "):
                return "\n".join([lines[i].partition(mark)[2], *lines[i + 1 :]])
    return "\n".join(lines[-15:])
