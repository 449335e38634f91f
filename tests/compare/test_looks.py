"""A study has one test, at the first look: what later commands under the same folder say."""

import errno
import json

import pytest
from pretended import Pretended

from lightning_znorm.cli import main
from lightning_znorm.compare import plan

GAINS = {0: 0.001, 1: 0.002, 2: 0.0, 3: 0.003, 4: 0.001}
BETTER = "Better: p < 0.001 with 3 seeds."
ADDED = "Exploratory, no verdict: seeds were added after a first look at seeds 0, 1, 2."
CHECKPOINT = "{class_path: lightning.pytorch.callbacks.ModelCheckpoint, init_args: {monitor: val/accuracy, mode: max}}"


@pytest.fixture
def study(tmp_path, monkeypatch) -> Pretended:
    """A study that has not begun."""
    pretended = Pretended(tmp_path, monkeypatch)
    pretended.gains = GAINS
    return pretended


def verdict(study: Pretended, **options: object) -> str:
    """The verdict on znorm, in the table and in both reports."""
    said = study.run(**{"seeds": (0, 1, 2), **options}).row("znorm").verdict
    for name in ("report.md", "report.html"):
        text = (study.output / name).read_text().replace("&lt;", "<").replace("\\<", "<")
        assert said in text
        assert ("A test counts only at the first look" in text) == said.startswith("Exploratory")
    return said


def first_look(study: Pretended) -> dict | None:
    return json.loads((study.output / "study.json").read_text())["first_look"]


def forget(study: Pretended) -> None:
    """Make of the record one that an older version wrote."""
    path = study.output / "study.json"
    record = json.loads(path.read_text())
    del record["first_look"]
    path.write_text(json.dumps(record))


def test_the_same_command_says_the_same(study):
    assert verdict(study) == BETTER
    written = (study.output / "study.json").stat().st_mtime_ns
    assert first_look(study) == {"metric": "test/accuracy", "seeds": [0, 1, 2], "methods": ["baseline", "znorm"]}
    assert verdict(study, seeds=(2, 0, 1)) == BETTER
    assert (study.output / "study.json").stat().st_mtime_ns == written


def test_more_seeds_are_exploratory(study, capsys):
    assert verdict(study) == BETTER
    assert verdict(study, seeds=(0, 1, 2, 3)) == ADDED
    capsys.readouterr()
    options = "--metric test/accuracy --mode max --seeds 0 1 2 3 4 --output out"
    main(["compare", "--config", "exp.yaml", "--methods", "baseline.yaml", "znorm.yaml", *options.split()])
    printed = next(line for line in capsys.readouterr().out.splitlines() if line.startswith("znorm "))
    assert printed.endswith(f")  {ADDED}")
    assert "+0.0514 (+0.0500 to +0.0528)" in printed
    assert verdict(study) == BETTER  # the first look is still there


def test_fewer_seeds_are_exploratory(study):
    verdict(study)
    assert verdict(study, seeds=(0, 1)) == ADDED.replace("added", "changed")


def test_one_seed_is_no_look(study):
    """It has no interval, so nothing could have been told."""
    assert verdict(study, seeds=(0,)) == "One seed cannot tell a difference from chance."
    assert first_look(study) is None
    assert verdict(study) == BETTER


def test_another_metric_is_exploratory(study):
    study.settings = study.settings.replace("callbacks: null", f"callbacks: [{CHECKPOINT}]")
    assert verdict(study) == BETTER
    assert verdict(study, metric="val/accuracy") == (
        "Exploratory, no verdict: the first look was at another metric, test/accuracy."
    )


def test_methods_may_be_added_but_not_left_out(study, tmp_path):
    (tmp_path / "znorm2.yaml").write_text("trainer: {}")
    all_methods = ["baseline.yaml", "znorm.yaml", "znorm2.yaml"]
    verdict(study)
    assert verdict(study, methods=all_methods) == "Better: adjusted p < 0.001 with 3 seeds."
    assert first_look(study)["methods"] == ["baseline", "znorm", "znorm2"]
    assert verdict(study) == "Exploratory, no verdict: methods were left out after the first look: znorm2."
    table = study.run(seeds=(0, 1, 2), methods=all_methods[::-1])
    assert "methods were compared with baseline at the first look" in table.row("znorm").verdict


def test_a_run_that_failed_and_is_repeated_is_the_planned_study(study):
    """It has no verdict before, so there is one test."""
    study.does["znorm-1: fit"] = lambda run: 1
    assert verdict(study) == "2 of 3 seeds are done under both methods: no verdict before all are."
    assert first_look(study)["seeds"] == [0, 1, 2]
    # Who is content with the seeds that are done has seen their numbers.
    assert verdict(study, seeds=(0, 2)) == ADDED.replace("added", "changed")
    study.does.clear()
    assert verdict(study) == BETTER


class TestOlderVersions:
    """They did not record the first look, and had a verdict on whatever was done."""

    def test_the_same_seeds(self, study):
        verdict(study)
        forget(study)
        assert verdict(study) == BETTER

    def test_more_seeds(self, study):
        verdict(study)
        forget(study)
        study.does["baseline-4: fit"] = interrupt
        with pytest.raises(KeyboardInterrupt):
            study.run(seeds=(0, 1, 2, 3, 4))
        study.does.clear()
        assert verdict(study, seeds=(0, 1, 2, 3, 4)) == ADDED
        assert first_look(study) == {"metric": None, "seeds": [0, 1, 2], "methods": []}

    def test_without_a_report_there_was_no_look(self, study):
        verdict(study)
        forget(study)
        for name in ("report.md", "report.html", "results.csv"):
            (study.output / name).unlink()
        assert verdict(study, seeds=(0, 1, 2, 3)).startswith("Better: p < 0.001 with 4 seeds.")

    def test_a_record_that_was_lost_before_the_first_report(self, study):
        study.does["baseline-1: fit"] = interrupt
        with pytest.raises(KeyboardInterrupt):
            study.run(seeds=(0, 1, 2))
        (study.output / "study.json").unlink()
        study.does.clear()
        assert verdict(study) == BETTER


class TestNothingCanBeWritten:
    @pytest.fixture
    def full(self, study, monkeypatch):
        """A study that is done, and whose record cannot be written any more."""
        verdict(study)

        def refuse(path, content):
            raise OSError(errno.EROFS, "Read-only file system", str(path))

        monkeypatch.setattr(plan, "write_json", refuse)
        return study

    def test_a_study_that_is_done_is_read(self, full):
        assert verdict(full) == BETTER

    def test_also_one_of_an_older_version(self, full):
        forget(full)
        assert verdict(full) == BETTER
        assert verdict(full, seeds=(0, 1)) == ADDED.replace("added", "changed")

    def test_a_look_that_cannot_be_recorded_is_said(self, full, study):
        path = study.output / "study.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "first_look": None}))
        with pytest.warns(UserWarning, match=r"study.json: Read-only file system"):
            assert verdict(full) == "No verdict yet: this first look could not be written down."


def interrupt(run) -> int:
    raise KeyboardInterrupt
