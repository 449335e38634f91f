"""configs/own/pretrained.yaml: trained, resumed and tested, on small generated images."""

from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from monai.networks.nets import FlexibleUNet
from PIL import Image

from lightning_znorm.cli import main
from lightning_znorm.data import MaskFolderDataModule
from lightning_znorm.tasks import SegmentationTask

CONFIGS = Path(__file__).parents[1] / "configs"
STEM = "model.encoder._conv_stem.weight"


def write_images(root: Path, count: int = 10, size: int = 32) -> None:
    """Write RGB images with a bright disc, and masks of 0 and 255, as PNG files."""
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:size, :size] / size - 0.5
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    for number in range(count):
        y, x = rng.uniform(-0.2, 0.2, 2)
        mask = (rows - y) ** 2 + (columns - x) ** 2 < 0.02
        image = rng.integers(0, 100, (size, size, 3)) + 100 * mask[..., None]
        Image.fromarray(image.astype(np.uint8)).save(root / f"images/{number:02}.png")
        Image.fromarray(mask.astype(np.uint8) * 255).save(root / f"masks/{number:02}.png")


@pytest.fixture
def flags(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return flags that make a small run of the experiment, without pretrained weights."""
    monkeypatch.chdir(tmp_path)
    write_images(tmp_path / "my data")
    config = yaml.safe_load((CONFIGS / "own/pretrained.yaml").read_text())
    network = config["model"]["init_args"]["model"]["init_args"]
    network |= {"pretrained": False, "decoder_channels": [16, 8, 8, 4, 4]}
    config["data"]["init_args"] |= {"root": "my data", "batch_size": 2, "image_size": 32, "val_fraction": 0.2}
    config["trainer"] |= {"max_epochs": 2, "accelerator": "cpu", "log_every_n_steps": 1}
    config["trainer"]["callbacks+"][-1]["init_args"]["unfreeze_backbone_at_epoch"] = 1
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(config))
    return ["--config", "small.yaml", "--config", str(CONFIGS / "methods/znorm.yaml")]


def checkpoint(version: int) -> Path:
    return Path(f"logs/own-pretrained/version_{version}/checkpoints/last.ckpt")


# Lightning warns about a checkpoint that another run has written.
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_fit_resume_and_test(flags: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    main(["fit", *flags])
    config = yaml.safe_load(Path("logs/own-pretrained/version_0/config.yaml").read_text())
    (callback,) = [each for each in config["trainer"]["callbacks"] if "Finetuning" in each["class_path"]]
    assert callback["init_args"]["lambda_func"] == "lightning.pytorch.callbacks.finetuning.multiplicative"
    assert (callback["init_args"]["unfreeze_backbone_at_epoch"], callback["init_args"]["train_bn"]) == (1, False)
    whole = torch.load(checkpoint(0), weights_only=True)
    assert [group["lr"] for group in whole["optimizer_states"][0]["param_groups"]][1] > 0

    # A training for one epoch ends with the encoder as it was; resumed, it ends as the other did.
    main(["fit", *flags, "--trainer.max_epochs", "1"])
    frozen = torch.load(checkpoint(1), weights_only=True)
    assert len(frozen["optimizer_states"][0]["param_groups"]) == 1
    assert not torch.equal(frozen["state_dict"][STEM], whole["state_dict"][STEM])
    main(["fit", "--config", "logs/own-pretrained/version_0/config.yaml", "--ckpt_path", str(checkpoint(1))])
    resumed = torch.load(checkpoint(2), weights_only=True)
    assert all(torch.equal(value, resumed["state_dict"][name]) for name, value in whole["state_dict"].items())

    capsys.readouterr()
    main(["test", *flags, "--ckpt_path", str(checkpoint(2))])
    assert "test/dice" in capsys.readouterr().out

    # In Python, no pretrained weights are needed.
    network = FlexibleUNet(3, 1, "efficientnet-b0", decoder_channels=(16, 8, 8, 4, 4))
    task = SegmentationTask.load_from_checkpoint(checkpoint(2), model=network)
    assert torch.equal(task.state_dict()[STEM], whole["state_dict"][STEM])
    data = MaskFolderDataModule.load_from_checkpoint(checkpoint(2))
    black = data.normalized(torch.zeros(1, 3, 1, 1, dtype=torch.uint8)).flatten()
    torch.testing.assert_close(black, torch.tensor([-0.485 / 0.229, -0.456 / 0.224, -0.406 / 0.225]))


def test_normalization_and_weights_are_those_of_imagenet() -> None:
    """As timm has them for networks of ImageNet."""
    from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

    config = yaml.safe_load((CONFIGS / "own/pretrained.yaml").read_text())
    data = config["data"]["init_args"]
    assert (tuple(data["mean"]), tuple(data["std"])) == (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD)
    assert config["model"]["init_args"]["model"]["init_args"]["pretrained"] is True
