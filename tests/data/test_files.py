"""Which files are read, and which are refused or left out by name: the same rules for all readers."""

import contextlib
import csv
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from PIL import Image
from torch import nn
from torchvision.datasets import ImageFolder
from torchvision.datasets.folder import default_loader

from lightning_znorm import MaskWriter
from lightning_znorm.data import ImageFolderDataModule, LGGDataModule, PCamDataModule
from lightning_znorm.data.array_file import cached_array
from lightning_znorm.data.decoding import read_rgb
from lightning_znorm.data.listing import same_files
from lightning_znorm.tasks import SegmentationTask
from tests.data.jpegs import write_image_folder
from tests.data.odd_images import COLOURS, CONVERTED, REFUSED, RGB, SIZE, TURNED, tiff
from tests.data.somebody_else import as_somebody_else
from tests.medical import PCAM, write_kaggle_pcam, write_lgg, write_pcam
from tests.trainers import trainer


@pytest.fixture
def lgg(tmp_path: Path) -> Path:
    """Write five patients with four slices each."""
    write_lgg(tmp_path)
    return tmp_path / "kaggle_3m"


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """Write three classes, each with four images in train and two in val."""
    return write_image_folder(tmp_path, classes=3, train=4, val=2)


@pytest.fixture
def kaggle(tmp_path: Path) -> Path:
    """Write twenty patches."""
    write_kaggle_pcam(tmp_path, count=20)
    return tmp_path / "histopathologic-cancer-detection" / "train"


def trained(root: Path, **kwargs) -> LGGDataModule:
    data = LGGDataModule(root, **kwargs)
    data.setup("fit")
    return data


def predicted(root: Path) -> list[str]:
    """Return the names of the images to predict for."""
    data = LGGDataModule("nowhere", predict_root=root)
    data.setup("predict")
    return data.predict_set.cases["name"]


def folder_data(root: Path, stage: str = "fit") -> ImageFolderDataModule:
    data = ImageFolderDataModule(root, num_workers=0, image_size=16, resize_size=16, val_fraction=0.5)
    data.setup(stage)
    return data


def names_in(data: ImageFolderDataModule) -> list[str]:
    """Count the images of training and validation together."""
    paths = [os.fsdecode(path) for part in (data.train_set, data.val_set) for path in part.paths.tolist()]
    return sorted(os.path.relpath(path, data.root / "train") for path in paths)


def patches(root: Path) -> PCamDataModule:
    data = PCamDataModule(root, cache_dir=root / "cache")
    data.setup("fit")
    return data


def patient(kaggle_3m: Path, number: int) -> Path:
    (path,) = kaggle_3m.glob(f"TCGA_CS_490{number}_*")
    return path


def slice_of(folder: Path, number: int, mask: str = "") -> Path:
    return folder / f"{folder.name}_{number}{mask}.tif"


def slices_in(data: LGGDataModule) -> int:
    return sum(map(len, (data.train_set, data.val_set, data.test_set)))


@contextlib.contextmanager
def refused(*faults: str) -> Iterator[None]:
    """Check that each fault is a line of the error, and that there are no other lines."""
    with pytest.raises(ValueError, match=f"for {len(faults)} reason") as caught:
        yield
    lines = [line.strip() for line in str(caught.value).splitlines()[1:]]
    for line, fault in zip(sorted(lines), sorted(faults), strict=True):
        assert line.startswith(fault)


class TestKinds:
    @pytest.mark.parametrize("kind", REFUSED)
    def test_refused_by_every_reader(self, kind: str, tmp_path: Path):
        write, reason = REFUSED[kind]
        (tmp_path / "slices").mkdir()
        write(tmp_path / "slices" / "a.png")
        with refused(f"{tmp_path}/slices/a.png: {reason}"):
            predicted(tmp_path / "slices")
        root = write_image_folder(tmp_path / "images", classes=1, train=2, val=1)
        write(root / "val" / "n00000000" / "a.jpg")
        dataset = folder_data(root, "test").test_set
        with pytest.raises(RuntimeError, match=f"^{root}/val/n00000000/a.jpg {reason}.*: convert, replace or remove"):
            dataset[0]

    @pytest.mark.parametrize("kind", ["RGB 16 TIFF", "RGB 16 PNG", "two pages", "four channels"])
    def test_refused_for_training(self, kind: str, lgg: Path):
        write, reason = REFUSED[kind]
        path, of_mask = slice_of(patient(lgg, 0), 1), slice_of(patient(lgg, 1), 1, "_mask")
        write(path)
        write(of_mask)
        with refused(f"{path}: {reason}", f"{of_mask}: {reason}"):
            trained(lgg)

    @pytest.mark.parametrize("kind", ["RGB 16 TIFF", "two pages"])
    def test_refused_among_patches(self, kind: str, kaggle: Path):
        write, reason = REFUSED[kind]
        path = min(kaggle.iterdir())
        write(path)
        with refused(f"{path}: {reason}"):
            patches(kaggle.parent)

    @pytest.mark.parametrize("kind", TURNED)
    def test_stored_turned(self, kind: str, tmp_path: Path):
        (tmp_path / "slices").mkdir()
        TURNED[kind](tmp_path / "slices" / "a.png")
        with refused(f"{tmp_path}/slices/a.png: is stored rotated or mirrored (EXIF orientation"):
            predicted(tmp_path / "slices")

    @pytest.mark.parametrize("kind", [*CONVERTED, *TURNED])
    def test_read_as_torchvision_reads_it(self, kind: str, tmp_path: Path):
        root = write_image_folder(tmp_path, classes=1, train=2, val=1)
        path = root / "val" / "n00000000" / "a.jpg"
        {**CONVERTED, **TURNED}[kind](path)
        data = folder_data(root, "test")
        data.test_set.transform = np.asarray
        image, _ = data.test_set[0]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Pillow's, of transparency
            expected = default_loader(path)
        assert np.array_equal(image, expected)
        if kind in ("PNG", "WebP", "RGB with a transparent colour", "colour profile"):
            assert np.array_equal(image, COLOURS)

    @pytest.mark.parametrize(
        ("mode", "format", "save"),
        [
            ("RGB", "TIFF", {"compression": "tiff_lzw"}),
            ("RGB", "TIFF", {"big_tiff": True}),
            ("RGB", "PNG", {"icc_profile": b"of a monitor"}),
            ("RGB", "BMP", {}),
            ("L", "PNG", {}),
            ("L", "TIFF", {"compression": "packbits"}),
        ],
    )
    def test_eight_bits_as_they_are(self, mode: str, format: str, save: dict, tmp_path: Path):
        image = RGB.convert(mode)
        image.save(tmp_path / "a.tif", format=format, **save)
        data = LGGDataModule("nowhere", predict_root=tmp_path)
        data.setup("predict")
        assert np.array_equal(data.predict_set.images[0].transpose(1, 2, 0), image.convert("RGB"))

    @pytest.mark.parametrize(("fourth", "is_read"), [(0, True), (255, True), (128, False), (None, False)])
    def test_fourth_channel_of_a_bmp(self, fourth: int | None, is_read: bool, tmp_path: Path):
        """Pillow drops the fourth channel. That is right for padding, and wrong for a transparency."""
        image = RGB.copy()
        image.putalpha(Image.fromarray(COLOURS[..., 0]) if fourth is None else fourth)
        image.save(tmp_path / "a.bmp")
        if is_read:
            assert predicted(tmp_path) == ["a.bmp"]
        else:
            with refused(f"{tmp_path}/a.bmp: has a fourth channel that varies, and 3 would be read"):
                predicted(tmp_path)

    def test_colours_multiplied_by_full_opacity(self, tmp_path: Path):
        """With full opacity, these are the colours themselves."""
        opaque = COLOURS[..., [0, 1, 2, 0]].copy()
        opaque[..., 3] = 255
        (tmp_path / "a.tif").write_bytes(tiff(opaque, 2, t338=(1,)))
        assert np.array_equal(np.asarray(read_rgb(str(tmp_path / "a.tif"))), COLOURS)

    def test_the_first_view_of_a_camera(self, tmp_path: Path):
        CONVERTED["two views of a camera"](tmp_path / "a.jpg")
        assert predicted(tmp_path) == ["a.jpg"]

    def test_a_volume_that_was_predicted_is_no_image(self, tmp_path: Path):
        class Volume(torch.utils.data.Dataset):
            def __len__(self) -> int:
                return 1

            def __getitem__(self, index: int) -> tuple[torch.Tensor, str]:
                return torch.randn(1, 3, 8, 8), "scan.nii"

        run = trainer(callbacks=[MaskWriter(tmp_path / "masks", format="tif")])
        run.predict(SegmentationTask(nn.Identity()), torch.utils.data.DataLoader(Volume()), return_predictions=False)
        (tmp_path / "masks" / "scan_mask.tif").rename(tmp_path / "masks" / "scan.tif")
        with refused(f"{tmp_path}/masks/scan.tif: holds 3 images (pages of a volume, or frames), and one is expected"):
            predicted(tmp_path / "masks")

    @pytest.mark.parametrize("layout", ["lgg", "kaggle"])
    def test_decoded_by_an_earlier_version(self, layout: str, request: pytest.FixtureRequest, tmp_path: Path):
        """An older version may have cached an image that is refused now, or one page of several."""
        folder = request.getfixturevalue(layout)
        files = sorted(folder.rglob("*.tif"))
        sources, shape = files, (20, 4, SIZE, SIZE)
        if layout == "kaggle":
            sources, shape = [folder.parent / "train_labels.csv", *files], (20, 96, 96, 3)
        cache = tmp_path / "cache"
        name = {"lgg": "lgg", "kaggle": "pcam-kaggle"}[layout]
        cached_array(name, sources, shape, lambda array: array.fill(0), cache)
        if layout == "lgg":
            assert trained(tmp_path, max_memory_gb=0, cache_dir=cache).train_set.images[:, :3].any()
        else:
            assert patches(tmp_path).train_set[0][0].any()
        assert len(list(cache.iterdir())) == 2


class TestLinks:
    """All readers follow links, and count no file twice."""

    def test_a_link_to_the_folder_above(self, images: Path, lgg: Path):
        before = names_in(folder_data(images))
        (images / "train" / "n00000001" / "loop").symlink_to("..")
        (images / "train" / "n00000002" / "itself").symlink_to(".")
        (images / "val" / "n00000000" / "root").symlink_to(images)
        with pytest.warns(
            UserWarning, match=r"3 entries are left out: other names of what is listed already \(3: train/n0"
        ):
            assert names_in(folder_data(images)) == before
        (lgg / "loop").mkdir()
        (lgg / "loop" / "above").symlink_to(lgg)
        (patient(lgg, 0) / "above").symlink_to(lgg)
        with pytest.warns(UserWarning, match="2 entries are left out"):
            assert len(predicted(lgg)) == 20
        with pytest.warns(
            UserWarning, match=r"folders where only files are expected \(1: .*; folders without slices \(1"
        ):
            assert slices_in(trained(lgg)) == 20

    def test_folders_that_link_to_each_other(self, tmp_path: Path):
        """There are 2^12 paths from the first folder to the last."""
        for number in range(12):
            (tmp_path / f"{number}").mkdir()
            RGB.save(tmp_path / f"{number}" / "a.png")
            for name in "bc":
                (tmp_path / f"{number}" / name).symlink_to(tmp_path / f"{(number + 1) % 12}")
        with pytest.warns(UserWarning, match="24 entries are left out"):
            assert sorted(predicted(tmp_path)) == sorted(f"{number}/a.png" for number in range(12))

    @pytest.mark.parametrize("folder", [False, True])
    def test_links_to_elsewhere_are_followed(
        self, folder: bool, images: Path, tmp_path_factory: pytest.TempPathFactory
    ):
        elsewhere = tmp_path_factory.mktemp("elsewhere")
        RGB.save(elsewhere / "one.png")
        (elsewhere / "more").mkdir()
        RGB.save(elsewhere / "more" / "two.png")
        target = images / "train" / "n00000001"
        for path in target.iterdir():
            path.unlink()
        RGB.save(target / "own.png")
        if folder:
            (target / "link").symlink_to(elsewhere)
            expected = ["own.png", "link/one.png", "link/more/two.png"]
        else:
            (target / "a.png").symlink_to(elsewhere / "one.png")
            expected = ["a.png", "own.png"]
        assert names_in(folder_data(images))[4:-4] == sorted(f"n00000001/{name}" for name in expected)
        assert predicted(target) == expected

    @pytest.mark.parametrize("link", [os.link, os.symlink])
    def test_two_names_in_one_place_count_once(self, link: Callable, images: Path, lgg: Path):
        folder = images / "train" / "n00000001"
        first = min(folder.iterdir())
        link(first, folder / "0.jpg")
        kept = first.name if link is os.symlink else "0.jpg"  # the first, unless it is a link
        with pytest.warns(UserWarning, match=r"1 entry is left out: other names of what is listed already \(1: "):
            names = names_in(folder_data(images))
        assert len(names) == 12
        assert f"n00000001/{kept}" in names
        with pytest.warns(UserWarning, match="other names"):
            assert predicted(folder)[0] == kept
        folder = patient(lgg, 1)
        for mask in ("", "_mask"):
            link(slice_of(folder, 1, mask), slice_of(folder, 9, mask))
        with pytest.warns(UserWarning, match="1 entry is left out: other names"):
            assert slices_in(trained(lgg)) == 20

    @pytest.mark.parametrize("link", [os.link, os.symlink])
    def test_two_classes(self, link: Callable, images: Path):
        first = min((images / "train" / "n00000001").iterdir())
        other = images / "train" / "n00000000" / "other.jpg"
        link(first, other)
        faults = [f"{other}: is the same file as {first}", f"{first}: is the same file as {other}"]
        for stage in ("fit", "test"):
            with refused(faults[link is os.link]):
                folder_data(images, stage)

    @pytest.mark.parametrize("link", ["file", "folder of the class", "folder of all", "folder inside a class"])
    def test_training_and_test(self, link: str, images: Path):
        test = images / "val" / "n00000001"
        first = min((images / "train" / "n00000001").iterdir())
        if link == "file":
            (test / "a.JPEG").symlink_to(first)
        elif link == "folder inside a class":
            (test / "more").symlink_to(first.parent)
        else:
            replaced = test if "class" in link else test.parent
            shutil.rmtree(replaced)
            replaced.symlink_to(images / "train" / ("n00000001" if "class" in link else ""))
        for stage in ("fit", "test"):
            with pytest.raises(ValueError, match=rf"\n  {images}/val/.*: is the same file as {images}/train/"):
                folder_data(images, stage)

    def test_a_class_that_is_the_folder_of_all(self, images: Path):
        for part in ("train", "val"):
            (images / part / "z").symlink_to(".")
        with pytest.warns(UserWarning, match="2 entries"), pytest.raises(FileNotFoundError, match=r"No images in .*z"):
            folder_data(images)

    def test_two_patients(self, lgg: Path):
        first, other = slice_of(patient(lgg, 0), 1), slice_of(patient(lgg, 3), 2)
        other.unlink()
        other.symlink_to(first)
        with refused(f"{other}: is the same file as {first}, but not of its patient and mask"):
            trained(lgg)

    def test_a_patient_under_two_names(self, lgg: Path):
        (lgg / "TCGA_XX_0000_20000101").symlink_to(patient(lgg, 2))
        with pytest.raises(ValueError, match="for 4 reasons") as caught:
            trained(lgg)
        assert str(caught.value).count("is the same file as") == 4

    def test_a_scan_under_two_days(self, lgg: Path):
        (lgg / "TCGA_CS_4902_20200202").symlink_to(patient(lgg, 2))
        with pytest.warns(UserWarning, match=r"4 entries are left out: .*\(4: TCGA_CS_4902_20200202/.* and 1 more\)"):
            data = trained(lgg)
        assert slices_in(data) == 20
        assert sum(map(len, data.patients.values())) == 5

    def test_one_image_with_two_masks(self, lgg: Path):
        folder = patient(lgg, 0)
        slice_of(folder, 2).unlink()
        slice_of(folder, 2).symlink_to(slice_of(folder, 1))
        with refused(f"{slice_of(folder, 2)}: is the same file as {slice_of(folder, 1)}, but not of its patient"):
            trained(lgg)

    def test_empty_masks_may_be_stored_once(self, lgg: Path):
        """Some programs store equal files once, with links to that file."""
        empty = lgg.parent / "empty.tif"
        Image.new("L", (SIZE, SIZE)).save(empty)
        for number in range(5):
            mask = slice_of(patient(lgg, number), 4, "_mask")
            mask.unlink()
            mask.symlink_to(empty)
        assert slices_in(trained(lgg)) == 20

    def test_two_labels_of_one_patch(self, kaggle: Path):
        first, other, *_ = sorted(kaggle.iterdir())
        other.unlink()
        other.symlink_to(first)
        with refused(f"{other}: is the same file as {first}"):
            patches(kaggle.parent)

    @pytest.mark.parametrize("link", [os.link, os.symlink])
    @pytest.mark.parametrize("what", ["x", "y"])
    def test_two_splits(self, what: str, link: Callable, tmp_path: Path):
        write_pcam(tmp_path, (12, 12, 4))
        train, valid = (tmp_path / "pcam" / PCAM.format(split=split, what=what) for split in ("train", "valid"))
        valid.unlink()
        link(train, valid)
        for read in ("prepare_data", "setup"):
            with pytest.raises(ValueError, match=f"^{valid} is the same file as {train}: get it from"):
                getattr(PCamDataModule(tmp_path), read)(*["fit"] * (read == "setup"))

    def test_file_systems_without_inodes(self, images: Path, monkeypatch: pytest.MonkeyPatch):
        """On such file systems, all inodes are 0."""
        folder = images / "train" / "n00000001"
        (folder / "0.jpg").symlink_to(min(folder.iterdir()))
        paths = [str(path) for path in sorted(folder.iterdir())]
        stat = os.stat
        monkeypatch.setattr(os, "stat", lambda path: os.stat_result((stat(path).st_mode, 0, *stat(path)[2:])))
        assert same_files(paths, [0] * 5) == [(1, 0)]


class TestNames:
    def test_capital_suffixes(self, lgg: Path, kaggle: Path, images: Path):
        for path in [*lgg.rglob("*.tif"), *kaggle.rglob("*.tif")]:
            path.rename(path.with_suffix(".TIF"))
        assert slices_in(trained(lgg)) == len(predicted(lgg)) == 20
        assert len(patches(kaggle.parent).train_set) > 0

    def test_patients_of_any_name(self, lgg: Path):
        for number, name in enumerate(["Müller", "patient 7", "007"]):
            folder = patient(lgg, number)
            folder.rename(folder.with_name(name))
        data = trained(lgg)
        assert slices_in(data) == 20
        assert {"Müller", "patient 7", "007"} <= {name for names in data.patients.values() for name in names}
        for folder in lgg.glob("TCGA_*"):
            folder.rename(folder.with_name(folder.name[5:]))
        for root in (lgg, lgg.parent):
            assert slices_in(trained(root)) == 20

    def test_folders_beside_the_patients(self, lgg: Path):
        """If there is a folder `kaggle_3m`, the folders beside it are not patients."""
        write_image_folder(lgg.parent, classes=1, train=2, val=2)
        assert slices_in(trained(lgg.parent)) == 20

    @pytest.mark.parametrize("mask", ["", "_mask"])
    @pytest.mark.parametrize("suffix", [".tiff", ".TIF", ".png"])
    def test_two_files_of_one_name(self, mask: str, suffix: str, lgg: Path):
        path = slice_of(patient(lgg, 2), 3, mask)
        twin = path.with_suffix(suffix)
        Image.open(path).save(twin, format="TIFF" if suffix != ".png" else "PNG")
        first, other = sorted([path, twin], key=lambda path: path.name)
        with refused(f"{other}: differs from {first.name} only in the suffix"):
            trained(lgg)

    def test_two_patches_of_one_name(self, kaggle: Path):
        path = min(kaggle.iterdir())
        shutil.copy(path, path.with_suffix(".tiff"))
        with refused(f"{path.with_suffix('.tiff')}: differs from {path.name} only in the suffix"):
            patches(kaggle.parent)

    @pytest.mark.parametrize("suffix", [".tiff", ".png", ".PNG", ".bmp"])
    def test_masks_of_another_suffix(self, suffix: str, lgg: Path):
        before = trained(lgg)
        for path in lgg.rglob("*_mask.tif"):
            with Image.open(path) as image:
                image.save(path.with_suffix(suffix))
            path.unlink()
        after = trained(lgg)
        assert np.array_equal(before.train_set.images, after.train_set.images)

    @pytest.mark.parametrize("format", ["png", "tif"])
    def test_predicted_masks_are_read_back(self, format: str, lgg: Path, tmp_path: Path):
        class Bright(nn.Module):
            def forward(self, images: torch.Tensor) -> torch.Tensor:
                return images[:, 1:2] - 1

        data = LGGDataModule("nowhere", predict_root=lgg)
        run = trainer(callbacks=[MaskWriter(tmp_path / "out", format=format)])
        run.predict(SegmentationTask(Bright()), datamodule=data, return_predictions=False)
        slices = data.predict_set.images[:, 1].astype(np.float32) / 255
        marked = (slices - data.mean[1]) / data.std[1] >= 1
        for path in lgg.rglob("*_mask.tif"):
            path.unlink()
        shutil.copytree(tmp_path / "out", lgg, dirs_exist_ok=True)
        (lgg / "scores.csv").unlink()
        assert np.array_equal(trained(lgg).train_set.images[:, 3], marked)
        assert len(predicted(lgg)) == 20  # without the masks

    def test_masks_of_several_classes(self, tmp_path: Path):
        for name in ("a.png", "a_mask_0.png", "a_mask_1.tif", "b_mask_0.png", "gas_mask.png"):
            RGB.save(tmp_path / name)
        with pytest.warns(UserWarning, match=r"masks without an image beside them \(2: b_mask_0.png, gas_mask.png\)"):
            assert predicted(tmp_path) == ["a.png"]
        (tmp_path / "a.png").unlink()
        with pytest.warns(UserWarning, match="4: "), pytest.raises(FileNotFoundError, match="and are not masks"):
            predicted(tmp_path)

    @pytest.mark.parametrize("mask", ["_MASK", "_Mask"])
    def test_masks_in_capitals(self, mask: str, lgg: Path):
        before = trained(lgg)
        for path in lgg.rglob("*_mask.tif"):
            path.rename(path.with_name(path.name.replace("_mask", mask)))
        assert len(predicted(lgg)) == 20
        assert np.array_equal(before.train_set.images, trained(lgg).train_set.images)
        for folder in lgg.glob("TCGA_*"):
            folder.rename(folder.with_name(folder.name[5:]))
        assert slices_in(trained(lgg)) == 20

    def test_masks_that_differ_in_their_case(self, lgg: Path):
        path = slice_of(patient(lgg, 2), 3, "_mask")
        shutil.copy(path, slice_of(patient(lgg, 2), 3, "_MASK"))
        with refused(f"{path}: differs from {path.stem[:-5]}_MASK.tif only in the suffix or the case of letters"):
            trained(lgg)

    def test_dates_of_other_data_are_none(self, tmp_path: Path):
        """In other names than `TCGA_*`, eight digits may be the number of a patient."""
        write_lgg(tmp_path, patients=10)
        names = [f"case_{number:08d}" for number in range(10)]
        for folder, name in zip(list((tmp_path / "kaggle_3m").iterdir()), names, strict=True):
            folder.rename(folder.with_name(name))
        assert sorted(name for listed in trained(tmp_path).patients.values() for name in listed) == names

    def test_a_second_mask(self, lgg: Path):
        path = slice_of(patient(lgg, 2), 3, "_mask_1")
        shutil.copy(slice_of(patient(lgg, 2), 3, "_mask"), path)
        with refused(f"{path}: is a second mask of {slice_of(patient(lgg, 2), 3).name}"):
            trained(lgg)

    def test_both_copies_in_the_archive(self, lgg: Path):
        shutil.copytree(lgg, lgg.parent / "lgg-mri-segmentation" / "kaggle_3m")
        assert slices_in(trained(lgg.parent)) == 20

    def test_the_order_is_torchvisions(self, images: Path):
        for name in ("b/2.png", "b/10.png", "B/1.png", "a.b/1.png", "a/1.png", "a.png", "Z.PNG", "ä.png"):
            (images / "val" / "n00000001" / name).parent.mkdir(exist_ok=True)
            RGB.save(images / "val" / "n00000001" / name)
        data = folder_data(images, "test").test_set
        expected = [(os.fsencode(path), label) for path, label in ImageFolder(images / "val").samples]
        assert list(zip(data.paths.tolist(), data.labels.tolist(), strict=True)) == expected

    @pytest.mark.skipif(sys.platform != "linux", reason="names are unicode elsewhere")
    def test_names_that_are_not_utf_8(self, lgg: Path, images: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture):
        # Patients are named in the log, and pytest-xdist sends nothing on that is not UTF-8.
        caplog.set_level("WARNING", "lightning.pytorch.utilities.rank_zero")
        name = os.fsdecode(b"M\xfcller")
        folder = lgg / name
        patient(lgg, 0).rename(folder)
        data = LGGDataModule(lgg)
        run = trainer(logger=CSVLogger(tmp_path / "logs"), callbacks=[MaskWriter(tmp_path / "out")])
        run.fit(SegmentationTask(nn.Conv2d(3, 1, 1)), datamodule=data)
        run.save_checkpoint(tmp_path / "a.ckpt")
        loaded = torch.load(tmp_path / "a.ckpt", weights_only=True)["LGGDataModule"]["patients"]
        assert name in {patient for patients in loaded.values() for patient in patients}
        (folder / f"{name}.tif").symlink_to(min(path for path in folder.iterdir() if "mask" not in path.name))
        with pytest.warns(UserWarning, match="1 entry is left out"):
            predicted(folder)
        (folder / f"{name}.tif").unlink()
        predict = LGGDataModule("nowhere", predict_root=lgg)
        run.predict(SegmentationTask(nn.Conv2d(3, 1, 1)), datamodule=predict, return_predictions=False)
        with (tmp_path / "out" / "scores.csv").open(newline="", encoding="utf-8", errors="surrogateescape") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 20
        assert all((lgg / row["image"]).is_file() and (tmp_path / "out" / row["mask"]).is_file() for row in rows)
        path = images / "val" / "n00000001" / f"{name}.jpg"
        RGB.save(path)
        assert os.fsencode(path) in folder_data(images, "test").test_set.paths.tolist()


LITTER = [".DS_Store", "._a.tif", "Thumbs.db", "desktop.ini", "README", "notes.txt", "data.csv", ".hidden/b.png"]


class TestSkipped:
    @pytest.mark.parametrize("reader", ["train", "predict", "images", "patches"])
    def test_not_worth_a_word(self, reader: str, lgg: Path, images: Path, kaggle: Path):
        within = {
            "train": [lgg, patient(lgg, 0)],
            "predict": [lgg, patient(lgg, 0)],
            "images": [images / "train", images / "val" / "n00000001"],
            "patches": [kaggle],
        }[reader]
        read: dict[str, Callable[[], int]] = {
            "train": lambda: slices_in(trained(lgg)),
            "predict": lambda: len(predicted(lgg)),
            "images": lambda: len(names_in(folder_data(images))),
            "patches": lambda: len(patches(kaggle.parent).train_set),
        }
        before = read[reader]()
        for folder in within:
            for name in LITTER:
                (folder / name).parent.mkdir(exist_ok=True)
                (folder / name).write_bytes(b"no image")
        assert read[reader]() == before  # warnings are errors

    def test_named_once_with_their_number(self, lgg: Path, images: Path, kaggle: Path):
        for folder in (patient(lgg, 0), images / "train" / "n00000000", images / "val", kaggle):
            for name in ("c.gif", "a.nii", "b.dcm", "d.jp2"):
                (folder / name).write_bytes(b"no image")
        RGB.save(lgg / "loose.png")
        RGB.save(images / "train" / "loose.png")
        (kaggle / "more").mkdir()
        name = patient(lgg, 0).name

        def read() -> None:
            for stage in ("fit", "validate", "test"):
                trained(lgg).setup(stage)
                folder_data(images, stage)
                patches(kaggle.parent)
                predicted(patient(lgg, 0))

        with pytest.warns(UserWarning, match="left out") as caught:
            read()
        others = "a.nii, b.dcm, c.gif and 1 more"
        assert sorted(str(warning.message) for warning in caught) == sorted(
            [
                f"{lgg}: 5 entries are left out: of other types (4: {name}/a.nii, {name}/b.dcm, {name}/c.gif and 1 "
                "more); outside of the folders that hold the images (1: loose.png).",
                f"{images}: 9 entries are left out: of other types (8: train/n00000000/a.nii, train/n00000000/b.dcm, "
                "train/n00000000/c.gif and 5 more); outside of the folders that hold the images (1: train/loose.png).",
                f"{kaggle}: 5 entries are left out: folders where only files are expected (1: more); of other types "
                f"(4: {others}).",
                f"{patient(lgg, 0)}: 4 entries are left out: of other types (4: {others}).",
            ]
        )

    def test_hidden_folders_are_no_classes(self, images: Path):
        (images / "train" / ".ipynb_checkpoints").mkdir()
        (images / "val" / "__MACOSX").mkdir()
        assert folder_data(images).num_classes == 3


class TestUnreachable:
    """Files and folders that may hide images are refused by name."""

    @pytest.mark.parametrize("target", ["gone.tif", "itself"])
    def test_broken_links(self, target: str, lgg: Path, images: Path, kaggle: Path):
        def broken(path: Path) -> str:
            path.unlink(missing_ok=True)
            path.symlink_to(path.name if target == "itself" else target)
            return f"{path}: is a link that cannot be followed ("

        image, mask = slice_of(patient(lgg, 0), 1), slice_of(patient(lgg, 1), 2, "_mask")
        with refused(
            broken(image),
            f"{slice_of(patient(lgg, 0), 1, '_mask')}: has no image",
            broken(mask),
            f"{slice_of(patient(lgg, 1), 2)}: has no mask",
        ):
            trained(lgg)
        with refused(f"{image}: is a link", f"{mask}: is a link"):
            predicted(lgg)
        with refused(broken(images / "train" / "n00000002" / "a.jpg")):
            folder_data(images)
        patch = min(kaggle.iterdir())
        with refused(broken(patch), f"{patch}: is missing"):
            patches(kaggle.parent)

    @pytest.mark.parametrize("name", ["more", "more.v2", "TCGA_CS_4999_20000101"])
    @pytest.mark.parametrize("target", ["/nowhere/unmounted", "itself"])
    def test_links_that_may_have_led_to_folders(
        self, name: str, target: str, lgg: Path, images: Path, kaggle: Path, tmp_path_factory: pytest.TempPathFactory
    ):
        def broken(folder: Path) -> str:
            (folder / name).symlink_to(name if target == "itself" else target)
            return f"{folder / name}: is a link that cannot be followed ("

        faults = [broken(folder) for folder in (lgg, patient(lgg, 0))]
        for read in (trained, predicted):
            with refused(*faults):
                read(lgg)
        faults = [broken(images / "train" / "n00000000"), broken(images / "val" / "n00000001")]
        with refused(*faults):
            folder_data(images)
        of_classes = [broken(images / part) for part in ("train", "val")]
        for stage in ("fit", "test"):
            with refused(*of_classes):
                folder_data(images, stage)
        (images / "val" / name).unlink()
        with refused(of_classes[0]):
            folder_data(images)
        with refused(broken(kaggle)):
            patches(kaggle.parent)

    def test_no_patients_but_links_that_lead_nowhere(self, tmp_path: Path):
        (tmp_path / "kaggle_3m").mkdir()
        path = tmp_path / "kaggle_3m" / "TCGA_CS_4999_20000101"
        path.symlink_to("gone")
        with refused(f"{path}: is a link that cannot be followed"):
            trained(tmp_path)

    def test_other_data_in_place_of_what_a_link_led_to(self, lgg: Path, tmp_path: Path):
        """An older copy beside the broken link must not be read in its place."""
        shutil.copytree(lgg, tmp_path / "lgg-mri-segmentation" / "kaggle_3m")
        shutil.rmtree(lgg)
        lgg.symlink_to("gone")
        with pytest.raises(FileNotFoundError, match=f"^{lgg} is a link that leads nowhere: "):
            trained(tmp_path)

    @pytest.mark.parametrize("link", ["pcam", "pcam/camelyonpatch_level_2_split_train_x.h5"])
    def test_other_patches_in_place_of_what_a_link_led_to(self, link: str, kaggle: Path):
        root = kaggle.parent.parent
        (root / link).parent.mkdir(exist_ok=True)
        (root / link).symlink_to("gone")
        with pytest.raises(FileNotFoundError, match=f"^{root / link} is a link that leads nowhere: "):
            patches(root)

    def test_links_of_texts_are_not_worth_a_word(self, lgg: Path, images: Path, kaggle: Path):
        for folder in (lgg, patient(lgg, 0), images / "train", images / "val" / "n00000001", kaggle):
            for name in ("data.csv", "notes.txt", ".hidden"):
                (folder / name).symlink_to("gone")
        assert slices_in(trained(lgg)) == len(predicted(lgg)) == 20
        folder_data(images)
        patches(kaggle.parent)

    @pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="there are no pipes")
    def test_pipes(self, images: Path):
        """Reading a named pipe would never end."""
        path = images / "train" / "n00000002" / "a.jpg"
        os.mkfifo(path)
        with refused(f"{path}: is neither a file nor a folder"):
            folder_data(images)
        with refused(f"{path}: is neither a file nor a folder"):
            predicted(path.parent)

    @pytest.mark.skipif(sys.platform == "win32", reason="chmod keeps nobody from reading on Windows")
    def test_folders_that_cannot_be_listed(self):
        with tempfile.TemporaryDirectory() as made:  # not tmp_path, where others than its owner see nothing at all
            root = Path(made)
            root.chmod(0o777)
            write_lgg(root / "lgg")
            write_image_folder(root / "images", classes=2, train=4, val=2)
            lgg, inside = root / "lgg" / "kaggle_3m", root / "images" / "train" / "n00000001" / "inside"
            inside.mkdir()
            folder = patient(lgg, 2)
            folder.chmod(0)
            inside.chmod(0)
            with as_somebody_else():
                with refused(f"{folder}: cannot be listed (Permission denied)"):
                    trained(lgg)
                with refused(f"{folder}: cannot be listed (Permission denied)"):
                    predicted(lgg)
                with refused(f"{inside}: cannot be listed (Permission denied)"):
                    folder_data(root / "images")
            folder.chmod(0o700)

    def test_empty_files(self, lgg: Path, images: Path):
        path = slice_of(patient(lgg, 0), 1)
        path.write_bytes(b"")
        with refused(f"{path}: cannot be read as an image"):
            predicted(lgg)
        path = images / "val" / "n00000000" / "a.jpg"
        path.touch()
        with pytest.raises(RuntimeError, match=f"^{path} cannot be read as an image"):
            folder_data(images, "test").test_set[0]

    def test_many_faults(self, images: Path):
        folder = images / "train" / "n00000002"
        for number in range(1005):
            (folder / f"{number}.jpg").symlink_to("gone")
        with pytest.raises(ValueError, match="for 1005 reasons") as caught:
            folder_data(images)
        assert len(str(caught.value).splitlines()) == 1002
        assert str(caught.value).endswith("\n  and 5 more")
