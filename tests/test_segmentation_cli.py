"""Segmentation from the command line: fit, test, and masks for a folder of images without masks."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from lightning_znorm.cli import main

CONFIGS = Path(__file__).parents[1] / "configs"


@pytest.fixture
def flags(fake_lgg: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return flags that make a small run of the Attention U-Net's experiment."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "small.yaml").write_text(
        yaml.safe_dump(
            {
                "model": {"init_args": {"model_kwargs": {"channels": [4, 8], "strides": [2]}}},
                "data": {
                    "init_args": {"root": str(fake_lgg), "batch_size": 4, "val_fraction": 0.3, "test_fraction": 0.3}
                },
                "trainer": {"max_epochs": 1, "accelerator": "cpu", "log_every_n_steps": 1},
            }
        )
    )
    files = [str(CONFIGS / "lgg/attention-unet.yaml"), "small.yaml", str(CONFIGS / "methods/znorm.yaml")]
    return [flag for file in files for flag in ("--config", file)]


# Lightning warns about a checkpoint that another run has written.
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_fit_test_and_predict(flags: list[str], fake_lgg: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    main(["fit", *flags, "--trainer.max_epochs", "10"])
    out = capsys.readouterr().out
    assert all(name in out for name in ("val/dice", "val/tversky", "val/hausdorff"))
    logs = tmp_path / "logs/lgg-attention-unet/version_0"
    checkpoint = str(logs / "checkpoints/best.ckpt")
    assert (logs / "masks/val-epoch=9.png").is_file()

    main(["test", *flags, "--ckpt_path", checkpoint])
    assert "test/dice" in capsys.readouterr().out

    images = tmp_path / "new images/scan ä"
    images.mkdir(parents=True)
    for path in sorted(fake_lgg.glob("kaggle_3m/*/*_1.tif")):
        shutil.copy(path, images)
    main(["predict", *flags, "--ckpt_path", checkpoint, "--data.init_args.predict_root", str(images.parent)])
    (scores,) = tmp_path.glob("logs/lgg-attention-unet/version_*/masks/scores.csv")
    with scores.open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 5
    for row in rows:
        assert (images.parent / row["image"]).is_file()
        with Image.open(scores.parent / row["mask"]) as mask:
            pixels = np.asarray(mask)
        assert pixels.shape == (32, 32)
        assert (pixels == 255).sum() == int(row["pixels"])
        assert set(np.unique(pixels)) <= {0, 255}
    assert not list(tmp_path.rglob("predictions*.pt"))  # the masks are on disk already


def test_loss_by_name(flags: list[str], tmp_path: Path):
    main(
        [
            *("fit", *flags, "--model.init_args.loss", "monai.losses.TverskyLoss"),
            *("--model.init_args.loss.init_args.sigmoid", "true", "--model.init_args.loss.init_args.alpha", "0.3"),
        ]
    )
    (config,) = tmp_path.glob("logs/lgg-attention-unet/version_0/config.yaml")
    loss = yaml.safe_load(config.read_text())["model"]["init_args"]["loss"]
    assert loss["class_path"].endswith("TverskyLoss")
    assert (loss["init_args"]["sigmoid"], loss["init_args"]["alpha"]) == (True, 0.3)
