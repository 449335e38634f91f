"""What `test`, `validate` and `predict` take from the command, and what from the checkpoint."""

import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_znorm.cli import main
from lightning_znorm.cli.checkpoints import changed_data, check_names, overridden_settings
from tests.medical import write_mask_folder

pytestmark = pytest.mark.filterwarnings("ignore:The dirpath has changed")
DICE = {"class_path": "lightning_znorm.metrics.DiceScore"}
PATIENTS = {"class_path": "lightning_znorm.metrics.PatientDiceScore"}
WINDOWS = {"class_path": "monai.inferers.SlidingWindowInferer", "init_args": {"roi_size": [16, 16]}}


def write(name: str, **init_args: Any) -> list[str]:
    Path(name).write_text(yaml.safe_dump({"model": {"init_args": init_args}}))
    return ["--config", name]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train once, with two metrics and a threshold of its own, and return the folder."""
    folder = tmp_path_factory.mktemp("trained")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        write_mask_folder(folder / "nuclei")
        network = {
            "class_path": "torch.nn.Conv2d",
            "init_args": {"in_channels": 3, "out_channels": 3, "kernel_size": 1},
        }
        model = {"model": network, "num_classes": 3, "activation": "softmax"}
        values = {0: 0, 128: 1, 255: 2}
        data = {"root": "nuclei", "mask_values": values, "val_fraction": 0.2, "test_fraction": 0.2, "batch_size": 4}
        logger = {"class_path": "CSVLogger", "init_args": {"save_dir": "logs", "name": "own"}}
        trainer = {"max_epochs": 1, "accelerator": "cpu", "log_every_n_steps": 1, "enable_progress_bar": False}
        experiment = {
            "model": {"class_path": "SegmentationTask", "init_args": model},
            "data": {"class_path": "MaskFolderDataModule", "init_args": {**data, "patient_pattern": "^([^_]+)_"}},
            "trainer": {**trainer, "logger": logger},
        }
        Path("own.yaml").write_text(yaml.safe_dump(experiment))
        choice = write("trained.yaml", metrics={"mine": DICE, "patients": PATIENTS}, size_divisor=16)
        main(["fit", "--config", "own.yaml", *choice])
        next(folder.rglob("logs/**/*.ckpt")).rename("best.ckpt")
    return folder


@pytest.fixture
def experiment(trained: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(trained)
    return ["--config", "own.yaml"]


def used(command: str, flags: list[str]) -> dict[str, Any]:
    """Run a command without any note, and return the settings of the model that it ran with."""
    before = {*Path("logs").rglob("config.yaml")}
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*best.ckpt.*")
        main([command, *flags, "--ckpt_path", "best.ckpt"])
    (written,) = {*Path("logs").rglob("config.yaml")} - before
    return yaml.safe_load(written.read_text())["model"]["init_args"]


class TestFromTheCommand:
    def test_other_metrics(self, experiment: list[str], capsys: pytest.CaptureFixture[str]):
        main(["test", *experiment, *write("other.yaml", metrics={"other": DICE}), "--ckpt_path", "best.ckpt"])
        out = capsys.readouterr().out
        assert "test/other" in out
        assert "test/mine" not in out
        assert "test/patients " not in out

    def test_metrics_of_one_name(self, experiment: list[str]):
        """The arguments of two classes are not mixed."""
        distance = {"class_path": "lightning_znorm.metrics.HausdorffDistance", "init_args": {"percentile": 95}}
        metrics = used("test", [*experiment, *write("other.yaml", metrics={"mine": distance})])["metrics"]
        assert list(metrics) == ["mine"]
        assert metrics["mine"]["class_path"] == "lightning_znorm.metrics.HausdorffDistance"

    def test_default_metrics(self, experiment: list[str], capsys: pytest.CaptureFixture[str]):
        """A setting that is given is the command's, also if it is the default."""
        main(["test", *experiment, *write("other.yaml", metrics=None), "--ckpt_path", "best.ckpt"])
        out = capsys.readouterr().out
        assert "test/hausdorff" in out
        assert "test/mine" not in out

    @pytest.mark.parametrize("command", ["validate", "test", "predict"])
    def test_the_others(self, command: str, experiment: list[str]):
        names = ["nucleus", "border"]
        files = write("other.yaml", inferer=WINDOWS, threshold=0.3, class_names=names, size_divisor=None)
        settings = used(command, [*experiment, *files])
        assert settings["inferer"]["class_path"] == "monai.inferers.SlidingWindowInferer"
        assert (settings["threshold"], settings["class_names"], settings["size_divisor"]) == (0.3, names, None)
        assert list(settings["metrics"]) == ["mine", "patients"]

    @pytest.mark.parametrize("flag", [["--model.init_args.size_divisor", "8"], ["--model.init_args.size_divisor=null"]])
    def test_by_flag(self, flag: list[str], experiment: list[str]):
        assert used("test", [*experiment, *flag])["size_divisor"] == (8 if "8" in flag else None)

    def test_a_metric_that_is_not_used_is_not_imported(
        self, experiment: list[str], trained: Path, monkeypatch: pytest.MonkeyPatch
    ):
        Path("stranger.py").write_text("raise SystemError")
        monkeypatch.syspath_prepend(str(trained))
        content = torch.load("best.ckpt", weights_only=True)
        content["hyper_parameters"]["metrics"] = {"mine": {"class_path": "stranger.Metric"}}
        torch.save(content, "strange.ckpt")
        flags = [*experiment, "--ckpt_path", "strange.ckpt"]
        with pytest.raises(SystemExit, match=r"names stranger.Metric for model.init_args.metrics.mine.class_path"):
            main(["test", *flags])
        main(["test", *flags, *write("other.yaml", metrics={"other": DICE})])
        assert "stranger" not in sys.modules


class TestFromTheCheckpoint:
    def test_what_the_command_leaves(self, experiment: list[str]):
        settings = used("test", experiment)
        assert list(settings["metrics"]) == ["mine", "patients"]
        assert settings["size_divisor"] == 16

    def test_what_is_trained(self, experiment: list[str]):
        files = write("other.yaml", ignore_index=7, metrics={"other": DICE})
        with pytest.warns(
            UserWarning, match=r"model.init_args.ignore_index is None, as best.ckpt was trained, and not 7"
        ):
            main(["test", *experiment, *files, "--ckpt_path", "best.ckpt"])

    def test_resuming(self, experiment: list[str]):
        files = write("other.yaml", metrics={"other": DICE}, size_divisor=16)
        with pytest.raises(SystemExit, match=r"best.ckpt was trained with model.init_args.metrics.mine"):
            main(["fit", *experiment, *files, "--ckpt_path", "best.ckpt"])

    def test_metrics_of_another_class(self):
        saved = {"init_args": {"metrics": {"mine": DICE, "both": DICE}}}
        given = {"init_args": {"metrics": {"other": DICE, "both": PATIENTS}}}
        assert list(overridden_settings("a.ckpt", saved, given)) == [
            "model.init_args.metrics.both.class_path is lightning_znorm.metrics.DiceScore, as a.ckpt was trained, "
            "and not lightning_znorm.metrics.PatientDiceScore.",
            "model.init_args.metrics.mine is added, as a.ckpt was trained.",
            "model.init_args.metrics.other is dropped, as a.ckpt was trained.",
        ]
        assert not list(overridden_settings("a.ckpt", saved, {"init_args": {"metrics": None}}))


class TestTrust:
    def saved(self, name: str) -> str:
        torch.save({"hyper_parameters": {"metrics": {"mine": {"class_path": name}}}}, "named.ckpt")
        return "named.ckpt"

    @pytest.mark.parametrize("name", ["metrics.PatientDiceScore", "metrics.dice.DiceScore", "metrics.MaskCount"])
    def test_own_metrics(self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.chdir(tmp_path)
        check_names(self.saved(f"lightning_znorm.{name}"), {})

    @pytest.mark.parametrize(
        "name",
        [
            "lightning_znorm.metrics.dice.Tensor",
            "lightning_znorm.metrics.mask_metric.MaskMetric",
            "lightning_znorm.metrics.patients.torch.load",
            "torchmetrics.MeanMetric",
        ],
    )
    def test_what_is_near(self, name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.chdir(tmp_path)
        with pytest.raises(ValueError, match=f"names {name} for"):
            check_names(self.saved(name), {})


class TestChangedData:
    def test_ordinary_resume(self, experiment: list[str]):
        flags = [*write("same.yaml", metrics={"mine": DICE, "patients": PATIENTS}, size_divisor=16)]
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*best.ckpt.*")
            main(["fit", *experiment, *flags, "--ckpt_path", "best.ckpt", "--trainer.max_epochs", "2"])

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ({"mask_values": {"0": 0, "128": 2, "255": 1}}, "mask_values was "),
            ({"num_classes": 4}, "num_classes was 3"),
            ({"mean": [0.25, 0.5, 0.75]}, "mean was "),
            ({"image_size": None}, "image_size was 32"),
            ({"mask_values": None}, "mask_values was "),
        ],
    )
    def test_a_real_change(self, given: dict, said: str, tmp_path: Path):
        values = {"mask_values": {"0": 0, "128": 1, "255": 2}, "num_classes": 3, "mean": [0.5] * 3, "image_size": 32}
        torch.save({"datamodule_hyper_parameters": values}, tmp_path / "a.ckpt")
        (note,) = changed_data(str(tmp_path / "a.ckpt"), {"init_args": given})
        assert said in note

    @pytest.mark.parametrize(
        "given",
        [
            {"mask_values": {0: 0, 128: 1}},
            {"num_classes": None, "mean": None, "std": None, "patients": None},
            {"mean": (0.5, 0.5)},
        ],
    )
    def test_no_change(self, given: dict, tmp_path: Path):
        values = {"mask_values": {"0": 0, "128": 1}, "num_classes": 3, "mean": [0.5] * 2, "std": [1.0], "patients": {}}
        torch.save({"datamodule_hyper_parameters": values}, tmp_path / "a.ckpt")
        assert not list(changed_data(str(tmp_path / "a.ckpt"), {"init_args": given}))
