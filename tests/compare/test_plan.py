"""How a study is validated before its first run, and what it writes down: without a run."""

import json
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml
from samples import FIT

from lightning_znorm.compare import plan
from lightning_znorm.compare.plan import choose_metric
from lightning_znorm.compare.processes import Processes
from lightning_znorm.compare.results import at_stage, stage, train_loss
from lightning_znorm.compare.study import Study, StudyError


def study(**changes) -> Study:
    arguments = {
        "configs": ("exp.yaml",),
        "methods": ("a/one.yaml", "a/two.yaml"),
        "seeds": (0, 1),
        "output": Path("out"),
    }
    return Study(**{**arguments, **changes})


def callback(class_path: str, /, **arguments) -> dict:
    return {"class_path": class_path, "init_args": arguments}


class TestMetrics:
    NAMES = ("train/loss", "val/loss", "val/dice", "test/dice", "test/loss", "test/time")

    @pytest.mark.parametrize(
        ("asked", "mode", "monitor", "chosen"),
        [
            (None, None, ("val/dice", "max"), ("test/dice", "max")),
            (None, None, ("train/loss", "min"), ("test/loss", "min")),
            ("test/dice", "max", None, ("test/dice", "max")),
            ("test/dice", None, ("val/dice", "max"), ("test/dice", "max")),
            ("test/loss", None, None, ("test/loss", "min")),
            ("test/dice", "min", ("val/dice", "max"), ("test/dice", "min")),
        ],
    )
    def test_chosen(self, asked, mode, monitor, chosen):
        assert choose_metric(asked, mode, monitor, self.NAMES) == chosen

    def test_names_that_training_and_test_share(self):
        """A test's metric is told from training's of the same name by a stage."""
        chosen = choose_metric(None, None, ("accuracy", "max"), ["accuracy", "test/accuracy", "loss"])
        assert chosen == ("test/accuracy", "max")
        assert choose_metric("test/accuracy", None, ("accuracy", "max"), ["test/accuracy"]) == ("test/accuracy", "max")

    def test_monitor_without_a_test(self):
        assert choose_metric(None, None, ("val/dice", "max"), ["val/dice"]) == ("val/dice", "max")

    def test_refused(self):
        with pytest.raises(
            StudyError, match=r"--metric test/f1: nothing logs it\. The experiment logs test/dice, test/loss"
        ):
            choose_metric("test/f1", "max", None, self.NAMES)
        with pytest.raises(StudyError, match="--metric test/time: add --mode max"):
            choose_metric("test/time", None, ("val/dice", "max"), self.NAMES)
        with pytest.raises(StudyError, match="add --metric NAME --mode"):
            choose_metric(None, None, None, self.NAMES)

    def test_names(self):
        assert [stage(name) for name in ("val_acc", "valid/acc", "test-loss", "train.loss", "loss")] == [
            "val",
            "val",
            "test",
            "train",
            None,
        ]
        assert at_stage("val_acc", "test", ["test_acc"]) == "test_acc"
        assert train_loss(["val_loss", "train_loss_step", "train_loss_epoch"]) == "train_loss_epoch"
        assert train_loss(["val_loss", "loss"]) == "loss"
        assert train_loss(["val_loss"]) is None


class TestPreparation:
    """What a study writes down before its first run; the processes that it asks are stood in for."""

    @pytest.fixture
    def prepared(self, tmp_path, monkeypatch):
        def prepare_with(settings: str, **changes):
            monkeypatch.setattr(Processes, "capture", lambda self, args: (0, settings, ""))
            monkeypatch.setattr(plan, "try_methods", self.probe)
            (tmp_path / "out").mkdir(exist_ok=True)
            return plan.make_plan(study(output=tmp_path / "out", **changes), Processes(), 1)

        self.probed: list[str] = []
        return prepare_with

    def probe(self, study, settings, *rest) -> set[str]:
        self.probed += settings
        return {"train/loss", "val/dice", "test/dice", "test/loss"}

    PLAIN = "{trainer: {callbacks: null}, seed_everything: 5}"

    def test_best_checkpoint_without_a_model_checkpoint(self, prepared):
        planned = prepared(self.PLAIN, metric="test/dice", mode="max")
        assert (planned.metric, planned.mode, planned.monitor) == ("test/dice", "max", ("val/dice", "max"))
        best = yaml.safe_load(planned.study.runs[0].config.read_text())["trainer"]["callbacks"][-2]
        assert best["init_args"]["monitor"] == "val/dice"
        with pytest.raises(StudyError, match=r"chosen by \['val/dice', 'max'\], and now it would be None"):
            prepared(self.PLAIN, metric="test/loss")

    def test_no_validation_of_the_same_name(self, prepared):
        planned = prepared(self.PLAIN, metric="test/loss")
        assert planned.monitor is None
        assert "BestCheckpoint" not in planned.study.runs[0].config.read_text()

    def test_methods_and_seeds_may_be_added(self, prepared):
        prepared(self.PLAIN, metric="test/loss", methods=("a/one.yaml",))
        prepared(self.PLAIN, metric="test/loss", seeds=(0, 1, 2))
        assert self.probed == ["one", "two"]

    def test_changed_settings(self, prepared):
        prepared(self.PLAIN, metric="test/loss")
        prepared(self.PLAIN.replace("5", "6"), metric="test/loss")  # the study's seeds are its own
        with pytest.raises(StudyError, match=r"runs of one with other settings \(trainer.max_epochs was - and is 3\)"):
            prepared("{trainer: {callbacks: null, max_epochs: 3}}", metric="test/loss")

    def test_settings_of_done_runs_stay(self, prepared):
        planned = prepared(self.PLAIN, metric="test/loss")
        run = planned.study.runs[0]
        run.config.write_text("{}")
        run.fit_file.write_text(json.dumps(FIT | {"logged_epochs": [], "logged_numbers": 0}))
        tested = {"path": str(run.last), "epoch": 0, "monitor": None, "value": None}
        run.test_file.write_text(json.dumps({"checkpoint": tested, "metrics": {}}))
        prepared(self.PLAIN, metric="test/loss")
        assert run.config.read_text() == "{}"

    def test_callbacks_that_make_way_may_change(self, prepared):
        """Of a study that was begun when experiments had ``save_last: true``."""
        bar, kept = callback("my.ProgressBar"), callback("my.Own")
        before = callback("lightning.pytorch.callbacks.ModelCheckpoint", monitor="val/dice", mode="max", save_last=True)
        after = [
            callback("lightning.pytorch.callbacks.ModelCheckpoint", monitor="val/dice", mode="max", save_last=None),
            callback("lightning_znorm.LastCheckpoint", dirpath=None),
        ]
        no_gradients = patch("lightning_znorm.compare.settings._transforms_gradients", lambda entry: False)
        with no_gradients:
            prepared(yaml.safe_dump({"trainer": {"callbacks": [before, bar, kept]}}))
            prepared(yaml.safe_dump({"trainer": {"callbacks": [kept, *after]}}))
            with pytest.raises(StudyError, match=r"callbacks\[0\].class_path was my.Own and is my.Other"):
                prepared(yaml.safe_dump({"trainer": {"callbacks": [callback("my.Other"), *after]}}))

    def test_gradient_method_in_the_experiment(self, prepared, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        Path("a").mkdir()
        for name in ("exp.yaml", "a/one.yaml", "a/two.yaml"):
            Path(name).write_text("trainer: {callbacks+: [ZNormCallback]}" if name != "a/one.yaml" else "trainer: {}")
        znorm = callback("lightning_znorm.ZNormCallback", min_ndim=2)
        with pytest.raises(
            StudyError, match=r"exp.yaml adds ZNormCallback to every method, so that one is not what a/"
        ):
            prepared(yaml.safe_dump({"trainer": {"callbacks": [znorm]}}))
        assert self.probed == []
        assert list((tmp_path / "out").iterdir()) == []

    def test_nothing_is_written_for_a_metric_that_nothing_logs(self, prepared, tmp_path):
        with pytest.raises(StudyError, match="--metric test/f1: nothing logs it"):
            prepared(self.PLAIN, metric="test/f1", mode="max")
        assert list((tmp_path / "out").iterdir()) == []

    def test_nothing_of_others_is_touched(self, prepared, tmp_path):
        (tmp_path / "out" / "runs").mkdir(parents=True)
        (tmp_path / "out" / "runs" / "letter.txt").touch()
        with pytest.raises(StudyError, match="is not empty, and holds no study"):
            prepared(self.PLAIN, metric="test/loss")
        assert (tmp_path / "out" / "runs" / "letter.txt").exists()

    @pytest.mark.parametrize(
        ("code", "out", "message"),
        [
            (-9, "", "`fit`, which was asked for the settings of one, was ended by SIGKILL, as the system does when"),
            (1, "", "`fit` refuses the settings of one. the reason"),
            (0, "hello\n{trainer: {}}", "`fit --print_config` has printed more than the settings of one, or something"),
            (0, "", "`fit --print_config` has printed more"),
            (0, "[trainer: {", "`fit --print_config` has printed more"),
            (0, "trainer: 3", "`fit --print_config` has printed more"),
        ],
    )
    def test_settings_that_do_not_come(self, code, out, message, tmp_path, monkeypatch):
        monkeypatch.setattr(Processes, "capture", lambda self, args: (code, out, "error: the reason" if code else ""))
        with pytest.raises(StudyError, match=f"^{message}"):
            plan.make_plan(study(output=tmp_path), Processes(), 1)

    @pytest.mark.parametrize(
        ("code", "message"),
        [
            (-9, "a/one.yaml: in a first try at one batch, fit was ended by SIGKILL, as the system does when memory"),
            (0, "a/one.yaml: in a first try at one batch, fit ended before it was done, with exit code 0 and without "),
            (1, r"a/one.yaml: in a first try at one batch, fit ended with exit code 1\. it broke$"),
        ],
    )
    def test_try_that_does_not_end_well(self, code, message, tmp_path, monkeypatch):
        def run(self, args, log, *rest):
            log.write_text("$ python -m lightning_znorm fit\nerror: it broke\n" if code == 1 else "")
            return code

        monkeypatch.setattr(Processes, "capture", lambda self, args: (0, TestPreparation.PLAIN, ""))
        monkeypatch.setattr(Processes, "run", run)
        with pytest.raises(StudyError, match=f"^{message}"):
            plan.make_plan(study(output=tmp_path), Processes(), 1)
        assert [path.name for path in tmp_path.iterdir()] == []

    def test_fast_dev_run(self, prepared):
        with pytest.raises(StudyError, match="fast_dev_run keeps no logs"):
            prepared("{trainer: {callbacks: null, fast_dev_run: true}}")
