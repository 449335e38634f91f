"""The settings of runs: what a study adds, how they differ, and an experiment that has a gradient method itself."""

import sys
from pathlib import Path

import pytest
import yaml

import lightning_znorm
from lightning_znorm import GradientTransform
from lightning_znorm.compare.settings import (
    TRANSFORMS,
    changed_settings,
    check_experiment,
    gradient_callbacks,
    monitored_metric,
    run_config,
    same_settings,
    trial_config,
)
from lightning_znorm.compare.study import Run, Study, StudyError


def callback(class_path: str, /, **arguments) -> dict:
    return {"class_path": class_path, "init_args": arguments}


ZNORM = callback("lightning_znorm.ZNormCallback", eps=1e-10, min_ndim=0)
ZNORM_OF_MATRICES = callback("lightning_znorm.ZNormCallback", min_ndim=2)
CENTRALIZATION = callback("lightning_znorm.callbacks.GradientCentralizationCallback")
NOISE = callback("study_module.NoisyGradients")
STOPPING = callback("lightning.pytorch.callbacks.EarlyStopping", monitor="val/loss")


@pytest.fixture
def study(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    files = {
        "baseline": {},
        "znorm": {"callbacks+": ["ZNormCallback"]},
        "both": {"callbacks+": [{"class_path": "ZNormCallback"}, {"class_path": "study_module.NoisyGradients"}]},
        "replaces": {"callbacks": {"class_path": "lightning_znorm.ZNormCallback"}},
    }
    for name, trainer in files.items():
        Path(f"{name}.yaml").write_text(yaml.safe_dump({"trainer": trainer}))
    Path("exp.yaml").write_text("{model: {class_path: M}, trainer: {callbacks+: [ZNormCallback]}}")
    Path("plain.yaml").write_text("{model: {class_path: M}}")

    def make(*methods: str, experiment: str = "exp.yaml") -> Study:
        return Study((experiment,), tuple(f"{name}.yaml" for name in methods), (0,), tmp_path / "out")

    return make


def resolved(*callbacks: dict) -> dict:
    return {"trainer": {"callbacks": list(callbacks) or None}}


@pytest.mark.parametrize(
    ("methods", "settings"),
    [
        (["baseline", "znorm"], [resolved(ZNORM_OF_MATRICES), resolved(ZNORM_OF_MATRICES, ZNORM)]),
        (["znorm"], [resolved(STOPPING, ZNORM_OF_MATRICES, ZNORM)]),
        (["replaces", "baseline"], [resolved(ZNORM), resolved(ZNORM_OF_MATRICES)]),
    ],
)
def test_of_the_experiment(study, methods, settings):
    message = "exp.yaml adds ZNormCallback to every method, so that .* is not what .*: move ZNormCallback into a method"
    with pytest.raises(StudyError, match=message):
        check_experiment(study(*methods), dict(zip(methods, settings, strict=True)))


@pytest.mark.parametrize(("entry", "name"), [(CENTRALIZATION, "GradientCentralizationCallback"), (NOISE, "NoisyGradi")])
def test_of_an_option(study, entry, name):
    with pytest.raises(StudyError, match=f"An option of `fit` adds {name}.* to every method, so that znorm"):
        check_experiment(study("znorm", experiment="plain.yaml"), {"znorm": resolved(ZNORM, entry)})


@pytest.mark.parametrize(
    ("method", "settings"),
    [
        ("baseline", resolved()),
        ("baseline", resolved(STOPPING)),
        ("znorm", resolved(STOPPING, ZNORM)),
        ("both", resolved(STOPPING, ZNORM, NOISE)),
        ("replaces", resolved(ZNORM)),
    ],
)
def test_of_the_method_file(study, method, settings):
    check_experiment(study(method, experiment="plain.yaml"), {method: settings})


def test_methods_that_are_known_by_name():
    """Without an import of Lightning, which would take seconds."""
    found = (getattr(lightning_znorm, name) for name in lightning_znorm.__all__)
    assert sorted(TRANSFORMS) == sorted(kind.__name__ for kind in found if issubclass(kind, GradientTransform))


@pytest.mark.parametrize("known", [False, True])
def test_by_a_function(tmp_path, monkeypatch, known):
    """A callback's class path may be that of a function."""
    monkeypatch.chdir(tmp_path)  # from where the processes of the runs import too
    monkeypatch.delitem(sys.modules, "made", raising=False)
    if known:
        monkeypatch.syspath_prepend(str(tmp_path))
    before = list(sys.path)
    Path("made.py").write_text(
        "from lightning_znorm import ZNormCallback\n"
        "def znorm() -> ZNormCallback: return ZNormCallback()\n"
        "def elsewhere() -> 'Unimported': return ZNormCallback()\n"
        "def unknown(): return ZNormCallback()\n"
    )
    settings = resolved(callback("made.znorm"), callback("made.unknown"), callback("made.elsewhere"))
    assert [entry["class_path"] for entry in gradient_callbacks(settings)] == ["made.znorm"]
    assert sys.path == before


def test_same_settings():
    settings = {"a": resolved(), "b": resolved(ZNORM), "c": resolved(), "d": resolved(ZNORM_OF_MATRICES)}
    assert same_settings(settings) == [["a", "c"]]


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
        trainer = trial_config(run_config(given, Run("a", 0, tmp_path), None))["trainer"]
        assert (trainer["max_epochs"], trainer["max_steps"], trainer["limit_train_batches"]) == (1, -1, 1)
        assert trainer["val_check_interval"] == 1.0

    def test_monitored(self):
        assert monitored_metric(self.settings()) is None
        checkpoint = callback("lightning.pytorch.callbacks.ModelCheckpoint", monitor="val/dice", mode="max")
        stopping = callback("lightning.pytorch.callbacks.EarlyStopping", monitor="val/loss")
        assert monitored_metric(self.settings(callbacks=[stopping, checkpoint])) == ("val/dice", "max")
        assert monitored_metric(self.settings(callbacks=stopping)) is None

    def test_differences(self):
        one = {"a": {"b": 1, "c": [callback("X")]}, "d": None}
        other = {"a": {"b": 1, "c": [callback("X"), callback("Y", eps=2)]}, "d": 0}
        assert changed_settings(one, other) == [
            ("a.c[1].class_path", "-", "Y"),
            ("a.c[1].init_args.eps", "-", "2"),
            ("d", "None", "0"),
        ]
        assert changed_settings(one, one) == []
