"""Own images and masks from the command line: fit, test and predict, by YAML alone."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from PIL import Image

from lightning_znorm.cli import main
from lightning_znorm.data import MaskFolderDataModule
from tests.medical import write_mask_folder

CONFIGS = Path(__file__).parents[1] / "configs"
CPU = ["--trainer.accelerator", "cpu"]


@pytest.fixture(autouse=True)
def nuclei(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Write images of 6 patients, RGB of 8 bits, and masks of 0, 128 (nucleus) and 255 (border)."""
    monkeypatch.chdir(tmp_path)
    write_mask_folder(tmp_path / "my nuclei")
    return tmp_path / "my nuclei"


@pytest.fixture
def new(nuclei: Path, tmp_path: Path) -> Path:
    """Copy two images without masks, one into a folder inside."""
    (tmp_path / "new" / "of today").mkdir(parents=True)
    shutil.copy(nuclei / "images" / "p0_0.png", tmp_path / "new")
    shutil.copy(nuclei / "images" / "p1_0.png", tmp_path / "new" / "of today")
    return tmp_path / "new"


def experiment(root: Path, data: dict[str, Any], model: dict[str, Any]) -> list[str]:
    """Write an experiment, and return the flags that name it."""
    channels = {"features": [4, 4, 8, 8, 8, 4], "in_channels": 3, "out_channels": model.get("num_classes", 1)}
    network = {"class_path": "monai.networks.nets.BasicUNet", "init_args": {"spatial_dims": 2, **channels}}
    fractions = {"val_fraction": 0.2, "test_fraction": 0.2, "batch_size": 4}
    config = {
        "seed_everything": 0,
        "model": {"class_path": "SegmentationTask", "init_args": {"model": network, **model}},
        "data": {"class_path": "MaskFolderDataModule", "init_args": {"root": str(root), **fractions, **data}},
        "trainer": {
            "max_epochs": 2,
            "enable_progress_bar": False,
            "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": "logs", "name": "own"}},
            "log_every_n_steps": 1,
        },
    }
    Path("own.yaml").write_text(yaml.safe_dump(config))
    return ["--config", "own.yaml", *CPU]


FLIP = {"class_path": "monai.transforms.RandFlipd", "init_args": {"keys": ["image", "label"]}}
COMPOSED = {"class_path": "monai.transforms.Compose", "init_args": {"transforms": [FLIP]}}
JITTER = {"class_path": "torchvision.transforms.v2.ColorJitter", "init_args": {"brightness": 0.2}}
SOFTMAX = {"num_classes": 3, "activation": "softmax"}


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
@pytest.mark.parametrize(
    ("data", "model"),
    [
        ({"mask_values": {0: 0, 128: 1, 255: 2}, "patient_pattern": "^([^_]+)_"}, SOFTMAX),
        (
            {
                "mask_values": [0, 128, 255],
                "image_size": [32, 48],
                "train_transform": [COMPOSED, JITTER],
                "augment": True,
            },
            {**SOFTMAX, "prior": "auto"},
        ),
        ({"mask_values": {0: 0, 128: 1, 255: 1}, "train_transform": FLIP}, {}),
    ],
    ids=["softmax", "transforms", "sigmoid"],
)
def test_by_yaml(data: dict, model: dict, nuclei: Path, new: Path, capsys: pytest.CaptureFixture[str]):
    flags = experiment(nuclei, data, model)
    main(["fit", *flags])
    (logs,) = Path("logs/own").iterdir()
    written = yaml.safe_load((logs / "config.yaml").read_text())["data"]["init_args"]
    assert written["train_transform"] == data.get("train_transform")
    (checkpoint,) = logs.rglob("*.ckpt")
    loaded = MaskFolderDataModule.load_from_checkpoint(checkpoint)
    assert loaded.hparams.num_classes == loaded.num_classes == model.get("num_classes", 1)
    saved = torch.load(checkpoint, weights_only=True)["MaskFolderDataModule"]
    assert (list(loaded.mean), list(loaded.std)) == (saved["mean"], saved["std"])

    capsys.readouterr()
    main(["test", *flags, "--ckpt_path", str(checkpoint)])
    assert "test/dice" in capsys.readouterr().out
    # The config of the run is an experiment of its own.
    main(["test", "--config", str(logs / "config.yaml"), "--ckpt_path", str(checkpoint)])

    main(["predict", *flags, "--ckpt_path", str(checkpoint), "--data.init_args.predict_root", str(new)])
    (predictions,) = Path("logs/own").rglob("predictions*.pt")
    probabilities = torch.load(predictions, weights_only=True)
    assert probabilities.shape == (2, model.get("num_classes", 1), *data.get("image_size", [32, 32]))


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (
            {"train_transform": {"class_paht": "monai.transforms.RandFlipd"}},
            "train_transform must be a transform, .*class_paht",
        ),
        ({"train_transform": {**FLIP, "init_arsg": {}}}, "train_transform must be a transform, .*init_arsg"),
        (
            {"train_transform": [JITTER, {**FLIP, "init_args": {"kesy": ["image"]}}]},
            "train_transform: monai.transforms.RandFlipd cannot be made with .*kesy",
        ),
        ({"mask_values": {0: 0, "12u": 1}}, "12u"),
        (
            {"mask_values": {0: 0, 128: 1, 255: 2}, "batch_siez": 1},
            "no setting data.batch_siez,.*own.yaml.*did you mean",
        ),
    ],
)
def test_misspelt_key_within_an_argument(given: dict, said: str, nuclei: Path, capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        main(["fit", *experiment(nuclei, {"mask_values": [0, 128, 255], **given}, SOFTMAX)])
    code, err = caught.value.code, capsys.readouterr().err
    assert re.search(f"^error: .*{said}", code if isinstance(code, str) else err[err.index("error: ") :])


def test_what_is_wrong_is_one_sentence(nuclei: Path):
    flags = experiment(nuclei, {"train_transform": {"class_path": "monai.transforms.RandFlap"}}, {})
    with pytest.raises(
        SystemExit, match=r"^error: train_transform: monai.transforms.RandFlap cannot be imported [^\n]*$"
    ):
        main(["fit", *flags])
    with pytest.raises(
        SystemExit, match=r"let mask_values give the class of each, such as mask_values: \{0: 0, 128: 1, "
    ):
        main(["fit", *experiment(nuclei, {}, {})])


@pytest.fixture
def shipped(nuclei: Path) -> list[str]:
    """Return flags that make a small run of the shipped experiment."""
    small = {
        "model": {"init_args": {"model_kwargs": {"features": [4, 4, 8, 8, 8, 4]}}},
        "data": {
            "init_args": {
                "root": str(nuclei), "image_size": 32, "batch_size": 4, "val_fraction": 0.2, "test_fraction": 0.2
            }
        },
        "trainer": {"max_epochs": 10, "accelerator": "cpu", "log_every_n_steps": 1},
    }  # fmt: skip
    Path("small.yaml").write_text(yaml.safe_dump(small))
    return ["--config", str(CONFIGS / "own/two-classes.yaml"), "--config", "small.yaml"]


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_shipped_experiment(shipped: list[str], nuclei: Path, new: Path, capsys: pytest.CaptureFixture[str]):
    main(["fit", *shipped])
    out = capsys.readouterr().out
    assert all(name in out for name in ("val/dice_per_patient", "val/dice_nucleus", "val/dice_border"))
    logs = Path("logs/own-two-classes/version_0")
    checkpoint = str(logs / "checkpoints/best.ckpt")
    assert (logs / "masks/val-epoch=9.png").is_file()

    before = {*Path("logs").rglob("scores.csv")}
    main(["test", *shipped, "--ckpt_path", checkpoint])
    assert "test/dice_per_patient" in capsys.readouterr().out
    (scores,) = {*Path("logs").rglob("scores.csv")} - before
    patients = torch.load(checkpoint, weights_only=True)["MaskFolderDataModule"]["patients"]["test"]
    assert patients
    assert all(patient in scores.read_text() for patient in patients)

    main(["predict", *shipped, "--ckpt_path", checkpoint, "--data.init_args.predict_root", str(new)])
    masks = [path for path in Path("logs").rglob("*_mask*.png") if "of today" in path.parts]
    assert masks
    for path in masks:
        with Image.open(path) as mask:
            assert mask.size == (32, 32)
