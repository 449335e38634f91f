"""Predicted masks as files."""

import csv
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_znorm import MaskWriter
from lightning_znorm.tasks import SegmentationTask
from tests.trainers import trainer


class Logits(nn.Module):
    """A module whose images are the logits."""

    def forward(self, images: Tensor) -> Tensor:
        return images


class Named(Dataset):
    def __init__(self, logits: Tensor, names: list[str]) -> None:
        self.logits, self.names = logits, names

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> tuple[Tensor, str]:
        return self.logits[index], self.names[index]


LOGITS = torch.randn(5, 1, 12, 10, generator=torch.Generator().manual_seed(0)) - 1


def predict(folder: Path | None, data: Dataset, task: LightningModule | None = None, **kwargs: Any) -> None:
    run = trainer(callbacks=[MaskWriter(folder, **kwargs)])
    task = SegmentationTask(Logits()) if task is None else task
    run.predict(task, DataLoader(data, batch_size=2), return_predictions=False)


def rows(folder: Path) -> list[dict[str, str]]:
    with (folder / "scores.csv").open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def pixels(path: Path) -> np.ndarray:
    with Image.open(path) as image:
        return np.asarray(image)


@pytest.mark.parametrize("format", ["png", "tif"])
def test_masks_and_scores(tmp_path: Path, format: str):
    logits = LOGITS.clone()
    logits[3] = -9  # nothing is found
    names = ["a.tif", "b c.tif", "sub/a.tif", "häß.tif", "e.tif"]
    predict(tmp_path / "out", Named(logits, names), format=format)
    expected = ["a_mask", "b c_mask", "sub/a_mask", "häß_mask", "e_mask"]
    written = rows(tmp_path / "out")
    assert [row["image"] for row in written] == names
    assert [row["mask"] for row in written] == [f"{stem}.{format}" for stem in expected]
    for row, image in zip(written, logits[:, 0], strict=True):
        mask = pixels(tmp_path / "out" / row["mask"])
        assert mask.dtype == np.uint8
        assert (mask == 255 * (image >= 0).numpy()).all()
        assert int(row["pixels"]) == (image >= 0).sum()
        assert float(row["fraction"]) == pytest.approx((image >= 0).float().mean().item(), abs=1e-6)
        assert float(row["max_probability"]) == pytest.approx(image.sigmoid().max().item(), abs=1e-6)
    assert written[3]["mean_probability"] == ""
    first = logits[0].sigmoid()
    assert float(written[0]["mean_probability"]) == pytest.approx(first[first >= 0.5].mean().item(), abs=1e-6)
    assert len([path for path in (tmp_path / "out").rglob("*") if path.is_file()]) == 6


@pytest.mark.skipif(sys.platform != "linux", reason="names are unicode elsewhere")
def test_names_that_are_not_utf_8(tmp_path: Path):
    names = [os.fsdecode(name) for name in (b"M\xfcller.tif", b"\xff/\xfe.tif", b"c.tif")]
    predict(tmp_path / "out", Named(LOGITS, names))
    with (tmp_path / "out" / "scores.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
        written = list(csv.DictReader(file))
    assert [row["image"] for row in written] == names
    for row, logits in zip(written, LOGITS[:, 0], strict=False):
        assert (pixels(tmp_path / "out" / row["mask"]) == 255 * (logits >= 0).numpy()).all()


@pytest.mark.parametrize("named", [True, False])
def test_nan_is_no_empty_mask(tmp_path: Path, named: bool):
    logits = LOGITS.clone()
    logits[3, 0, 0, 0] = torch.nan
    data = Named(logits, ["a.png", "b.png", "c.png", "d.png", "e.png"]) if named else TensorDataset(logits)
    image = "d.png" if named else "image 1 of batch 1"
    with pytest.raises(ValueError, match=f"MaskWriter was given NaN for {image}, which is above no threshold"):
        predict(tmp_path / "out", data)
    assert len(rows(tmp_path / "out")) == 2


def test_a_file_for_each_class(tmp_path: Path):
    logits = torch.randn(2, 3, 6, 6)
    predict(
        tmp_path / "out",
        Named(logits, ["a.png", "b.png"]),
        SegmentationTask(Logits(), num_classes=3, activation="softmax"),
    )
    for name, image in zip("ab", logits, strict=True):
        for number in range(3):
            mask = pixels(tmp_path / "out" / f"{name}_mask_{number}.png")
            assert (mask == 255 * (image.argmax(0) == number).numpy()).all()


def test_volume_as_pages(tmp_path: Path):
    volume = torch.randn(1, 1, 4, 6, 5)
    predict(tmp_path / "out", Named(volume, ["v.nii"]), format="tif")
    with Image.open(tmp_path / "out" / "v_mask.tif") as image:
        assert image.n_frames == 4
        for page in range(4):
            image.seek(page)
            assert (np.asarray(image) == 255 * (volume[0, 0, page] >= 0).numpy()).all()


def test_volume_as_png_is_refused(tmp_path: Path):
    with pytest.raises(MisconfigurationException, match="set format='tif'"):
        predict(tmp_path / "out", Named(torch.randn(1, 1, 4, 6, 5), ["v.nii"]))


def test_numbers_where_there_are_no_names(tmp_path: Path):
    predict(tmp_path / "out", TensorDataset(LOGITS))
    assert [row["mask"] for row in rows(tmp_path / "out")] == [f"00000{number}_mask.png" for number in range(5)]


def test_labels_are_no_names(tmp_path: Path):
    predict(tmp_path / "out", TensorDataset(LOGITS, torch.zeros(5)))
    assert rows(tmp_path / "out")[4]["mask"] == "000004_mask.png"


@pytest.mark.parametrize(
    "second",
    [{"spacing": torch.ones(2)}, [{"spacing": 1}, {}], (torch.ones(2), torch.ones(2)), ["a.png", 3], "ab", np.ones(2)],
    ids=str,
)
def test_what_else_follows_is_no_names(tmp_path: Path, second: Any):
    run = trainer(callbacks=[MaskWriter(tmp_path / "out")])
    batches = DataLoader(TensorDataset(LOGITS[:2]), batch_size=2, collate_fn=lambda _: (LOGITS[:2], second, ["x", "y"]))
    run.predict(SegmentationTask(Logits()), batches, return_predictions=False)
    assert [row["mask"] for row in rows(tmp_path / "out")] == ["000000_mask.png", "000001_mask.png"]


@pytest.mark.parametrize("names", [["a.png", None], (Path("a.png"), None), np.array(["a.png", None])], ids=str)
def test_names_of_some(tmp_path: Path, names: Any):
    run = trainer(callbacks=[MaskWriter(tmp_path / "out")])
    batches = DataLoader(TensorDataset(LOGITS[:2]), batch_size=2, collate_fn=lambda _: (LOGITS[:2], names))
    run.predict(SegmentationTask(Logits()), batches, return_predictions=False)
    assert [row["mask"] for row in rows(tmp_path / "out")] == ["a_mask.png", "000000_mask.png"]


def test_no_two_masks_share_a_name(tmp_path: Path):
    names = ["x.tif", "x.png", "/elsewhere/x.tif", "../x.tif", "y.tif"]
    predict(tmp_path / "out", Named(LOGITS, names))
    assert [row["mask"] for row in rows(tmp_path / "out")] == [
        "x_mask.png", "x-2_mask.png", "x-3_mask.png", "x-4_mask.png", "y_mask.png"
    ]  # fmt: skip
    assert len(list((tmp_path / "out").iterdir())) == 6


@pytest.mark.parametrize("name", ["", ".", "/"])
def test_names_of_no_file(tmp_path: Path, name: str):
    with pytest.raises(ValueError, match=f"MaskWriter was given '{name}' as the name of image 1 of batch 1, which is"):
        predict(tmp_path / "out", Named(LOGITS, ["a", "b", "..", name, "e"]))
    assert len(rows(tmp_path / "out")) == 2


def test_nothing_is_overwritten(tmp_path: Path):
    (tmp_path / "theirs.png").write_bytes(b"precious")
    with pytest.raises(MisconfigurationException, match=r"overwrites nothing, and .* is not empty"):
        predict(tmp_path, Named(LOGITS, list("abcde")))
    assert [path.name for path in tmp_path.iterdir()] == ["theirs.png"]


def test_beside_the_logs(tmp_path: Path):
    run = trainer(callbacks=[MaskWriter()], default_root_dir=tmp_path)
    run.predict(SegmentationTask(Logits()), DataLoader(TensorDataset(LOGITS)), return_predictions=False)
    assert len(rows(tmp_path / "masks")) == 5


def test_module_without_masks(tmp_path: Path):
    class Module(LightningModule):
        def predict_step(self, batch: Any) -> Tensor:
            return batch[0]

    with pytest.raises(MisconfigurationException, match="Module has no method `marked`"):
        predict(tmp_path / "out", TensorDataset(LOGITS), Module())


def test_format():
    with pytest.raises(ValueError, match="'png' or 'tif', got 'jpg'"):
        MaskWriter(format="jpg")
