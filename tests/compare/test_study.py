"""What a study refuses, and how the settings of its runs come about: without a run."""

import json
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml
from samples import FIT

from lightning_znorm import compare
from lightning_znorm.cli import main
from lightning_znorm.compare import prepare
from lightning_znorm.compare.conduct import Means, _devices, _typed
from lightning_znorm.compare.locks import locked
from lightning_znorm.compare.metrics import at_stage, choose, stage, train_loss
from lightning_znorm.compare.pool import environments
from lightning_znorm.compare.process import Processes
from lightning_znorm.compare.run_config import probe_config, run_config
from lightning_znorm.compare.settings import differences, monitored
from lightning_znorm.compare.study import Run, Study, StudyError, parse_timeout


def study(**changes) -> Study:
    arguments = {
        "configs": ("exp.yaml",),
        "methods": ("a/one.yaml", "a/two.yaml"),
        "seeds": (0, 1),
        "output": Path("out"),
    }
    return Study(**{**arguments, **changes})


def refusal(*args: str) -> str:
    """The sentence with which a command is refused."""
    with pytest.raises(SystemExit) as exit_info:
        main(["compare", *args])
    assert isinstance(exit_info.value.code, str)
    assert exit_info.value.code.startswith("error: ")
    return exit_info.value.code


def callback(class_path: str, /, **arguments) -> dict:
    return {"class_path": class_path, "init_args": arguments}


class TestStudy:
    def test_runs(self):
        assert [run.name for run in study().runs] == ["one-0", "two-0", "one-1", "two-1"]
        assert study().runs[1].folder == Path("out/runs/two-0")

    def test_by_hand(self):
        args = study(args=("--trainer.max_epochs", "2")).fit_args("two")
        assert args == ["fit", "--config", "exp.yaml", "--config", "a/two.yaml", "--trainer.max_epochs", "2"]

    @pytest.mark.parametrize(
        ("changes", "message"),
        [
            ({"methods": ("a/one.yaml", "b/one.yaml")}, "Two methods are named one, a/one.yaml and b/one.yaml"),
            ({"methods": ()}, "at least one method"),
            ({"seeds": ()}, "one seed"),
            ({"seeds": (1, 1)}, "Seed 1 is named twice"),
            ({"seeds": (-1,)}, "got -1"),
            ({"mode": "most"}, "mode is min or max, got most"),
            ({"args": ("--seed_everything=3",)}, "--seed_everything cannot be .* name --seeds instead"),
            ({"args": ("--ckpt_path", "x")}, "--ckpt_path cannot be"),
            ({"args": ("--trainer.fast_dev_run", "1")}, "--trainer.fast_dev_run cannot be"),
        ],
    )
    def test_refused(self, changes, message):
        with pytest.raises(StudyError, match=message):
            study(**changes)


class TestCommandLine:
    def test_refused_at_once(self, tmp_path):
        command = ["--config", "x", "--methods", "a/one.yaml", "--output", str(tmp_path / "out")]
        assert "Two methods are named one" in refusal(*command, "--methods", "a/one.yaml", "b/one.yaml")
        assert "at least 1: 0" in refusal(*command, "--jobs", "0")
        assert "--gpus is what each run takes of a Ray cluster, 0 or more: -1" in refusal(*command, "--gpus", "-1")
        for time in ("0", "-5", "nan", "inf", "1e3", "soon", "2 hours", "5x", "", "1h30m"):
            assert f"and more than 0: {time}." in refusal(*command, f"--timeout={time}")
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("typed", "seconds"),
        [("90", 90), ("90s", 90), ("0.5m", 30), (" 2h ", 7200), ("1d", 86400), (".5", 0.5), (7, 7), (2.5, 2.5)],
    )
    def test_timeout(self, typed, seconds):
        assert parse_timeout(typed) == seconds

    @pytest.mark.parametrize("value", [0, -1.0, float("nan"), float("inf"), True, "many"])
    def test_no_timeout(self, value):
        with pytest.raises(StudyError, match="--timeout is a time such as 90"):
            compare.run("exp.yaml", ["a.yaml"], output="out", timeout=value)

    def test_timeout_is_of_each_run(self):
        assert [run.timeout for run in study(timeout=5.0).runs] == [5.0] * 4
        assert study(timeout=5.0).runs == study().runs  # whose runs are the same, with more time

    def test_what_was_typed(self, tmp_path, monkeypatch):
        """The report's command starts the same study in the same way."""
        monkeypatch.chdir(tmp_path)
        asked = study(output=tmp_path / "out", metric="test/f1", mode="max", args=("--trainer.max_epochs", "2"))
        common = (
            "python -m lightning_znorm compare --config exp.yaml --methods a/one.yaml a/two.yaml --seeds 0 1 "
            "--output out --metric test/f1 --mode max"
        )
        assert _typed(asked, Means()) == f"{common} --trainer.max_epochs 2"
        assert _typed(asked, Means(jobs=2)) == f"{common} --jobs 2 --trainer.max_epochs 2"
        patient = study(output=tmp_path / "out", timeout=5400.0)
        assert _typed(patient, Means()).endswith("--output out --timeout 5400")
        ray = Means(ray="auto", cpus=2, gpus=0.5)
        assert _typed(asked, ray) == f"{common} --ray auto --cpus 2 --gpus 0.5 --trainer.max_epochs 2"

    def test_output_in_use(self, tmp_path):
        command = ["--config", "x", "--methods", "a/one.yaml", "--output", str(tmp_path / "out")]
        with locked(tmp_path / "out" / ".lock"):
            assert "is in use by another study (process " in refusal(*command)

    def test_output_of_something_else(self, tmp_path):
        (tmp_path / "letter.txt").touch()
        command = ["--config", "x", "--methods", "a/one.yaml", "--output"]
        assert "is not empty, and holds no study" in refusal(*command, str(tmp_path))
        assert "letter.txt is a file" in refusal(*command, str(tmp_path / "letter.txt"))

    def test_missing_files(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        znorm = "configs/methods/znorm.yaml"
        assert "No config file mine.yaml" in refusal("--config", "mine.yaml", "--methods", znorm, "--output", "out")
        command = ["--config", "configs/digits/resnet20.yaml", "--output", "out"]
        message = refusal(*command, "--methods", "configs/methods/znrom.yaml")
        assert "`fit` refuses the settings of znrom. No config file configs/methods/znrom.yaml" in message
        assert f"did you mean {znorm}" in message

    def test_help(self, capsys):
        with pytest.raises(SystemExit) as exit_info:
            main(["compare", "--help"])
        assert exit_info.value.code == 0
        out = capsys.readouterr().out
        for option in ("methods", "seeds", "output", "metric", "mode", "jobs", "timeout", "dry-run", "ray"):
            assert f"--{option}" in out


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
        assert choose(asked, mode, monitor, self.NAMES) == chosen

    def test_names_that_training_and_test_share(self):
        """A test's metric is told from training's of the same name by a stage."""
        chosen = choose(None, None, ("accuracy", "max"), ["accuracy", "test/accuracy", "loss"])
        assert chosen == ("test/accuracy", "max")
        assert choose("test/accuracy", None, ("accuracy", "max"), ["test/accuracy"]) == ("test/accuracy", "max")

    def test_monitor_without_a_test(self):
        assert choose(None, None, ("val/dice", "max"), ["val/dice"]) == ("val/dice", "max")

    def test_refused(self):
        with pytest.raises(
            StudyError, match=r"--metric test/f1: nothing logs it\. The experiment logs test/dice, test/loss"
        ):
            choose("test/f1", "max", None, self.NAMES)
        with pytest.raises(StudyError, match="--metric test/time: add --mode max"):
            choose("test/time", None, ("val/dice", "max"), self.NAMES)
        with pytest.raises(StudyError, match="add --metric NAME --mode"):
            choose(None, None, None, self.NAMES)

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


class TestSettings:
    def settings(self, **trainer) -> dict:
        return {
            "trainer": {"logger": None, "callbacks": None, **trainer},
            "model": {"class_path": "M"},
            "ckpt_path": None,
        }

    def test_what_a_study_adds(self, tmp_path):
        run = Run("znorm", 7, tmp_path)
        given = self.settings(callbacks=[callback("lightning_znorm.ZNormCallback", eps=1)])
        config = run_config(given, run, ("val/dice", "max"))
        names = [entry["class_path"].rpartition(".")[2] for entry in config["trainer"]["callbacks"]]
        # The recorder sees gradients before the method; the state of the best checkpoint is in the last.
        assert names == ["Recorder", "ZNormCallback", "BestCheckpoint", "LastCheckpoint"]
        assert config["seed_everything"] == 7
        assert config["trainer"]["callbacks"][1]["init_args"] == {"eps": 1}
        assert config["trainer"]["logger"][-1]["init_args"] == {
            "save_dir": str(tmp_path / "logs"),
            "name": "",
            "version": None,
        }
        assert given == self.settings(callbacks=[callback("lightning_znorm.ZNormCallback", eps=1)])

    def test_what_makes_way(self, tmp_path):
        kept = callback("my.PatientCheckpoint", dirpath="x")
        bars = [callback("lightning.pytorch.callbacks.RichProgressBar"), callback("my.ProgressBar")]
        checkpoint = callback("lightning.pytorch.callbacks.ModelCheckpoint", monitor="val/loss")
        last = callback("lightning_znorm.LastCheckpoint", dirpath="mine")
        given = self.settings(callbacks=[*bars, kept, last, checkpoint], enable_checkpointing=False)
        config = run_config(given, Run("a", 0, tmp_path), None)
        names = [entry["class_path"].rpartition(".")[2] for entry in config["trainer"]["callbacks"]]
        assert names == ["Recorder", "PatientCheckpoint", "LastCheckpoint"]
        assert config["trainer"]["callbacks"][-1]["init_args"]["dirpath"] == str(tmp_path / "checkpoints")
        assert config["trainer"]["enable_checkpointing"]

    @pytest.mark.parametrize("logger", [None, True, False, callback("CSVLogger", save_dir="logs", version=3), []])
    def test_one_csv_logger(self, logger, tmp_path):
        config = run_config(self.settings(logger=logger), Run("a", 0, tmp_path), None)
        assert [entry["class_path"] for entry in config["trainer"]["logger"]] == ["lightning.pytorch.loggers.CSVLogger"]

    def test_other_loggers_come_first(self, tmp_path):
        tensorboard = callback("TensorBoardLogger", save_dir="logs", name="mine")
        for logger in (tensorboard, [tensorboard]):
            loggers = run_config(self.settings(logger=logger), Run("a", 0, tmp_path), None)["trainer"]["logger"]
            assert loggers[0] == callback("TensorBoardLogger", save_dir=str(tmp_path / "logs"), name="mine")
            assert loggers[1]["class_path"].endswith("CSVLogger")

    def test_a_try_is_short(self, tmp_path):
        given = self.settings(max_steps=1000, val_check_interval=500)
        trainer = probe_config(run_config(given, Run("a", 0, tmp_path), None))["trainer"]
        assert (trainer["max_epochs"], trainer["max_steps"], trainer["limit_train_batches"]) == (1, -1, 1)
        assert trainer["val_check_interval"] == 1.0

    def test_monitored(self):
        assert monitored(self.settings()) is None
        checkpoint = callback("lightning.pytorch.callbacks.ModelCheckpoint", monitor="val/dice", mode="max")
        stopping = callback("lightning.pytorch.callbacks.EarlyStopping", monitor="val/loss")
        assert monitored(self.settings(callbacks=[stopping, checkpoint])) == ("val/dice", "max")
        assert monitored(self.settings(callbacks=stopping)) is None

    def test_differences(self):
        one = {"a": {"b": 1, "c": [callback("X")]}, "d": None}
        other = {"a": {"b": 1, "c": [callback("X"), callback("Y", eps=2)]}, "d": 0}
        assert differences(one, other) == [
            ("a.c[1].class_path", "-", "Y"),
            ("a.c[1].init_args.eps", "-", "2"),
            ("d", "None", "0"),
        ]
        assert differences(one, one) == []


class TestSharingAMachine:
    def test_alone(self):
        assert environments(1, 1, ["0", "1"]) == [{}]

    def test_a_gpu_each(self, monkeypatch):
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        assert [e["CUDA_VISIBLE_DEVICES"] for e in environments(4, 1, ["0", "1"])] == ["0", "1", "0", "1"]
        assert [e["CUDA_VISIBLE_DEVICES"] for e in environments(2, 2, ["4", "5", "6", "7"])] == ["4,5", "6,7"]
        assert environments(2, 1, []) == [{}, {}]
        assert environments(2, None, ["0", "1"]) == [{}, {}]

    @pytest.mark.parametrize(
        ("asked", "devices"),
        [("auto", 1), (-1, 1), (2, 2), ("2", 2), ([1], None), ("0,1", None), ("3,", None)],
    )
    def test_devices_that_the_experiment_asks_for(self, asked, devices, tmp_path):
        settings = {"baseline": {"trainer": {"devices": "auto"}}, "znorm": {"trainer": {"devices": asked}}}
        plan = prepare.Plan(study(output=tmp_path), settings, None, "test/loss", "min", [])
        assert _devices(plan) == devices

    def test_cores_are_shared(self, monkeypatch):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        monkeypatch.setattr("lightning_znorm.compare.pool.cores", lambda: 8)
        assert environments(3, 1, []) == [{"OMP_NUM_THREADS": "2"}] * 3
        assert environments(16, 1, [])[0] == {"OMP_NUM_THREADS": "1"}

    def test_visible_gpus(self, monkeypatch):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
        assert [e["CUDA_VISIBLE_DEVICES"] for e in environments(2, 1)] == ["3", "5"]


class TestPreparation:
    """What a study writes down before its first run; the processes that it asks are stood in for."""

    @pytest.fixture
    def prepared(self, tmp_path, monkeypatch):
        def prepare_with(settings: str, **changes):
            monkeypatch.setattr(Processes, "capture", lambda self, args: (0, settings, ""))
            monkeypatch.setattr(prepare, "_probe", self.probe)
            (tmp_path / "out").mkdir(exist_ok=True)
            return prepare.prepare(study(output=tmp_path / "out", **changes), Processes(), 1)

        self.probed: list[str] = []
        return prepare_with

    def probe(self, study, settings, *rest) -> set[str]:
        self.probed += settings
        return {"train/loss", "val/dice", "test/dice", "test/loss"}

    PLAIN = "{trainer: {callbacks: null}, seed_everything: 5}"

    def test_best_checkpoint_without_a_model_checkpoint(self, prepared):
        plan = prepared(self.PLAIN, metric="test/dice", mode="max")
        assert (plan.metric, plan.mode, plan.monitor) == ("test/dice", "max", ("val/dice", "max"))
        best = yaml.safe_load(plan.study.runs[0].config.read_text())["trainer"]["callbacks"][-2]
        assert best["init_args"]["monitor"] == "val/dice"
        with pytest.raises(StudyError, match=r"chosen by \['val/dice', 'max'\], and now it would be None"):
            prepared(self.PLAIN, metric="test/loss")

    def test_no_validation_of_the_same_name(self, prepared):
        plan = prepared(self.PLAIN, metric="test/loss")
        assert plan.monitor is None
        assert "BestCheckpoint" not in plan.study.runs[0].config.read_text()

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
        plan = prepared(self.PLAIN, metric="test/loss")
        run = plan.study.runs[0]
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
        no_gradients = patch("lightning_znorm.compare.gradient_setup._transforms_gradients", lambda entry: False)
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
            prepare.prepare(study(output=tmp_path), Processes(), 1)

    @pytest.mark.parametrize(
        ("code", "message"),
        [
            (-9, "a/one.yaml: in a first try at one batch, fit was ended by SIGKILL, as the system does when memory"),
            (0, "a/one.yaml: in a first try at one batch, fit ended before it was done, with exit code 0 and without "),
            (1, r"a/one.yaml: in a first try at one batch, fit ended with exit code 1\. it broke$"),
        ],
    )
    def test_try_that_does_not_end_well(self, code, message, tmp_path, monkeypatch):
        def run(self, args, log):
            log.write_text("$ python -m lightning_znorm fit\nerror: it broke\n" if code == 1 else "")
            return code

        monkeypatch.setattr(Processes, "capture", lambda self, args: (0, TestPreparation.PLAIN, ""))
        monkeypatch.setattr(Processes, "run", run)
        with pytest.raises(StudyError, match=f"^{message}"):
            prepare.prepare(study(output=tmp_path), Processes(), 1)
        assert [path.name for path in tmp_path.iterdir()] == []

    def test_fast_dev_run(self, prepared):
        with pytest.raises(StudyError, match="fast_dev_run keeps no logs"):
            prepared("{trainer: {callbacks: null, fast_dev_run: true}}")
