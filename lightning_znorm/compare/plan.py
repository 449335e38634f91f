"""Validate a study before the first run, and write down the settings of all its runs."""

import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import yaml

from lightning_znorm.compare.cores import thread_variables
from lightning_znorm.compare.files import (
    DamagedError,
    free_path,
    is_leftover,
    read_object,
    remove_leftovers,
    write_json,
    write_text,
)
from lightning_znorm.compare.looks import KEY, FirstLook, assumed_look, look_of
from lightning_znorm.compare.processes import Processes, TimedOut
from lightning_znorm.compare.results import (
    at_stage,
    default_mode,
    logged_names,
    read_fit,
    read_test,
    stage,
    without_stage,
)
from lightning_znorm.compare.runner import (
    command_to_fit,
    command_to_test,
    describe_exit,
    printed_since,
    repair_if_idle,
)
from lightning_znorm.compare.settings import (
    as_list,
    changed_settings,
    check_experiment,
    check_trial,
    class_name,
    comparable_settings,
    monitored_metric,
    reaches_validation,
    run_config,
    settings_hash,
    trial_config,
)
from lightning_znorm.compare.study import Plan, Run, Study, StudyError

Tell: TypeAlias = Callable[[str, str], None]
"""Takes the name of a method, and what happens to it: one of the words of `STEPS`."""
STEPS = ("reading", "read", "trying", "tried", "failed")
_OPTIONAL = {"alone": bool, "sweep": list, KEY: dict | None}


class _TrialFailed(StudyError):
    """A first try at one batch has failed, and did not only do something that is refused."""


def ignore(name: str, step: str) -> None:
    """Tell nobody."""


def make_plan(study: Study, processes: Processes, jobs: int, tell: Tell = ignore) -> Plan:
    """Validate a study, and write the settings of its runs into its folder. The caller must hold the folder's lock.

    Args:
        study: The study.
        processes: Starts processes.
        jobs: Number of processes at a time.
        tell: Told how far this has come.

    Raises:
        StudyError: If a file is missing or wrong, if the folder holds something else or a study with other settings, if
            a method does not train for one batch, if it has a gradient method that its file does not name, or if
            nothing logs the metric.
    """
    record, damage = _record(study)
    if not damage:
        _refuse_other_sweeps(study, record)
    settings = resolve_all(study, list(study.files), processes, jobs, tell)
    _refuse_changes(study, record, settings)
    _refuse_same_points(study, settings)
    check_experiment(study, settings)
    monitor = monitored_metric(next(iter(settings.values())))
    known = record.get("logged", [])
    # If the record was lost, all methods are tried again, to find what they log.
    tried = {study.arms[name].method for name in settings if name in record.get("methods", {}) and not damage}
    missing = {name: settings[name] for name in settings if study.arms[name].method not in tried}
    if missing:
        known = sorted({*known, *try_methods(study, missing, monitor, processes, jobs, tell)})
    metric, mode = choose_metric(study.metric, study.mode, monitor, known)
    if monitor is None and stage(metric) == "test" and all(map(reaches_validation, settings.values())):
        name = at_stage(metric, "val", known)
        monitor = (name, mode) if name else None
    if study.sweep:
        tuning_metric(metric, mode, monitor, known)  # refuses a study that could not choose
    chosen = list(monitor) if monitor else None
    if record.get("monitor", chosen) != chosen:
        raise StudyError(
            f"{study.output} holds runs whose best checkpoint was chosen by {record['monitor']}, and now it would be "
            f"{chosen}: choose another --output."
        )
    notes = [damage] if damage else []
    notes += [note for run in study.runs for note in repair_if_idle(run, monitor is not None, resumes=False)]
    _refuse_other_tests(study, monitored=monitor is not None)
    methods = record.get("methods", {}) | {
        name: {"hash": settings_hash(found), "settings": found} for name, found in settings.items()
    }
    path = study.output / "study.json"
    first_look = look_of(path, record) if KEY in record else assumed_look(study.output, is_lost=bool(damage))
    new = {**record, "monitor": chosen, "logged": known, "methods": methods}
    if study.sweep:
        new["sweep"] = study.swept
    if not all(run.is_done for run in study.runs) or damage:  # what is assumed now must not depend on new runs later
        new[KEY] = first_look and first_look.as_json()
    if new != record or damage:  # not written needlessly: a study that is done can be read from a full disk
        if damage and path.exists():
            path.rename(free_path(path.with_name("study.json.damaged")))
        write_json(path, new)
    for run in study.runs:
        if not run.is_done:
            config = run_config(settings[run.method], run, monitor)
            write_text(run.config, f"# {run.method}, seed {run.seed}\n{yaml.safe_dump(config, sort_keys=False)}")
    return Plan(study, settings, monitor, metric, mode, known, tuple(notes), first_look)


def choose_metric(
    name: str | None, mode: str | None, monitor: tuple[str, str] | None, logged: Collection[str]
) -> tuple[str, str]:
    """Choose the metric by which methods are compared, and whether ``"max"`` or ``"min"`` of it is better.

    Args:
        name: Name that the user gave, if any.
        mode: Mode that the user gave, if any.
        monitor: Metric and mode of the experiment's own `ModelCheckpoint`, if it has one.
        logged: All names that the experiment logs.

    Raises:
        StudyError: If nothing logs the metric, or the metric or its mode is not known.

    Example:
        >>> choose_metric(None, None, ("val/accuracy", "max"), ["val/accuracy", "test/accuracy"])
        ('test/accuracy', 'max')
    """
    names = ", ".join(sorted(logged)) or "nothing"
    if name is None:
        if monitor is None:
            raise StudyError(
                "Which metric decides? The experiment has no ModelCheckpoint that monitors one: add --metric NAME "
                f"--mode min|max. It logs {names}."
            )
        name = at_stage(monitor[0], "test", logged) or monitor[0]
    if name not in logged:
        raise StudyError(f"--metric {name}: nothing logs it. The experiment logs {names}.")
    if mode is None and monitor and without_stage(name) == without_stage(monitor[0]):
        mode = monitor[1]
    if mode is None:
        mode = default_mode(name)
    if mode is None:
        raise StudyError(f"--metric {name}: add --mode max if more of it is better, else --mode min.")
    return name, mode


def tuning_metric(metric: str, mode: str, monitor: tuple[str, str] | None, logged: Collection[str]) -> tuple[str, str]:
    """Return the validation metric that chooses each method's values in a sweep, and its mode.

    It is the deciding metric's, if that is logged in validation, else the one that chooses the best checkpoints.

    Args:
        metric: Metric by which methods are compared.
        mode: Its mode.
        monitor: Metric that chooses the best checkpoint, and its mode, if there is one.
        logged: All names that the experiment logs.

    Raises:
        StudyError: If the experiment logs no validation metric.

    Example:
        >>> tuning_metric("test/dice", "max", ("val/loss", "min"), ["val/loss", "val/dice", "test/dice"])
        ('val/dice', 'max')
    """
    if stage(metric) == "test" and (name := at_stage(metric, "val", logged)):
        return name, mode
    if monitor is not None and stage(monitor[0]) not in ("train", "test"):
        return monitor
    raise StudyError(
        f"--sweep chooses values by a validation metric, so that the test decides between methods alone. {metric} has "
        f"none of the same name, and no ModelCheckpoint monitors one. The experiment logs "
        f"{', '.join(sorted(logged)) or 'nothing'}: log one in validation."
    )


def read_record(output: Path) -> dict[str, Any] | None:
    """Read what earlier commands wrote down about a study.

    Args:
        output: Folder of the study.

    Returns:
        The record; ``None`` if there is none.

    Raises:
        DamagedError: If the file holds something else.
    """
    path = output / "study.json"
    record = read_object(path, {"methods": dict, "logged": list, "monitor": list | None}, _OPTIONAL)
    if record is None:
        return None
    if not all(isinstance(name, str) for name in record["logged"]):
        raise DamagedError(path, "its logged are not names")
    if record["monitor"] is not None and not (
        len(record["monitor"]) == 2 and all(isinstance(word, str) for word in record["monitor"])
    ):
        raise DamagedError(path, "its monitor is not a metric and a mode")
    for name, method in record["methods"].items():
        if not (isinstance(method, dict) and _are_settings(method.get("settings"))):
            raise DamagedError(path, f"it holds no settings of {name}")
    look_of(path, record)
    return record


def write_first_look(output: Path, look: FirstLook) -> None:
    """Write down what was first looked at, for later commands. The caller must hold the folder's lock.

    Args:
        output: Folder of the study.
        look: What was first looked at.

    Raises:
        DamagedError: If the record holds something else.
        OSError: If it cannot be written.
    """
    record = read_record(output)
    if record is not None and record.get(KEY) != look.as_json():
        write_json(output / "study.json", {**record, KEY: look.as_json()})


def _record(study: Study) -> tuple[dict[str, Any], str]:
    """Return the record of the study, and a sentence if it was lost and restored from the runs."""
    output = study.output
    path = output / "study.json"
    try:
        record, lost = read_record(output), f"{path} is missing."
    except DamagedError as error:
        record, lost = None, str(error)
    if record is None:
        record = _record_from_runs(output / "runs")
        if record is not None:
            found = record, f"{lost} It was restored from the settings of the runs."
        elif path.exists():
            raise StudyError(f"{lost} There is no run to restore it from: move it away, or choose another --output.")
        elif any(path.name not in (".lock", ".probe") and not is_leftover(path) for path in output.iterdir()):
            raise StudyError(f"{output} is not empty, and holds no study: choose another --output.")
        else:
            found = {}, ""
    else:
        found = record, ""
    for folder in (output / "runs", *(run.folder for run in study.runs)):
        if folder.exists() and not folder.is_dir():
            raise StudyError(f"{folder} is a file, where the study needs a folder: move it away.")
    remove_leftovers(output)
    return found


def _record_from_runs(folder: Path) -> dict[str, Any] | None:
    """Restore a study's record from the settings in the folders of its runs; ``None`` if there are none."""
    monitors: list[list[str] | None] = []
    methods: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*/run.yaml")):
        try:
            config = yaml.safe_load(path.read_text(encoding="utf-8"))
        except (yaml.YAMLError, ValueError):
            config = None
        if not _are_settings(config):
            if not (path.parent / "logs").exists():  # the run has not begun, and its file is written again
                continue
            raise StudyError(
                f"{path} is damaged, and so is the study's own study.json: the settings of {path.parent.name} are not "
                f"known. Move {path.parent} away, and the same command repeats that run."
            )
        callbacks = {class_name(entry): entry for entry in as_list(config["trainer"].get("callbacks"))}
        if "Recorder" in callbacks:
            best = callbacks.get("BestCheckpoint", {}).get("init_args")
            monitors.append([best["monitor"], best["mode"]] if best else None)
            method = path.parent.name.rpartition("-")[0]
            before = methods[method]["settings"] if method in methods else config
            if monitors[-1] != monitors[0] or changed_settings(
                comparable_settings(before), comparable_settings(config)
            ):
                raise StudyError(
                    f"{path} has other settings than runs before it, and the study's own study.json, which says which "
                    f"are right, is damaged or missing. Move {path.parent} away, and the same command repeats that run."
                )
            methods[method] = {"hash": settings_hash(config), "settings": config}
    # Nothing says whether each of them had the machine to itself.
    return {"monitor": monitors[0], "methods": methods, "alone": False} if methods else None


def _are_settings(content: Any) -> bool:
    return isinstance(content, dict) and isinstance(content.get("trainer"), dict)


def resolve_all(
    study: Study, names: Sequence[str], processes: Processes, jobs: int, tell: Tell = ignore
) -> dict[str, dict[str, Any]]:
    """Return the settings of methods, as `fit` resolves them.

    Args:
        study: The study.
        names: Names of the methods.
        processes: Starts processes.
        jobs: Number of processes at a time.
        tell: Told how far this has come.

    Raises:
        StudyError: If `fit` refuses the settings of a method.
    """

    def resolve(name: str) -> dict[str, Any]:
        tell(name, "reading")
        settings = _resolve(study, name, processes)
        tell(name, "read")
        return settings

    return dict(zip(names, processes.map(resolve, names, jobs), strict=True))


def _resolve(study: Study, name: str, processes: Processes) -> dict[str, Any]:
    try:
        code, out, err = processes.capture([*study.fit_args(name), "--print_config"])
    except TimedOut as error:
        raise StudyError(f"`fit`, which was asked for the settings of {name}, {error}: allow more.") from error
    if code < 0:
        raise StudyError(
            f"`fit`, which was asked for the settings of {name}, {describe_exit(code, study.output)}. "
            f"{_reason(err)}".strip()
        )
    if code:
        raise StudyError(f"`fit` refuses the settings of {name}. {_reason(err)}")
    try:
        settings: dict[str, Any] = yaml.safe_load(out)
    except yaml.YAMLError:
        settings = {}
    if not _are_settings(settings):
        raise StudyError(
            f"`fit --print_config` has printed more than the settings of {name}, or something else: make sure that "
            f"none of your modules prints when it is imported. It has printed:\n{out[:500]}"
        )
    if settings["trainer"].get("fast_dev_run"):
        raise StudyError("trainer.fast_dev_run keeps no logs and no checkpoints: leave it out of a study.")
    settings.pop("seed_everything", None)
    return settings


def _refuse_other_sweeps(study: Study, record: dict[str, Any]) -> None:
    """Refuse to mix runs of another sweep, or of none, with those of this one."""
    swept, before = study.swept, record.get("sweep", [])
    if record.get("methods") and swept != before:
        raise StudyError(
            f"{study.output} holds a study that {'sweeps ' + ', '.join(before) if before else 'sweeps nothing'}, and "
            f"now it would {'sweep ' + ', '.join(swept) if swept else 'sweep nothing'}: choose another --output. "
            "(Values may be added to a sweep.)"
        )


def _refuse_same_points(study: Study, settings: dict[str, dict[str, Any]]) -> None:
    """Refuse a sweep in which two values are the same, or change nothing that is trained with."""
    seen: dict[tuple[str, str], str] = {}
    for name, arm in study.arms.items() if study.sweep else ():
        key = (arm.method, settings_hash(comparable_settings(settings[name])))
        if key in seen:
            raise StudyError(
                f"{study.label(study.arms[seen[key]].point)} and {study.label(arm.point)} give {arm.method} the same "
                "settings: name each value once, of a setting that the study does not set itself."
            )
        seen[key] = name


def _refuse_changes(study: Study, record: dict[str, Any], settings: dict[str, dict[str, Any]]) -> None:
    for name, new in settings.items():
        if name in record.get("methods", {}):
            before = record["methods"][name]["settings"]
            changed = changed_settings(comparable_settings(before), comparable_settings(new))
            if changed:
                shown = "; ".join(f"{key} was {old} and is {now}" for key, old, now in changed[:5])
                more = f"; and {len(changed) - 5} more" if len(changed) > 5 else ""
                raise StudyError(
                    f"{study.output} holds runs of {name} with other settings ({shown}{more}): choose another "
                    "--output, or restore them."
                )


def _refuse_other_tests(study: Study, monitored: bool) -> None:
    """Refuse a study with tests of other checkpoints than the one that all its runs are tested at."""
    wrong = []
    for run in study.runs:
        if run.is_done:
            tested, planned = read_test(run), run.checkpoint_to_test(monitored).name
            if tested is None:
                wrong.append(f"{run.name} by a version that tested last checkpoints and called them best")
            elif Path(tested.path).name != planned:
                wrong.append(f"{run.name} at {tested.path}")
    if wrong:
        raise StudyError(
            f"{study.output} holds tests of other checkpoints than each run's {planned}: {', '.join(wrong)}. Delete "
            "the test.json of these runs, and the same command tests them again."
        )


def try_methods(
    study: Study,
    settings: dict[str, Any],
    monitor: tuple[str, str] | None,
    processes: Processes,
    jobs: int,
    tell: Tell = ignore,
) -> set[str]:
    """Train each method for one batch, and test the first. Of a sweep, one value of each method has to work.

    Args:
        study: The study.
        settings: Resolved settings of the arms to try.
        monitor: Metric that chooses the best checkpoint, and its mode.
        processes: Starts processes.
        jobs: Number of processes at a time.
        tell: Told how far this has come.

    Returns:
        Names of everything that was logged.

    Raises:
        StudyError: If a method fails, at all of its values, or trains with a gradient method that its settings do not
            name.
    """
    folder = study.output / ".probe"
    shutil.rmtree(folder, ignore_errors=True)
    methods: dict[str, list[Run]] = {}
    for name in settings:
        methods.setdefault(study.arms[name].method, []).append(Run(name, study.seeds[0], folder / name))
    first = next(iter(methods), None)
    threads = thread_variables(min(jobs, len(methods)))

    def described(run: Run) -> str:
        arm = study.arms[run.method]
        return f"{arm.file} with {study.label(arm.point)}" if arm.point else arm.file

    def execute(run: Run, command: list[str], expected: Path) -> None:
        start = run.log.stat().st_size if run.log.is_file() else 0
        try:
            code = processes.run(command, run.log, threads)
            failure = "" if code == 0 and expected.is_file() else describe_exit(code, expected)
        except TimedOut as error:
            failure = str(error)
        if failure:
            raise _TrialFailed(
                f"{described(run)}: in a first try at one batch, {command[0]} {failure}. "
                f"{_reason(printed_since(run.log, start))}".strip()
            )

    def try_method(run: Run) -> set[str]:
        tell(run.method, "trying")
        config = trial_config(run_config(settings[run.method], run, monitor))
        write_text(run.config, yaml.safe_dump(config, sort_keys=False))
        execute(run, command_to_fit(run), run.fit_file)
        fit = read_fit(run) or {}
        if not fit["epochs"]:
            raise StudyError(
                f"{described(run)}: a first try at one batch has not trained, because there is no batch: give the "
                "training more images than a batch has, or smaller batches."
            )
        check_trial(study, run.method, settings[run.method], fit["methods"])
        if study.arms[run.method].method == first:
            execute(run, command_to_test(run, monitor is not None), run.test_file)
        tell(run.method, "tried")
        return logged_names(run)

    def try_values(runs: list[Run]) -> set[str]:
        for run in runs[:-1]:
            try:
                return try_method(run)
            except _TrialFailed:  # as at a learning rate that is too large: its runs fail, and it is not chosen
                tell(run.method, "failed")
        return try_method(runs[-1])

    try:
        return set().union(*processes.map(try_values, methods.values(), jobs))
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _reason(output: str) -> str:
    """Return the sentence in which a command says why it ended, else the end of what it printed."""
    lines = output.strip().splitlines()
    for i in reversed(range(len(lines))):
        for mark in ("error: ", "fit: error: "):
            if mark in lines[i] and not lines[i].startswith(" "):
                return "\n".join([lines[i].partition(mark)[2], *lines[i + 1 :]])
    return "\n".join(lines[-15:])
