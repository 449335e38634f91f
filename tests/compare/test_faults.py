"""A study meets files that are damaged: one sentence with the path, and that run is done again, and no other."""

import errno
import json
import os
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from pretended import Pretended, write_checkpoint
from samples import FIT, TEST

from lightning_znorm import compare
from lightning_znorm.cli import main
from lightning_znorm.compare import runner
from lightning_znorm.compare.files import DamagedError, InUseError, locked
from lightning_znorm.compare.plan import read_record
from lightning_znorm.compare.processes import Processes
from lightning_znorm.compare.results import read_run
from lightning_znorm.compare.runner import fit_and_test, repair_if_idle
from lightning_znorm.compare.study import StudyError

NAME = "baseline-0"


@pytest.fixture
def pretended(tmp_path, monkeypatch) -> Pretended:
    """Of one run, which is done."""
    study = Pretended(tmp_path, monkeypatch)
    run = study.get(NAME)
    run.folder.mkdir(parents=True)
    run.config.write_text("trainer: {}")
    assert fit_and_test(run, True).error == ""
    study.done.clear()
    return study


@pytest.fixture
def study(tmp_path, monkeypatch) -> Pretended:
    """Of four runs, which are done."""
    study = Pretended(tmp_path, monkeypatch)
    study.run()
    return study


def cut(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def make_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def changed(old: str, new: str) -> Callable[[Path], object]:
    def change(path: Path) -> None:
        text = path.read_bytes().decode()
        assert old in text
        path.write_bytes(text.replace(old, new, 1).encode())

    return change


ANY = {
    "half": cut,
    "empty": lambda path: path.write_bytes(b""),
    "binary": lambda path: path.write_bytes(bytes(range(256))),
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "not UTF-8": lambda path: path.write_bytes(b'{"a": "caf\xe9"}\n'),
    "a folder": make_folder,
}
JSON = ANY | {
    "null": lambda path: path.write_text("null"),
    "a list": lambda path: path.write_text("[1, 2]"),
    "a number": lambda path: path.write_text("7"),
    "a text": lambda path: path.write_text('"fit"'),
    "an empty object": lambda path: path.write_text("{}"),
    "nested deeply": lambda path: path.write_text("[" * 100_000),
}


def with_values(content: dict, **values: object) -> Callable[[Path], object]:
    """Damage a JSON file by values of other types, and by keys that are missing (``...``)."""
    kept = {key: value for key, value in {**content, **values}.items() if value is not ...}
    return lambda path: path.write_text(json.dumps(kept))


NEEDED = ("epochs", "seconds", "parameters", "device", "threads", "versions")
FITS = JSON | {
    **{f"{key} is missing": with_values(FIT, **{key: ...}) for key in NEEDED},
    **{f"{key} is a list": with_values(FIT, **{key: [1]}) for key in NEEDED},
    **{f"{key} is a number": with_values(FIT, **{key: 3}) for key in ("weights", "optimizers", "methods", "logged")},
    "methods hold numbers": with_values(FIT, methods={"given": 3}),
    "logged_epochs is a number": with_values(FIT, logged_epochs=3),
    "logged_numbers is a text": with_values(FIT, logged_numbers="6"),
}
TESTS = JSON | {
    "no metrics": with_values(TEST, metrics=...),
    "metrics are a list": with_values(TEST, metrics=[0.5]),
    "a metric is a text": with_values(TEST, metrics={"test/accuracy": "high"}),
    "checkpoint is a text": with_values(TEST, checkpoint="best.ckpt"),
    "checkpoint has no epoch": with_values(TEST, checkpoint={"path": "best.ckpt", "monitor": None, "value": None}),
    "checkpoint has a text as its epoch": with_values(TEST, checkpoint={**TEST["checkpoint"], "epoch": "last"}),
}
ATTEMPTS = JSON | {"a text as its step": lambda path: path.write_text('{"step": "0"}'), "missing": Path.unlink}
LOGS = ANY | {
    "missing": Path.unlink,
    "its last line cut": lambda path: path.write_bytes(path.read_bytes()[:-3]),
    "its last line lost": lambda path: path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[:-1])),
    "its header lost": lambda path: path.write_bytes(b"".join(path.read_bytes().splitlines(keepends=True)[1:])),
    "no step": changed("step", "stop"),
    "no epoch": changed("epoch", "epic"),
    "NUL bytes in a value": changed("0.75", "0\0005"),
    "a text as a value": changed("0.75", "high"),
    "a text as the step": changed(",19,", ",last,"),
    "no step in a row": changed(",19,", ",,"),
    "a text as the epoch": changed(",1,19", ",one,19"),
    "infinity as the epoch": changed(",1,19", ",inf,19"),
    "a value too many": changed("0.75", "0.75,0.9"),
    "a value too few": changed("4.0,0,9,,", "4.0,0,9"),
    "a quote that does not end": changed("0.75", '"0.75'),
}
DAMAGES = [
    *(("fit.json", kind, ["fit from last.ckpt", "test"]) for kind in FITS),
    *(("test.json", kind, ["test"]) for kind in TESTS),
    *(("logs/version_0/attempt.json", kind, ["fit", "test"]) for kind in ATTEMPTS),
    *(("logs/version_0/metrics.csv", kind, ["fit", "test"]) for kind in LOGS),
    *(("progress.json", kind, []) for kind in JSON),
]
KINDS = {"fit.json": FITS, "test.json": TESTS, "attempt.json": ATTEMPTS, "metrics.csv": LOGS, "progress.json": JSON}


@pytest.mark.parametrize(("name", "kind", "again"), DAMAGES, ids=[f"{name}-{kind}" for name, kind, _ in DAMAGES])
def test_damaged_file_of_a_run_that_is_done(name, kind, again, pretended):
    run = pretended.get(NAME)
    path, before = run.folder / name, read_run(run)
    KINDS[path.name][kind](path)
    damaged = path.read_bytes() if path.is_file() else None
    outcome = fit_and_test(run, True)
    assert outcome.error == ""
    assert pretended.done == [f"{NAME}: {command}" for command in again]
    assert read_run(run) == before
    (sentence,) = outcome.notes
    assert sentence.startswith((f"{path} is damaged: ", f"{run.logs} is damaged: "))
    assert ". It is kept in damaged-1, and " in sentence
    assert f"# {sentence}\n" in run.log.read_text()
    assert damaged is None or (run.folder / "damaged-1" / name).read_bytes() == damaged
    assert fit_and_test(run, True).notes == ()  # all is well
    assert len(pretended.done) == len(again)


@pytest.mark.parametrize("name", ["fit.json", "test.json", "logs/version_0/metrics.csv"])
def test_study_with_a_damaged_file(name, study, capsys):
    """Only the run that it is of is done again, and the results are the same."""
    run, results = study.get(NAME), (study.output / "results.csv").read_bytes()
    before = study.run()
    cut(run.folder / name)
    capsys.readouterr()
    after = study.run()
    assert {what.partition(":")[0] for what in study.done} == {NAME}
    assert (after.rows, after.failures) == (before.rows, ())
    assert (study.output / "results.csv").read_bytes() == results
    assert len(re.findall(rf"^{run.folder}.* is damaged: ", capsys.readouterr().out, re.MULTILINE)) == 1


@pytest.mark.parametrize("name", ["fit.json", "test.json", "progress.json"])
def test_missing_file_of_a_run_that_is_done(name, study):
    before = study.run()
    (study.get(NAME).folder / name).unlink()
    again = {"fit.json": ["fit from last.ckpt", "test"], "test.json": ["test"], "progress.json": []}[name]
    assert study.run().rows == before.rows
    assert study.done == [f"{NAME}: {command}" for command in again]


def test_tests_of_the_first_versions_are_still_told_apart(study):
    """Which say nothing of a checkpoint, and are no damage."""
    study.get(NAME).test_file.write_text('{"test/accuracy": 0.5}')
    with pytest.raises(StudyError, match="by a version that tested last checkpoints"):
        study.run()


def test_run_without_metrics_in_its_test(study):
    run = study.get(NAME)
    run.test_file.write_text(json.dumps({**TEST, "metrics": {}}))
    study.run()
    assert study.done == []


def test_fits_of_the_first_versions_say_less(study):
    run = study.get(NAME)
    run.fit_file.write_text(json.dumps({key: FIT[key] for key in NEEDED}))
    study.run()
    assert study.done == []
    shutil.rmtree(run.logs)
    study.run()
    assert study.done == [f"{NAME}: fit", f"{NAME}: test"]


def test_log_may_hold_more_than_was_counted(study):
    """Callbacks that log when all is over come after the one that counts, and users log texts too."""
    log = study.get(NAME).logs / "version_0" / "metrics.csv"
    log.write_bytes(log.read_bytes() + b",1,19,0.4,high\r\n")
    study.run()
    assert study.done == []


@pytest.mark.parametrize("kind", [kind for kind in LOGS if kind != "a text as a value"])
def test_damaged_log_of_a_run_that_goes_on(kind, pretended):
    """It is found before the run is trained to its end. Only the epoch that was cut off is repeated."""
    run = pretended.interrupt(NAME)
    LOGS[kind](run.logs / "version_0" / "metrics.csv")
    outcome = fit_and_test(run, True)
    seen = not kind.startswith("its last line")
    assert pretended.done == [f"{NAME}: fit" if seen else f"{NAME}: fit from last.ckpt", f"{NAME}: test"]
    assert len(outcome.notes) == seen


def test_half_a_line_of_a_run_that_was_killed(pretended):
    run = pretended.interrupt(NAME)
    path = run.logs / "version_0" / "metrics.csv"
    path.write_bytes(path.read_bytes() + b",1,19,0.5\xc3")  # half a character
    assert fit_and_test(run, True).error == ""
    assert pretended.done == [f"{NAME}: fit from last.ckpt", f"{NAME}: test"]


def zero_middle(path: Path) -> None:
    content = bytearray(path.read_bytes())
    middle = len(content) // 2
    content[middle : middle + 512] = bytes(512)
    path.write_bytes(content)


CHECKPOINTS = {
    "torn": cut,
    "empty": lambda path: path.write_bytes(b""),
    "zeros in its middle": zero_middle,
    "zeros": lambda path: path.write_bytes(bytes(path.stat().st_size)),
    "its last byte lost": lambda path: path.write_bytes(path.read_bytes()[:-1]),
    "a text": lambda path: path.write_text("no checkpoint"),
    "a foreign object": lambda path: torch.save([1, 2], path),
    "no weights": lambda path: torch.save({"epoch": 3}, path),
    "a folder": make_folder,
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
@pytest.mark.parametrize("best", ["sound", "damaged", "missing"])
def test_damaged_last_checkpoint(kind, best, pretended):
    run = pretended.interrupt(NAME)
    CHECKPOINTS[kind](run.last)
    if best == "damaged":
        zero_middle(run.best)
    elif best == "missing":
        run.best.unlink()
    outcome = fit_and_test(run, True)
    resumed = " from last.ckpt" if best == "sound" else ""
    assert pretended.done == [f"{NAME}: fit{resumed}", f"{NAME}: test"]
    assert outcome.error == ""
    consequence = "training resumes from best.ckpt" if best == "sound" else "the run begins anew"
    (sentence,) = outcome.notes
    assert re.fullmatch(rf"{run.last} is damaged: .+\. It is kept in damaged-1, and {consequence}\.", sentence)
    assert f"# {sentence}\n" in run.log.read_text()
    assert (run.folder / "damaged-1/checkpoints/last.ckpt").exists()
    if best == "sound":
        assert run.last.read_bytes() == run.best.read_bytes()
    elif best == "damaged":
        assert (run.folder / "damaged-1/checkpoints/best.ckpt").exists()


def test_best_checkpoint_whose_epoch_may_not_be_whole_in_the_log(pretended):
    """It is written before the epoch's own numbers are."""
    run = pretended.interrupt(NAME)
    write_checkpoint(run.best, [0, 1])
    cut(run.last)
    assert fit_and_test(run, True).error == ""
    assert pretended.done == [f"{NAME}: fit", f"{NAME}: test"]


def test_best_checkpoint_of_a_training_that_had_ended(pretended):
    """Then the log of its last epoch is whole."""
    run = pretended.get(NAME)
    write_checkpoint(run.best, [0, 1])
    run.fit_file.write_text("{")
    cut(run.last)
    outcome = fit_and_test(run, True)
    assert outcome.error == ""
    assert "the training is resumed where it can be, because last.ckpt is damaged, too." in outcome.notes[0]
    assert pretended.done == [f"{NAME}: fit from last.ckpt", f"{NAME}: test"]
    assert (run.folder / "damaged-1/fit.json").exists()
    assert (run.folder / "damaged-2/checkpoints/last.ckpt").exists()


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_damaged_checkpoint_that_is_to_be_tested(kind, pretended):
    run = pretended.get(NAME)
    run.test_file.unlink()
    CHECKPOINTS[kind](run.best)
    assert fit_and_test(run, True).error == ""
    assert pretended.done == [f"{NAME}: fit", f"{NAME}: test"]
    assert (run.folder / "damaged-1/checkpoints/best.ckpt").exists()


def test_damaged_checkpoint_that_nobody_needs(pretended):
    run = pretended.get(NAME)
    for path in (run.last, run.best):
        cut(path)
    assert fit_and_test(run, True).error == ""
    assert pretended.done == []


def test_checkpoint_without_sums(pretended):
    """torch writes none if it is told so; such a checkpoint is whole."""
    if not hasattr(torch.serialization, "set_crc32_options"):
        pytest.skip("torch always writes sums")
    run = pretended.interrupt(NAME)
    torch.serialization.set_crc32_options(False)
    try:
        write_checkpoint(run.last, [0, 1])
    finally:
        torch.serialization.set_crc32_options(True)
    assert fit_and_test(run, True).error == ""
    assert pretended.done == [f"{NAME}: fit from last.ckpt", f"{NAME}: test"]


def test_checkpoint_with_objects_that_need_code(pretended):
    """It is whole; what `fit` makes of it is not for a study to decide."""
    run = pretended.interrupt(NAME)
    write_checkpoint(run.last, [0, 1], hyper_parameters={"root": Path("data")})
    assert fit_and_test(run, True).error == ""
    assert pretended.done == [f"{NAME}: fit from last.ckpt", f"{NAME}: test"]


def test_a_dry_run_finds_damage_too(study, capsys):
    run = study.interrupt(NAME)
    cut(run.last)
    options = "--metric test/accuracy --mode max --seeds 0 1 --output out --dry-run"
    main(["compare", "--config", "exp.yaml", "--methods", "baseline.yaml", "znorm.yaml", *options.split()])
    out, err = capsys.readouterr()
    (line,) = out.splitlines()
    assert "--ckpt_path" in line.split(" && ")[0]
    assert f"{NAME}: {run.last} is damaged" in err
    assert run.last.read_bytes() == run.best.read_bytes()


def test_damaged_while_the_study_runs(study, capsys):
    """A run that was sound when the study began is not averaged either, if it is not at the end."""
    run = study.get(NAME)
    study.get("znorm-1").test_file.unlink()

    def damage(tested) -> int:
        cut(run.logs / "version_0" / "metrics.csv")
        tested.test_file.write_text(json.dumps({**TEST, "checkpoint": {**TEST["checkpoint"], "path": "best.ckpt"}}))
        return 0

    study.does["znorm-1: test"] = damage
    table = study.run()
    (failure,) = table.failures
    assert failure.run.name == NAME
    assert f"{run.logs}/version_0/metrics.csv is damaged: " in failure.error
    assert table.row("baseline").seeds == (1,)
    assert "3 of 4 runs are done" in (study.output / "report.md").read_text()
    study.run()
    assert study.done == [f"{NAME}: fit", f"{NAME}: test"]


RECORD = {"monitor": ["val/accuracy", "max"], "logged": ["val/accuracy"], "alone": True, "methods": {}}
RECORDS = JSON | {
    "logged is missing": with_values(RECORD, logged=...),
    "logged are numbers": with_values(RECORD, logged=[1]),
    "alone is a text": with_values(RECORD, alone="yes"),
    "monitor has no mode": with_values(RECORD, monitor=["val/accuracy"]),
    "methods are a list": with_values(RECORD, methods=["baseline"]),
    "a method without settings": with_values(RECORD, methods={"baseline": {"hash": "0"}}),
    "first look is a list": with_values(RECORD, first_look=[]),
    "first look of no methods": with_values(RECORD, first_look={"metric": None, "seeds": [0]}),
    "first look at no numbers": with_values(RECORD, first_look={"metric": None, "seeds": ["0"], "methods": []}),
    "first look at a metric that is none": with_values(RECORD, first_look={"metric": 1, "seeds": [0], "methods": []}),
    "settings without a trainer": with_values(RECORD, methods={"baseline": {"hash": "0", "settings": {}}}),
}


@pytest.mark.parametrize("kind", RECORDS)
def test_damaged_record(kind, tmp_path):
    path = tmp_path / "study.json"
    path.write_text(json.dumps(RECORD))
    assert read_record(tmp_path) == RECORD
    RECORDS[kind](path)
    with pytest.raises(DamagedError, match=f"^{path} is damaged: "):
        read_record(tmp_path)


@pytest.mark.parametrize("damage", [cut, make_folder, Path.unlink])
def test_study_with_a_damaged_record(damage, study, capsys):
    """Runs say what it said, except whether they were alone, and which of them were first looked at."""
    before, path = study.run(), study.output / "study.json"
    record = json.loads(path.read_text())
    damage(path)
    missing = not path.exists()
    capsys.readouterr()
    rows = study.run().rows
    assert [(row.metric, row.method, row.values) for row in rows] == [
        (row.metric, row.method, row.values) for row in before.rows
    ]
    assert rows[1].verdict == (
        "Exploratory, no verdict: the record of the study was lost, so its first look is not known."
    )
    assert study.done == []
    what = "is missing" if missing else r"is damaged: .+"
    out = capsys.readouterr().out
    assert re.search(rf"^{path} {what}\. It was restored from the settings of the runs\.$", out, re.MULTILINE)
    unknown = {"metric": None, "seeds": None, "methods": []}
    assert json.loads(path.read_text()) == {**record, "alone": False, "first_look": unknown}
    assert (study.output / "study.json.damaged-1").exists() is not missing
    study.run()
    assert "restored" not in capsys.readouterr().out


def test_lost_record_and_other_settings(study):
    (study.output / "study.json").unlink()
    study.settings = study.settings.replace("max_epochs: 2", "max_epochs: 3")
    with pytest.raises(StudyError, match=r"runs of baseline with other settings \(trainer.max_epochs was 2 and is 3\)"):
        study.run()
    assert not (study.output / "study.json").exists()


def test_lost_record_and_other_settings_of_a_method_that_comes_later(study):
    (study.output / "study.json").unlink()
    study.run(methods=["baseline.yaml"])
    study.settings = study.settings.replace("max_epochs: 2", "max_epochs: 3")
    with pytest.raises(
        StudyError, match=r"holds runs of znorm with other settings \(trainer.max_epochs was 2 and is 3"
    ):
        study.run(methods=["znorm.yaml"])


def test_lost_record_and_another_choice_of_checkpoints(study):
    (study.output / "study.json").unlink()
    with pytest.raises(StudyError, match=r"was chosen by \['val/accuracy', 'max'\], and now it would be None"):
        study.run(metric="train/loss", mode="min")


def test_lost_record_and_lost_settings(study):
    run = study.get(NAME)
    (study.output / "study.json").write_text("{")
    run.config.write_text("trainer: [")
    with pytest.raises(StudyError, match=rf"{run.config} is damaged, .* Move {run.folder} away"):
        study.run()
    shutil.move(run.folder, "elsewhere")
    study.run()
    assert study.done == [f"{NAME}: fit", f"{NAME}: test"]


def test_lost_record_and_runs_that_differ(study):
    """Which of them are the study's is not known, and no mean is taken over both."""
    odd = study.get("znorm-1")
    content = odd.config.read_text()
    assert "max_epochs: 2" in content
    odd.config.write_text(content.replace("max_epochs: 2", "max_epochs: 3"))
    (study.output / "study.json").unlink()
    with pytest.raises(StudyError, match=rf"{odd.config} has other settings than runs before it.* Move {odd.folder}"):
        study.run()
    assert study.done == []


@pytest.mark.parametrize("is_done", [True, False])
def test_folder_of_a_run_that_may_only_be_read(is_done, study, monkeypatch):
    run = study.get(NAME)
    if not is_done:
        run.test_file.unlink()

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", str(run.folder / "lock"))

    monkeypatch.setattr(runner, "locked", refuse)
    if is_done:
        assert repair_if_idle(run, True, True) == []
    else:
        with pytest.raises(PermissionError):
            repair_if_idle(run, True, True)


def test_somebody_elses_study_json(tmp_path, monkeypatch):
    study = Pretended(tmp_path, monkeypatch)
    study.output.mkdir()
    for text in ('{"trials": 100}', "null"):
        (study.output / "study.json").write_text(text)
        with pytest.raises(StudyError, match=r"study.json is damaged: .* move it away, or choose another --output"):
            study.run()
        assert (study.output / "study.json").read_text() == text
        assert not (study.output / "runs").exists()


class TestLeftovers:
    """Files of processes that died while they wrote."""

    def test_are_removed(self, study):
        run = study.interrupt(NAME)
        left = [run.folder / ".progress.json.4242", run.folder / ".fit.json.1", study.output / ".results.csv.77"]
        for path in left:
            path.write_text("{")
            os.utime(path, (1, 1))
        fresh = run.folder / ".fit.json.2"  # somebody may be writing it, on another machine
        fresh.write_text("{")
        study.run()
        assert not any(path.exists() for path in left)
        assert fresh.exists()

    def test_are_no_obstacle(self, tmp_path, monkeypatch):
        """Also where they are all that there is."""
        study = Pretended(tmp_path, monkeypatch)
        study.output.mkdir()
        (study.output / ".study.json.4242").write_text("{")
        os.utime(study.output / ".study.json.4242", (1, 1))
        assert study.run().failures == ()
        assert not (study.output / ".study.json.4242").exists()

    def test_nothing_else_is_removed(self, study):
        others = [study.get(NAME).folder / name for name in (".notes", ".fit.json", "fit.json.12", ".nfs000012.34")]
        for path in others:
            path.touch()
            os.utime(path, (1, 1))
        study.interrupt(NAME)
        study.run()
        assert all(path.exists() for path in others)


class TestFullDisk:
    @pytest.fixture
    def full(self, study, monkeypatch) -> Pretended:
        """The study, when not a byte more can be written."""

        def refuse(descriptor: int) -> None:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

        monkeypatch.setattr(os, "fsync", refuse)
        for name in ("results.csv", "report.md", "report.html"):
            (study.output / name).unlink()
        return study

    @pytest.mark.filterwarnings("error")
    def test_table_is_there_without_a_report(self, full):
        path = full.output / "results.csv"
        with pytest.warns(UserWarning, match="The report of the study is not complete") as told:
            table = full.run()
        assert (full.done, table.failures) == ([], ())
        assert table.row("znorm").values == (pytest.approx(0.55), pytest.approx(0.65))
        sentences = [str(warning.message) for warning in told]
        assert f"The report of the study is not complete. {path}: No space left on device." in sentences
        assert len(sentences) == 2
        assert not any("report" in path.name for path in full.output.iterdir())

    def test_command_prints_the_table(self, full, capsys):
        options = "--metric test/accuracy --mode max --seeds 0 1 --output out"
        with pytest.raises(SystemExit) as info:
            main(["compare", "--config", "exp.yaml", "--methods", "baseline.yaml", "znorm.yaml", *options.split()])
        out, err = capsys.readouterr()
        assert info.value.code == 1
        assert "test/accuracy\nbaseline  0.5500" in out
        assert f"error: the report is not complete. {full.output}/report.md: No space left on device.\n" in err
        assert "report.html" not in out

    def test_other_files_are_written(self, study):
        """What cannot be written keeps nothing else from being written."""
        (study.output / "results.csv").unlink()
        (study.output / "results.csv").mkdir()
        (study.output / "report.md").unlink()
        with pytest.warns(UserWarning, match="results.csv: Is a directory"):
            study.run()
        assert "4 of 4 runs are done" in (study.output / "report.md").read_text()
        assert [path.name for path in study.output.glob(".*")] == [".lock"]

    def test_report_with_a_bug(self, study, monkeypatch, capsys):
        """The table is printed before the traceback is."""
        monkeypatch.setattr("lightning_znorm.compare.report.plot", lambda *args: 1 // 0)
        with pytest.raises(ZeroDivisionError):
            study.run()
        assert "test/accuracy\nbaseline  0.5500" in capsys.readouterr().out

    def test_study_that_cannot_begin(self, full):
        full.interrupt(NAME)
        with pytest.raises(StudyError, match=f"^{full.get(NAME).config}: No space left on device.$"):
            full.run()

    def test_run_that_cannot_write(self, study):
        """It alone fails, and the others are reported."""
        run = study.interrupt(NAME)

        def fail(run) -> int:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(run.log))

        study.does[f"{NAME}: fit from last.ckpt"] = fail
        (failure,) = study.run().failures
        assert failure.error == f"{run.log}: No space left on device"
        assert "3 of 4 runs are done" in (study.output / "report.md").read_text()

    def test_half_a_checkpoint_takes_no_room(self, pretended):
        """Of a training that failed while it wrote it."""
        run = pretended.interrupt(NAME)

        def fail(run) -> int:
            run.last.with_name(".last.ckpt.new").write_bytes(bytes(1000))
            return 1

        pretended.does[f"{NAME}: fit from last.ckpt"] = fail
        assert fit_and_test(run, True).error.startswith("fit ended with exit code 1")
        assert sorted(path.name for path in run.last.parent.iterdir()) == ["best.ckpt", "last.ckpt"]

    @pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device of Linux")
    def test_lock_holds_without_its_text(self, tmp_path):
        (tmp_path / "lock").symlink_to("/dev/full")
        with locked(tmp_path / "lock"), pytest.raises(InUseError), locked(tmp_path / "lock"):
            pass


class TestNames:
    def test_any_text(self, tmp_path, monkeypatch):
        folder = tmp_path / "étude 研究"
        folder.mkdir()
        study = Pretended(folder, monkeypatch)
        Path("méthode Ω.yaml").write_text("trainer: {}")
        table = study.run(methods=["baseline.yaml", "méthode Ω.yaml"], output="résultats")
        assert table.failures == ()
        assert "méthode Ω" in Path("résultats/report.md").read_text(encoding="utf-8")

    @pytest.mark.parametrize("option", ["config", "methods", "output", "args"])
    def test_no_text(self, option, tmp_path, monkeypatch):
        """File systems of Linux take any bytes as a name."""
        name = os.fsdecode(b"caf\xe9.yaml")
        monkeypatch.setattr(Processes, "capture", lambda *_: pytest.fail("refused too late"))
        monkeypatch.chdir(tmp_path)
        given = {"config": "exp.yaml", "methods": ["a.yaml"], "output": "out"}
        value = name if option in ("config", "output") else [name]
        with pytest.raises(StudyError, match=r"'.*caf\\udce9.yaml' holds bytes that are not UTF-8") as info:
            compare.run(**{**given, option: value})
        str(info.value).encode()
        assert not Path("out").exists()

    def test_in_a_folder_whose_name_is_no_text(self, tmp_path, monkeypatch):
        folder = tmp_path / os.fsdecode(b"caf\xe9")
        folder.mkdir()
        monkeypatch.chdir(folder)
        with pytest.raises(StudyError, match="holds bytes that are not UTF-8"):
            compare.run("exp.yaml", ["a.yaml"], output="out")

    def test_lines_in_a_name(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(StudyError, match="control characters"):
            compare.run("exp.yaml", ["a\nb.yaml"], output="out")


class TestFolders:
    def test_file_in_place_of_a_run(self, study):
        run = study.get(NAME)
        shutil.rmtree(run.folder)
        run.folder.touch()
        with pytest.raises(StudyError, match=f"{run.folder} is a file, where .* move it away"):
            study.run()

    def test_file_in_place_of_all_runs(self, tmp_path, monkeypatch):
        study = Pretended(tmp_path, monkeypatch)
        study.run()
        shutil.rmtree(study.output / "runs")
        (study.output / "runs").touch()
        with pytest.raises(StudyError, match=f"{study.output / 'runs'} is a file"):
            study.run()

    def test_deleted_while_the_study_runs(self, tmp_path, monkeypatch):
        study = Pretended(tmp_path, monkeypatch)
        study.does["baseline-0: test"] = lambda run: shutil.rmtree(study.output)
        with pytest.warns(UserWarning, match=f"{study.output} was deleted while the study ran"):
            table = study.run()
        errors = {outcome.run.name: outcome.error for outcome in table.failures}
        assert len(errors) == 4
        assert errors["znorm-1"] == f"{study.get('znorm-1').config} is gone."
        assert not study.output.exists()

    def test_name_that_is_too_long(self, tmp_path, monkeypatch):
        with pytest.raises(StudyError, match="File name too long"):
            Pretended(tmp_path, monkeypatch).run(output="x" * 300)

    @pytest.mark.skipif(not Path("/proc/self").is_dir(), reason="a folder of Linux")
    def test_folder_that_nothing_can_be_made_in(self, tmp_path, monkeypatch):
        with pytest.raises(StudyError, match=r"^/proc/.*: "):
            Pretended(tmp_path, monkeypatch).run(output="/proc/study")


@pytest.mark.parametrize("clock", [-1e6, 1e6])
def test_clock_that_is_set_while_the_study_runs(clock, tmp_path, monkeypatch):
    study = Pretended(tmp_path, monkeypatch)
    real = time.time
    study.does["baseline-0: test"] = lambda run: monkeypatch.setattr(time, "time", lambda: real() + clock) or 1
    assert [outcome.run.name for outcome in study.run().failures] == ["baseline-0"]


def test_damage_has_a_path_wherever_it_is_told():
    import pickle

    error = DamagedError(Path("a/fit.json"), "it is empty")
    again = pickle.loads(pickle.dumps(error))  # as Ray sends it
    assert (str(again), again.path) == ("a/fit.json is damaged: it is empty.", Path("a/fit.json"))


def test_log_of_a_run_that_is_done_is_read_as_before(study):
    found = {(m.epoch, m.metric): m.value for m in read_run(study.get(NAME))}
    assert found[1, "train/loss"] == 0.5
    assert found[0, "val/accuracy"] == 0.5
