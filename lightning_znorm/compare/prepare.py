"""Everything that can go wrong is found before the first run, and the settings of all runs are written down."""

import hashlib
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from lightning_znorm.compare.files import (
    DamagedError,
    is_leftover,
    numbered,
    read_object,
    remove_leftovers,
    write_json,
    write_text,
)
from lightning_znorm.compare.gradient_setup import check_experiment, check_tried
from lightning_znorm.compare.metrics import at_stage, choose, stage
from lightning_znorm.compare.one_run import command_to_fit, command_to_test, ended, mend_unused, printed
from lightning_znorm.compare.process import Processes, TimedOut
from lightning_znorm.compare.results import logged_names, read_fit, read_test
from lightning_znorm.compare.run_config import OVERRIDDEN, is_ours, kept_callbacks, probe_config, run_config, validates
from lightning_znorm.compare.settings import as_list, class_name, differences, monitored
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
        notes: What of the study could not be read and was set aside, a sentence each.
    """

    study: Study
    settings: dict[str, dict[str, Any]]
    monitor: tuple[str, str] | None
    metric: str
    mode: str
    logged: list[str]
    notes: tuple[str, ...] = ()

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
    record, damage = _record(study)
    resolved = processes.map(lambda name: _resolve(study, name, processes), study.files, jobs)
    settings = dict(zip(study.files, resolved, strict=True))
    _refuse_changes(study, record, settings)
    check_experiment(study, settings)
    monitor = monitored(next(iter(settings.values())))
    known = record.get("logged", [])
    # Where the record was lost, all are tried again for what they log.
    missing = {name: settings[name] for name in settings if name not in record.get("methods", {}) or damage}
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
    notes = [damage] if damage else []
    notes += [note for run in study.runs for note in mend_unused(run, monitor is not None, goes_on=False)]
    _refuse_other_tests(study, monitored_by=monitor)
    methods = record.get("methods", {}) | {
        name: {"hash": digest(found), "settings": found} for name, found in settings.items()
    }
    new = {**record, "monitor": chosen, "logged": known, "methods": methods}
    if new != record or damage:  # a full disk keeps nobody from the results of a study that is done
        path = study.output / "study.json"
        if damage and path.exists():
            path.rename(numbered(path.with_name("study.json.damaged")))
        write_json(path, new)
    for run in study.runs:
        if not run.is_done:
            config = run_config(settings[run.method], run, monitor)
            write_text(run.config, f"# {run.method}, seed {run.seed}\n{yaml.safe_dump(config, sort_keys=False)}")
    return Plan(study, settings, monitor, metric, mode, known, tuple(notes))


def read_record(output: Path) -> dict[str, Any] | None:
    """What earlier commands have written down about a study; None if there is nothing.

    Raises:
        DamagedError: If it is something else.
    """
    path = output / "study.json"
    record = read_object(path, {"methods": dict, "logged": list, "monitor": list | None}, {"alone": bool})
    if record is None:
        return None
    if not all(isinstance(name, str) for name in record["logged"]):
        raise DamagedError(path, "its logged are no names")
    if record["monitor"] is not None and not (
        len(record["monitor"]) == 2 and all(isinstance(word, str) for word in record["monitor"])
    ):
        raise DamagedError(path, "its monitor is no metric and mode")
    for name, method in record["methods"].items():
        if not (isinstance(method, dict) and _are_settings(method.get("settings"))):
            raise DamagedError(path, f"it holds no settings of {name}")
    return record


def _record(study: Study) -> tuple[dict[str, Any], str]:
    """What earlier commands wrote down about the study; and if that was lost, a sentence on what was made of it."""
    output = study.output
    path = output / "study.json"
    try:
        record, lost = read_record(output), f"{path} is missing."
    except DamagedError as error:
        record, lost = None, str(error)
    if record is None:
        record = _from_runs(output / "runs")
        if record is not None:
            found = record, f"{lost} It was made anew from the settings of the runs."
        elif path.exists():
            raise StudyError(f"{lost} No run is there to make it anew from: move it away, or choose another --output.")
        elif any(path.name not in (".lock", ".probe") and not is_leftover(path) for path in output.iterdir()):
            raise StudyError(f"{output} is not empty, and holds no study: choose another --output.")
        else:
            found = {}, ""
    else:
        found = record, ""
    for folder in (output / "runs", *(run.folder for run in study.runs)):
        if folder.exists() and not folder.is_dir():
            raise StudyError(f"{folder} is a file, where the study is to have a folder: move it away.")
    remove_leftovers(output)
    return found


def _from_runs(folder: Path) -> dict[str, Any] | None:
    """Make a study's record from the settings in the folders of its runs; None if there are none."""
    monitors: list[list[str] | None] = []
    methods: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*/run.yaml")):
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, ValueError):
            config = None
        if not _are_settings(config):
            if not (path.parent / "logs").exists():  # it has not begun, and the file is written anew
                continue
            raise StudyError(
                f"{path} is damaged, and so is the study's own study.json: what {path.parent.name} was trained with is "
                f"not known. Move {path.parent} away, and the same command repeats that run."
            )
        callbacks = {class_name(entry): entry for entry in as_list(config["trainer"].get("callbacks"))}
        if "Recorder" in callbacks:
            best = callbacks.get("BestCheckpoint", {}).get("init_args")
            monitors.append([best["monitor"], best["mode"]] if best else None)
            method = path.parent.name.rpartition("-")[0]
            before = methods[method]["settings"] if method in methods else config
            if monitors[-1] != monitors[0] or differences(_trained(before), _trained(config)):
                raise StudyError(
                    f"{path} has other settings than runs before it, and the study's own study.json, which would tell "
                    f"which are right, is damaged or missing. Move {path.parent} away, and the same command repeats "
                    "that run."
                )
            methods[method] = {"hash": digest(config), "settings": config}
    # Nothing tells whether all of them had the machine to themselves.
    return {"monitor": monitors[0], "methods": methods, "alone": False} if methods else None


def _are_settings(content: Any) -> bool:
    return isinstance(content, dict) and isinstance(content.get("trainer"), dict)


def _resolve(study: Study, name: str, processes: Processes) -> dict[str, Any]:
    try:
        code, out, errors = processes.capture([*study.fit_args(name), "--print_config"])
    except TimedOut as error:
        raise StudyError(f"`fit`, which was asked for the settings of {name}, {error}: allow more.") from error
    if code < 0:
        raise StudyError(
            f"`fit`, which was asked for the settings of {name}, {ended(code, study.output)}. {_reason(errors)}".strip()
        )
    if code:
        raise StudyError(f"`fit` refuses the settings of {name}. {_reason(errors)}")
    try:
        settings: dict[str, Any] = yaml.safe_load(out)
    except yaml.YAMLError:
        settings = {}
    if not _are_settings(settings):
        raise StudyError(
            f"`fit --print_config` has printed more than the settings of {name}, or something else: see that no module "
            f"of yours prints when it is imported. It has printed:\n{out[:500]}"
        )
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
    """Settings without what makes way for the study's own, and without that, if they are a run's."""
    callbacks = [entry for entry in kept_callbacks(settings) if not is_ours(entry)]
    trainer = {key: value for key, value in settings["trainer"].items() if key not in OVERRIDDEN}
    others = {key: value for key, value in settings.items() if key not in ("seed_everything", "ckpt_path")}
    return {**others, "trainer": {**trainer, "callbacks": callbacks}}


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

    def try_out(run: Run, command: list[str], finished: Path) -> None:
        before = run.log.stat().st_size if run.log.is_file() else 0
        try:
            code = processes.run(command, run.log)
            how = "" if code == 0 and finished.is_file() else ended(code, finished)
        except TimedOut as error:
            how = str(error)
        if how:
            raise StudyError(
                f"{study.files[run.method]}: in a first try at one batch, {command[0]} {how}. "
                f"{_reason(printed(run.log, before))}".strip()
            )

    def probe(run: Run) -> set[str]:
        config = probe_config(run_config(settings[run.method], run, monitor))
        write_text(run.config, yaml.safe_dump(config, sort_keys=False))
        try_out(run, command_to_fit(run), run.fit_file)
        fit = read_fit(run) or {}
        if not fit["epochs"]:
            raise StudyError(
                f"{study.files[run.method]}: a first try at one batch has trained none, for there is none: give the "
                "training more images than a batch has, or smaller batches."
            )
        check_tried(study, run.method, settings[run.method], fit["methods"])
        if run is runs[0]:
            try_out(run, command_to_test(run, monitor is not None), run.test_file)
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
