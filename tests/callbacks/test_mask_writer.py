"""Predicted masks as files."""

import csv
import os
import sys
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, TensorDataset

from lightning_znorm import MaskOverlay, MaskWriter, ScoreWriter
from lightning_znorm.batches import cases_of
from lightning_znorm.callbacks.scores import case_scores
from lightning_znorm.metrics import DiceScore, HausdorffDistance
from lightning_znorm.tasks import SegmentationTask
from tests.medical import rotated_affine
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


def test_beside_the_pictures_of_one_session(tmp_path: Path):
    """`fit`, `test` and `predict` with one Trainer: both callbacks share a folder."""
    loader = DataLoader(TensorDataset(LOGITS, (LOGITS > 0).float()), batch_size=2)
    run = trainer(callbacks=[MaskOverlay(), MaskWriter()], default_root_dir=tmp_path, max_epochs=2)
    task = SegmentationTask(nn.Conv2d(1, 1, kernel_size=1))
    run.fit(task, loader, loader)
    run.validate(task, loader, verbose=False)
    run.test(task, loader, verbose=False)
    pictures = {"val-epoch=0.png", "val-epoch=1.png", "val.png", "test.png"}
    assert {path.name for path in (tmp_path / "masks").iterdir()} == pictures
    run.predict(task, loader, return_predictions=False)
    masks = {f"00000{number}_mask.png" for number in range(5)}
    assert {path.name for path in (tmp_path / "masks").iterdir()} == {*pictures, *masks, "scores.csv"}
    with pytest.raises(MisconfigurationException, match="overwrites nothing"):
        run.predict(task, loader, return_predictions=False)


@pytest.mark.parametrize("name", ["val-epoch=x.png", "val.png.bak", "a_val.png", "test.tif", "0_mask.png"])
def test_other_pictures_are_refused(tmp_path: Path, name: str):
    (tmp_path / "val.png").touch()
    (tmp_path / name).touch()
    with pytest.raises(MisconfigurationException, match="overwrites nothing"):
        predict(tmp_path, Named(LOGITS, list("abcde")))


def test_module_without_masks(tmp_path: Path):
    class Module(LightningModule):
        def predict_step(self, batch: Any) -> Tensor:
            return batch[0]

    with pytest.raises(MisconfigurationException, match="Module has no method `marked`"):
        predict(tmp_path / "out", TensorDataset(LOGITS), Module())


class Batches(Dataset):
    """Batches as they are."""

    def __init__(self, *batches: Any) -> None:
        self.batches = batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, index: int) -> Any:
        return self.batches[index]


def predict_batches(folder: Path, *batches: Any, task: LightningModule | None = None, **kwargs: Any) -> None:
    loader = DataLoader(Batches(*batches), collate_fn=lambda items: items[0])
    task = SegmentationTask(Logits()) if task is None else task
    trainer(callbacks=[MaskWriter(folder, **kwargs)]).predict(task, loader, return_predictions=False)


def softmax(classes: int = 3, **kwargs: Any) -> SegmentationTask:
    return SegmentationTask(Logits(), num_classes=classes, activation="softmax", **kwargs)


VOLUMES = torch.randn(2, 3, 5, 7, 6, generator=torch.Generator().manual_seed(1))


class TestNifti:
    def test_masks_have_the_affine_matrices_of_the_images(self, tmp_path: Path):
        affines = np.stack([rotated_affine(seed=seed) for seed in range(2)])
        cases = {"name": ["images/a.1.nii.gz", "b.nii"], "affine": affines}
        predict_batches(tmp_path / "out", (VOLUMES[:, :1], cases), format="nifti")
        assert [row["mask"] for row in rows(tmp_path / "out")] == ["images/a.1_mask.nii.gz", "b_mask.nii.gz"]
        for index, row in enumerate(rows(tmp_path / "out")):
            image = nibabel.load(tmp_path / "out" / row["mask"])
            assert image.affine.tolist() == affines[index].tolist()
            assert (int(image.header["sform_code"]), int(image.header["qform_code"])) == (1, 1)
            np.testing.assert_allclose(image.get_qform(), affines[index], atol=1e-4)
            assert image.header.get_xyzt_units()[0] == "mm"
            voxels = np.asarray(image.dataobj)
            assert voxels.dtype == np.uint8
            np.testing.assert_array_equal(voxels, (VOLUMES[index, 0] >= 0).numpy())

    def test_affine_matrix_of_a_file_with_a_rotation_only(self, tmp_path: Path):
        given = nibabel.Nifti1Image(np.zeros((5, 7, 6), np.uint8), None)
        given.set_qform(rotated_affine(), code=1)
        nibabel.save(given, tmp_path / "a.nii.gz")
        affine = nibabel.load(tmp_path / "a.nii.gz").affine
        assert affine.tolist() != affine.astype(np.float32).tolist()
        predict_batches(
            tmp_path / "out", (VOLUMES[:1, :1], {"name": ["a.nii.gz"], "affine": affine[None]}), format="nifti"
        )
        assert nibabel.load(tmp_path / "out/a_mask.nii.gz").affine.tolist() == affine.tolist()

    def test_other_affine_matrices_are_rounded(self, tmp_path: Path):
        affine = np.diag([1 / 3, 0.1, 0.7, 1.0])
        affine[0, 1] = 0.01 / 3  # a shear, which no rotation holds
        predict_batches(
            tmp_path / "out", (VOLUMES[:1, :1], {"name": ["a.nii.gz"], "affine": affine[None]}), format="nifti"
        )
        found = nibabel.load(tmp_path / "out/a_mask.nii.gz").affine
        assert found.tolist() == affine.astype(np.float32).tolist()

    def test_no_affine_matrix(self, tmp_path: Path):
        with pytest.warns(UserWarning, match="A batch says no affine matrix for 000000_mask.nii.gz") as caught:
            predict_batches(tmp_path / "out", (VOLUMES[:, :1],), (VOLUMES[:, :1],), format="nifti")
        assert len([warning for warning in caught if "affine" in str(warning.message)]) == 1
        assert nibabel.load(tmp_path / "out/000003_mask.nii.gz").affine.tolist() == np.eye(4).tolist()

    def test_a_file_for_each_class(self, tmp_path: Path):
        cases = {"name": ["a.nii.gz", "b.nii.gz"], "affine": np.stack([rotated_affine()] * 2)}
        predict_batches(tmp_path / "out", (VOLUMES, cases), task=softmax(), format="nifti")
        for name, logits in zip("ab", VOLUMES, strict=True):
            for number in range(3):
                voxels = np.asarray(nibabel.load(tmp_path / f"out/{name}_mask_{number}.nii.gz").dataobj)
                np.testing.assert_array_equal(voxels, (logits.argmax(0) == number).numpy())

    def test_images_in_2d(self, tmp_path: Path):
        predict_batches(tmp_path / "out", (LOGITS, {"affine": np.stack([np.eye(4)] * 5)}), format="nifti")
        voxels = np.asarray(nibabel.load(tmp_path / "out/000004_mask.nii.gz").dataobj)
        np.testing.assert_array_equal(voxels, (LOGITS[4, 0] >= 0).numpy())

    def test_without_nibabel(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.setitem(sys.modules, "nibabel", None)
        with pytest.raises(ImportError, match=r"pip install 'lightning-znorm\[volumes\]'"):
            predict_batches(tmp_path / "out", (VOLUMES[:, :1],), format="nifti")
        assert not (tmp_path / "out").exists()


def read(path: Path) -> np.ndarray:
    """Return the pixels of a file, and the pages of a volume."""
    if path.name.endswith(".nii.gz"):
        return np.asarray(nibabel.load(path).dataobj)
    with Image.open(path) as image:
        pages = []
        for page in range(getattr(image, "n_frames", 1)):
            image.seek(page)
            pages.append(np.asarray(image))
    return np.stack(pages) if len(pages) > 1 else pages[0]


class TestLabelMaps:
    @pytest.mark.parametrize(
        ("format", "suffix", "axes"),
        [("png", "png", 2), ("tif", "tif", 2), ("nifti", "nii.gz", 2), ("tif", "tif", 3), ("nifti", "nii.gz", 3)],
    )
    def test_softmax(self, tmp_path: Path, format: str, suffix: str, axes: int):
        logits = VOLUMES if axes == 3 else VOLUMES[:, :, 0]
        cases = {"name": ["a.tif", "b.tif"], "affine": np.stack([np.eye(4)] * 2)}
        predict_batches(tmp_path / "out", (logits, cases), task=softmax(), format=format, label_map=True)
        assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [
            f"a_mask.{suffix}", f"b_mask.{suffix}", "scores.csv"
        ]  # fmt: skip
        for name, image in zip("ab", logits, strict=True):
            found = read(tmp_path / f"out/{name}_mask.{suffix}")
            assert found.dtype == np.uint8
            np.testing.assert_array_equal(found, image.argmax(0).numpy())
        written = rows(tmp_path / "out")
        assert [(row["mask"], row["class"]) for row in written[:3]] == [(f"a_mask.{suffix}", str(n)) for n in range(3)]
        assert [int(row["pixels"]) for row in written[:3]] == np.bincount(logits[0].argmax(0).ravel()).tolist()

    def test_sigmoid_takes_the_most_probable_class(self, tmp_path: Path):
        logits = torch.tensor([[[[3.0, 1.0, -1.0, 0.0]], [[2.0, 2.0, -3.0, -1.0]]]])  # both, both, none, the first
        task = SegmentationTask(Logits(), num_classes=2)
        predict_batches(tmp_path / "out", (logits,), task=task, label_map=True)
        assert read(tmp_path / "out/000000_mask.png").tolist() == [[1, 2, 0, 1]]
        assert [row["pixels"] for row in rows(tmp_path / "out")] == ["3", "2"]

    def test_single_class(self, tmp_path: Path):
        predict(tmp_path / "out", TensorDataset(LOGITS), label_map=True)
        np.testing.assert_array_equal(read(tmp_path / "out/000002_mask.png"), (LOGITS[2, 0] >= 0).numpy())

    def test_many_classes(self, tmp_path: Path):
        logits = torch.zeros(1, 300, 2, 2)
        logits[0, 299, 0, 0] = 1
        for format in ("png", "tif", "nifti"):
            cases = {"affine": np.eye(4)[None]}
            predict_batches(tmp_path / format, (logits, cases), task=softmax(300), format=format, label_map=True)
            (path,) = (tmp_path / format).glob("000000_mask.*")
            assert read(path).tolist() == [[299, 0], [0, 0]]

    def test_flag(self):
        with pytest.raises(TypeError, match="label_map must be True or False, got 'yes'"):
            MaskWriter(label_map="yes")


class TestCases:
    @pytest.mark.parametrize("names", [["p/a.png", "b.png"], [Path("p/a.png"), Path("b.png")]], ids=str)
    def test_names_in_a_dictionary(self, tmp_path: Path, names: Any):
        predict_batches(tmp_path / "out", (LOGITS[:2], {"name": names, "patient": ["anna", "ben"], "slice": [7, 8]}))
        assert [(row["image"], row["mask"], row["patient"], row["slice"]) for row in rows(tmp_path / "out")] == [
            ("p/a.png", "p/a_mask.png", "anna", "7"), ("b.png", "b_mask.png", "ben", "8")
        ]  # fmt: skip

    def test_dictionary_of_monai(self, tmp_path: Path):
        from monai.data import MetaTensor

        images = MetaTensor(LOGITS[:1], meta={"filename_or_obj": ["/scans/anna.nii.gz"], "affine": torch.eye(4)[None]})
        predict_batches(tmp_path / "out", {"image": images, "label": torch.ones(1, 1, 12, 10)}, format="nifti")
        (row,) = rows(tmp_path / "out")
        assert (row["image"], row["mask"]) == ("/scans/anna.nii.gz", "anna_mask.nii.gz")
        assert row["true_pixels"] == "120"

    def test_names_of_some(self, tmp_path: Path):
        predict_batches(tmp_path / "out", (LOGITS[:2], {"name": ["a.png", None], "patient": [None, "ben"]}))
        assert [row["mask"] for row in rows(tmp_path / "out")] == ["a_mask.png", "000000_mask.png"]
        assert [row["patient"] for row in rows(tmp_path / "out")] == ["", "ben"]

    def test_other_columns_appear_where_a_batch_says_more(self, tmp_path: Path):
        masks = (LOGITS[:1] > 0).float()
        predict_batches(tmp_path / "out", (LOGITS[:1],), (LOGITS[:1], masks, {"patient": ["anna"]}), (LOGITS[:1],))
        written = rows(tmp_path / "out")
        assert [row["patient"] for row in written] == ["", "anna", ""]
        assert [row["dice"] for row in written] == ["", "1.0", ""]
        assert [row["mask"] for row in written] == [f"00000{number}_mask.png" for number in range(3)]
        assert list(written[0])[:7] == [
            "image", "mask", "class", "pixels", "fraction", "max_probability", "mean_probability"
        ]  # fmt: skip
        assert "slice" not in written[0]


SCORES = ["dice", "tversky", "hausdorff", "hd95"]


class TestTruth:
    def test_scores_of_each_class(self, tmp_path: Path):
        logits = LOGITS[:4].reshape(2, 2, 12, 10).clone()
        masks = (logits.roll(1, dims=3) > 0).float()
        logits[0, 1], masks[0, 1] = -9, 0  # empty in prediction and truth
        cases = {"name": ["a.png", "b.png"], "spacing": np.array([[2.0, 0.5], [1.0, 3.0]])}
        batch = (logits, masks, cases)
        predict_batches(tmp_path / "out", batch, task=SegmentationTask(Logits(), num_classes=2))
        expected = case_scores(logits >= 0, masks > 0, cases_of(batch))
        written = rows(tmp_path / "out")
        assert [row["true_pixels"] for row in written] == [str(int(mask.sum())) for mask in masks.flatten(0, 1)]
        for row, reference in zip(written, expected, strict=True):
            for name in [*SCORES, "hausdorff_mm", "hd95_mm"]:
                assert row[name] == ("" if reference[name] is None else str(reference[name]))
        assert written[1]["dice"] == written[1]["hd95_mm"] == ""
        assert float(written[0]["hd95_mm"]) != float(written[0]["hd95"])

    def test_softmax_does_not_score_the_background(self, tmp_path: Path):
        logits = VOLUMES[:1]
        masks = logits.roll(1, dims=4).argmax(1, keepdim=True)
        batch = (logits, masks, {"name": ["a.nii.gz"]})
        predict_batches(tmp_path / "out", batch, task=softmax(), format="tif")
        numbers = torch.arange(1, 3).view(1, 2, 1, 1, 1)
        expected = case_scores(logits.argmax(1, keepdim=True) == numbers, masks == numbers, cases_of(batch))
        background, *written = rows(tmp_path / "out")
        assert {background[name] for name in [*SCORES, "predicted_pixels", "true_pixels"]} == {""}
        assert "hd95_mm" not in background
        for row, reference in zip(written, expected, strict=True):
            assert [row[name] for name in SCORES] == [str(reference[name]) for name in SCORES]
            for name in ("predicted_pixels", "true_pixels"):
                assert row[name] == str(reference[name])

    @pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
    def test_scores_are_those_of_a_test(self, tmp_path: Path, activation: str):
        """The columns of ScoreWriter are there, with the same cells, whatever the metrics of the task are."""
        logits = torch.randn(4, 3, 12, 10, generator=torch.Generator().manual_seed(2)) - 1
        logits[0, 2] = -9
        if activation == "softmax":
            masks = logits.roll(1, dims=3).argmax(1, keepdim=True)
            masks[0, masks[0] == 2] = 0
        else:
            masks = (logits.roll(1, dims=3) > 0).long()
        masks[1:, :, :4] = 255
        count = 2 if activation == "softmax" else 3
        task = SegmentationTask(
            Logits(),
            num_classes=3,
            activation=activation,
            class_names=["core", "rim", "cyst"][:count],
            ignore_index=255,
            metrics={"dice": DiceScore(empty="best"), "mine": HausdorffDistance(percentile=50, spacing="image")},
        )
        spacing = np.array([[2.0, 0.5], [1.0, 3.0], [1.0, 1.0], [0.3, 0.7]])
        batch = (logits, masks, {"name": list("abcd"), "patient": list("wxyz"), "spacing": spacing})
        run = trainer(callbacks=[ScoreWriter(), MaskWriter(tmp_path / "out")], default_root_dir=tmp_path)
        loader = DataLoader(Batches(batch), collate_fn=lambda items: items[0])
        run.test(task, loader, verbose=False)
        run.predict(task, loader, return_predictions=False)
        tested = rows(tmp_path)
        predicted = [row for row in rows(tmp_path / "out") if row["class"] != "background"]
        assert len(tested) == len(predicted) == 4 * count
        assert tested[count - 1]["dice"] == "1.0"  # empty in prediction and truth
        for test, row in zip(tested, predicted, strict=True):
            assert {key: row[key] for key in test if key != "slice"} == {k: v for k, v in test.items() if k != "slice"}

    def test_module_without_metrics(self, tmp_path: Path):
        class Module(LightningModule):
            def predict_step(self, batch: Any) -> Tensor:
                return batch[0]

            def marked(self, probabilities: Tensor) -> Tensor:
                return probabilities > 0

            def scored(self, probabilities: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
                return self.marked(probabilities), masks > 0

        predict_batches(tmp_path / "out", (LOGITS[:1], (LOGITS[:1] > 0).float()), task=Module())
        (row,) = rows(tmp_path / "out")
        assert (row["class"], row["dice"]) == ("0", "1.0")
        assert row["pixels"] == row["predicted_pixels"] == row["true_pixels"]

    @pytest.mark.parametrize(
        ("activation", "names", "expected"),
        [
            ("sigmoid", ["core", "rim", "cyst"], ["core", "rim", "cyst"]),
            ("sigmoid", None, ["0", "1", "2"]),
            ("softmax", ["core", "rim"], ["background", "core", "rim"]),
            ("softmax", None, ["0", "1", "2"]),
        ],
    )
    def test_names_of_the_classes(self, tmp_path: Path, activation: str, names: Any, expected: list[str]):
        task = SegmentationTask(Logits(), num_classes=3, activation=activation, class_names=names)
        predict_batches(tmp_path / "out", (VOLUMES[:1, :, 0],), task=task)
        assert [row["class"] for row in rows(tmp_path / "out")] == expected

    @pytest.mark.parametrize("activation", ["sigmoid", "softmax"])
    def test_ignored_pixels_do_not_count(self, tmp_path: Path, activation: str):
        logits = torch.cat([-LOGITS[:2], LOGITS[:2]], dim=1) if activation == "softmax" else LOGITS[:2]
        masks = (LOGITS[:2] > 0).long() if activation == "softmax" else (LOGITS[:2] > 0).float()
        masks[:, :, :6] = 255
        task = softmax(2, ignore_index=255) if activation == "softmax" else SegmentationTask(Logits(), ignore_index=255)
        predict_batches(tmp_path / "out", (logits, masks, {"name": ["a", "b"]}), task=task)
        written = [row for row in rows(tmp_path / "out") if row["dice"]]
        assert [row["dice"] for row in written] == ["1.0", "1.0"]
        assert [int(row["true_pixels"]) for row in written] == (LOGITS[:2, :, 6:] > 0).flatten(1).sum(1).tolist()

    @pytest.mark.parametrize("shape", [(2,), (2, 1, 3, 3), (2, 3, 12, 10)], ids=str)
    def test_labels_of_another_kind_are_no_truth(self, tmp_path: Path, shape: tuple[int, ...]):
        predict_batches(tmp_path / "out", (LOGITS[:2], torch.zeros(shape), {"name": ["a", "b"]}))
        assert "dice" not in rows(tmp_path / "out")[0]


def test_format():
    with pytest.raises(ValueError, match="'png', 'tif' or 'nifti', got 'jpg'"):
        MaskWriter(format="jpg")
