"""Volumes from the command line: fit on patches, test by sliding window, and label maps in NIfTI."""

import csv
import re
import shutil
from pathlib import Path

import nibabel
import numpy as np
import pytest
import torch
import yaml
from monai.inferers import SlidingWindowInferer
from monai.metrics import compute_hausdorff_distance
from monai.networks.nets import DynUNet

from lightning_znorm.cli import main
from tests.medical import write_volumes

REPOSITORY = Path(__file__).parents[1]
CONFIGS = REPOSITORY / "configs"

pytestmark = [
    pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning"),
    # MONAI's own call, in the reference.
    pytest.mark.filterwarnings("ignore:.*always_return_as_numpy:FutureWarning"),
]


def rows(path: Path) -> list[dict[str, str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def flags(root: Path, folder: Path) -> list[str]:
    """Return flags that make a small run of the experiment, on three classes."""
    (folder / "small.yaml").write_text(
        yaml.safe_dump(
            {
                "model": {
                    "init_args": {
                        "num_classes": 3,
                        "class_names": ["core", "rim"],
                        "model": {
                            "init_args": {
                                "out_channels": 3,
                                "filters": [4, 8, 8, 8],
                                "kernel_size": [[1, 3, 3], 3, 3, 3],
                                "strides": [1, [1, 2, 2], 2, 2],
                                "upsample_kernel_size": [[1, 2, 2], 2, 2],
                                "deep_supr_num": 1,
                            }
                        },
                        "inferer": {"init_args": {"roi_size": [16, 32, 32]}},
                        "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.01}},
                    }
                },
                "data": {
                    "init_args": {
                        "root": str(root),
                        "num_classes": 3,
                        "patch_size": [16, 32, 32],
                        "patient_pattern": r"(p\d+)_",
                        "num_workers": 1,
                    }
                },
                "trainer": {
                    "max_epochs": 3,
                    "check_val_every_n_epoch": 1,
                    "accelerator": "cpu",
                    "log_every_n_steps": 1,
                },
            }
        )
    )
    files = [CONFIGS / "volumes/dynunet.yaml", folder / "small.yaml", CONFIGS / "methods/znorm.yaml"]
    return [flag for file in files for flag in ("--config", str(file))]


def distance(preds: np.ndarray, target: np.ndarray, affine: np.ndarray) -> float:
    """Return the 95th percentile of the Hausdorff distance in mm, by MONAI."""
    spacing = np.linalg.norm(affine[:3, :3], axis=0).tolist()
    masks = (torch.from_numpy(mask)[None, None] for mask in (preds, target))
    return compute_hausdorff_distance(*masks, include_background=True, percentile=95, spacing=spacing).item()


def test_validations_of_the_experiment() -> None:
    trainer = yaml.safe_load((CONFIGS / "volumes/dynunet.yaml").read_text())["trainer"]
    (overlay,) = (each for each in trainer["callbacks+"] if each["class_path"] == "MaskOverlay")
    every = trainer["check_val_every_n_epoch"]
    assert every > 1  # an epoch is a few patches of each volume, and a validation covers whole volumes
    assert overlay["init_args"]["every_n_epochs"] % every == 0  # it draws after validations
    assert trainer["max_epochs"] % every == 0


# Lightning warns about a checkpoint that another run has written.
@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_fit_test_and_predict(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    monkeypatch.chdir(tmp_path)
    written = write_volumes(tmp_path / "my data", cases=8, classes=2)
    small = flags(tmp_path / "my data", tmp_path)
    main(["fit", *small])
    assert "val/dice_per_patient" in capsys.readouterr().out
    runs = tmp_path / "logs/volumes-dynunet"
    checkpoint = str(runs / "version_0/checkpoints/best.ckpt")

    main(["test", *small, "--ckpt_path", checkpoint])
    assert "test/dice" in capsys.readouterr().out
    tested = rows(runs / "version_1/scores.csv")

    main(["predict", *small, "--ckpt_path", checkpoint])
    masks = runs / "version_2/masks"
    predicted = rows(masks / "scores.csv")
    assert len(predicted) == 2 * 3  # two volumes of three classes, with the background
    names = sorted({row["image"] for row in predicted})
    assert len(list(masks.rglob("*_mask.nii.gz"))) == len(names) == 2
    found = 0
    for name in names:
        case = Path(name).name.removesuffix(".nii.gz")
        _, label, affine = written[case]
        file = masks / f"images/{case}_mask.nii.gz"
        image = nibabel.load(file)
        assert image.affine.tolist() == nibabel.load(tmp_path / "my data" / name).affine.tolist() == affine.tolist()
        voxels = np.asarray(image.dataobj)
        assert voxels.shape == label.shape
        assert voxels.dtype == np.uint8
        assert set(np.unique(voxels)) <= {0, 1, 2}
        background, *classes = (row for row in predicted if row["image"] == name)
        assert background["class"] == "background"
        assert {background[key] for key in ("dice", "hd95_mm", "predicted_pixels", "true_pixels")} == {""}
        of_test = [row for row in tested if row["image"] == name]
        for number, (row, test) in enumerate(zip(classes, of_test, strict=True), start=1):
            preds, target = voxels == number, label == number
            assert row["class"] == ["core", "rim"][number - 1]
            assert test.pop("slice") == ""
            assert {key: row[key] for key in test} == test  # what `test` says too
            assert row["mask"] == f"images/{case}_mask.nii.gz"
            assert row["patient"] == test["patient"] == case.partition("_")[0]
            assert int(row["pixels"]) == int(test["predicted_pixels"]) == preds.sum()
            assert int(row["true_pixels"]) == int(test["true_pixels"]) == target.sum()
            both = 2 * (preds & target).sum() / (preds.sum() + target.sum())
            assert float(row["dice"]) == pytest.approx(both, abs=1e-6)
            assert float(test["dice"]) == pytest.approx(both, abs=1e-6)
            if preds.any():
                found += 1
                expected = distance(preds, target, affine)
                assert float(row["hd95_mm"]) == pytest.approx(expected, rel=1e-5)
                assert float(test["hd95_mm"]) == pytest.approx(expected, rel=1e-5)
                assert float(row["hd95"]) < float(row["hd95_mm"]) * 1.3
    assert found >= 2  # the network has learned something
    assert not list(tmp_path.rglob("predictions*.pt"))

    main(
        [
            "predict",
            *small,
            "--ckpt_path",
            checkpoint,
            "--data.init_args.predict_root",
            str(tmp_path / "my data/images"),
        ]
    )
    every = runs / "version_3/masks"
    assert sorted(path.name for path in every.glob("*.nii.gz")) == [f"{case}_mask.nii.gz" for case in sorted(written)]
    assert "dice" not in rows(every / "scores.csv")[0]
    for case, (_, _, affine) in written.items():
        assert nibabel.load(every / f"{case}_mask.nii.gz").affine.tolist() == affine.tolist()
    for name in names:
        again = np.asarray(nibabel.load(every / f"{Path(name).name.removesuffix('.nii.gz')}_mask.nii.gz").dataobj)
        first = np.asarray(nibabel.load(masks / name.replace(".nii.gz", "_mask.nii.gz")).dataobj)
        np.testing.assert_array_equal(again, first)

    # The Python of docs/how-to/own-data.md marks what `predict` does.
    shutil.copy(checkpoint, "best.ckpt")
    text = (REPOSITORY / "docs/how-to/own-data.md").read_text(encoding="utf-8")
    (code,) = (code for code in re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S) if "VolumeDataModule" in code)
    settings = yaml.safe_load((runs / "version_1/config.yaml").read_text())["model"]["init_args"]
    network = DynUNet(**settings["model"]["init_args"])
    inferer = SlidingWindowInferer(**settings["inferer"]["init_args"])
    image = written[case][0]
    variables = {"network": network, "inferer": inferer, "voxels": torch.from_numpy(image[None])}
    exec(compile(code, "docs/how-to/own-data.md", "exec"), variables)
    classes = variables["masks"][0].int().argmax(dim=0)
    assert variables["masks"].shape == (1, 3, *image.shape[1:])
    np.testing.assert_array_equal(classes.numpy(), np.asarray(nibabel.load(every / f"{case}_mask.nii.gz").dataobj))
