"""Own images and masks in two folders: kinds of files, classes, patients, sizes, normalization, and every refusal."""

import contextlib
import csv
import math
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.loggers import CSVLogger
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from lightning_znorm import MaskWriter
from lightning_znorm.batches import cases_of, has_targets
from lightning_znorm.data import MaskFolderDataModule, mask_files
from lightning_znorm.data.datasets import MaskedImages
from lightning_znorm.data.resizing import resized_mask
from lightning_znorm.tasks import SegmentationTask
from tests.data.odd_images import DEEP, REFUSED, png, tiff
from tests.medical import write_mask_folder
from tests.trainers import trainer

RNG = np.random.default_rng(0)
PATTERN = "^([^_]+)_"
EXCLUSIVE: dict[str, Any] = {"mask_values": [0, 128, 255], "patient_pattern": PATTERN}


class Witness(LightningModule):
    """Records the batches of every stage, as they reach a step."""

    def __init__(self, channels: int = 3) -> None:
        super().__init__()
        self.layer = torch.nn.Conv2d(channels, 1, 1)
        self.seen: dict[str, list[Any]] = {"train": [], "val": [], "test": [], "predict": []}

    def training_step(self, batch, batch_idx):
        self.seen["train"].append(batch)
        return self.layer(batch[0]).square().mean()

    def validation_step(self, batch, batch_idx):
        self.seen["val"].append(batch)

    def test_step(self, batch, batch_idx):
        self.seen["test"].append(batch)

    def predict_step(self, batch, batch_idx):
        self.seen["predict"].append(batch)
        return self.layer(batch[0])

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def write(root: Path, images: dict[str, Any], masks: dict[str, Any]) -> Path:
    """Write arrays as the files that their names say, or bytes as they are."""
    for folder, files in (("images", images), ("masks", masks)):
        (root / folder).mkdir(parents=True, exist_ok=True)
        for name, content in files.items():
            path = root / folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, bytes):
                path.write_bytes(content)
            elif path.suffix == ".npy":
                np.save(path, content)
            else:
                Image.fromarray(content).save(path)
    return root


def several(image: Any, mask: Any, names: tuple[str, str], count: int = 4) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the same image and mask under ``count`` names."""
    first, second = names
    return {f"{number}{first}": image for number in range(count)}, {
        f"{number}{second}": mask for number in range(count)
    }


def set_up(root: Path, stage: str = "fit", **kwargs: Any) -> MaskFolderDataModule:
    kwargs.setdefault("val_fraction", 0.25)
    kwargs.setdefault("test_fraction", 0.25)
    data = MaskFolderDataModule(root, **kwargs)
    data.setup(stage)
    return data


def stored(data: MaskFolderDataModule) -> dict[str, tuple[NDArray[Any], NDArray[Any]]]:
    """Return the values of images, channels last, and the classes of masks, as the data module holds them, by name."""
    names = data.test_set.cases["name"]
    found = {}
    for part in (data.train_set, data.val_set, data.test_set):
        for number, row in enumerate(part.rows):
            image, mask = part[number]
            found[names[row]] = image.permute(1, 2, 0).numpy(), mask[0].numpy()
    return found


@contextlib.contextmanager
def refused(*faults: str) -> Iterator[None]:
    """Check that each fault is a line of the error, and that there are no other lines."""
    with pytest.raises(ValueError, match=f"for {len(faults)} reason") as caught:
        yield
    lines = [line.strip() for line in str(caught.value).splitlines()[1:]]
    assert len(lines) == len(faults), lines
    for line, fault in zip(sorted(lines), sorted(faults), strict=True):
        assert line.startswith(fault), line


@pytest.fixture
def nuclei(tmp_path: Path) -> Path:
    """Write 6 patients with 3 images each, RGB of 8 bits, and masks of 0, 128 (nucleus) and 255 (border)."""
    write_mask_folder(tmp_path / "my nuclei")
    return tmp_path / "my nuclei"


GREY, COLOURS = DEEP[..., 0], DEEP[..., :3]
KINDS: dict[str, tuple[str, Any, Any]] = {
    "grey 8 png": (".png", (GREY >> 8).astype(np.uint8), (GREY >> 8).astype(np.uint8)),
    "grey 8 bmp": (".bmp", (GREY >> 8).astype(np.uint8), (GREY >> 8).astype(np.uint8)),
    "grey 8 tif": (".tif", (GREY >> 8).astype(np.uint8), (GREY >> 8).astype(np.uint8)),
    "grey 8 npy": (".npy", (GREY >> 8).astype(np.uint8), (GREY >> 8).astype(np.uint8)),
    "RGB 8 png": (".PNG", (COLOURS >> 8).astype(np.uint8), (COLOURS >> 8).astype(np.uint8)),
    "RGB 8 tiff": (".tiff", (COLOURS >> 8).astype(np.uint8), (COLOURS >> 8).astype(np.uint8)),
    "RGB 8 npy": (".npy", (COLOURS >> 8).astype(np.uint8), (COLOURS >> 8).astype(np.uint8)),
    "grey 16 png": (".png", GREY, GREY),
    "grey 16 tif": (".tif", GREY, GREY),
    "grey 16 tif, big-endian": (".tif", tiff(GREY[..., None].astype(">u2"), 1), GREY),
    "grey 16 npy": (".npy", GREY, GREY),
    "grey 16 npy, big-endian": (".npy", GREY.astype(">u2"), GREY),
    "RGB 16 npy": (".npy", COLOURS, COLOURS),
}


class TestKinds:
    @pytest.mark.parametrize("kind", KINDS)
    def test_values_are_those_in_the_files(self, kind: str, tmp_path: Path):
        suffix, content, pixels = KINDS[kind]
        mask = RNG.choice([0, 255], pixels.shape[:2]).astype(np.uint8)
        data = set_up(write(tmp_path, *several(content, mask, (suffix, ".png"))))
        for image, found in stored(data).values():
            assert np.array_equal(image, np.atleast_3d(pixels))
            assert np.array_equal(found, mask // 255)
        assert data.max_value == (65535 if "16" in kind else 255)
        values = np.atleast_3d(pixels).reshape(-1, 3 if pixels.ndim == 3 else 1) / data.max_value
        np.testing.assert_allclose(data.mean, values.mean(axis=0), rtol=1e-12)
        np.testing.assert_allclose(data.std, values.std(axis=0), rtol=1e-9)
        images, _ = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
        expected = ((values - values.mean(axis=0)) / values.std(axis=0)).reshape(*pixels.shape[:2], -1)
        np.testing.assert_allclose(images[0].permute(1, 2, 0), expected, rtol=1e-4, atol=1e-4)

    def test_jpeg(self, tmp_path: Path):
        image = np.full((16, 16, 3), 77, np.uint8)
        data = set_up(write(tmp_path, *several(image, np.eye(16, dtype=np.uint8), (".jpg", ".png"))))
        assert all(np.abs(found.astype(int) - 77).max() <= 1 for found, _ in stored(data).values())

    @pytest.mark.parametrize(
        ("name", "make"),
        [
            ("m.png", lambda mask: mask),
            ("m.tif", lambda mask: mask),
            ("m.bmp", lambda mask: mask),
            ("m.png", lambda mask: mask.astype(np.uint16)),
            ("m.npy", lambda mask: mask),
            ("m.npy", lambda mask: mask.astype(np.int64)),
            ("m.npy", lambda mask: mask.astype(bool)),
            ("m.png", lambda mask: mask.astype(bool)),
        ],
    )
    def test_masks(self, name: str, make: Any, tmp_path: Path):
        mask = RNG.integers(0, 2, (16, 16), dtype=np.uint8)
        data = set_up(write(tmp_path, *several(mask, make(mask), (".png", name[1:]))))
        assert all(np.array_equal(found, mask) for _, found in stored(data).values())

    def test_mask_with_a_palette(self, tmp_path: Path):
        numbers = RNG.integers(0, 3, (16, 16), dtype=np.uint8)
        write(tmp_path, *several(numbers, numbers, (".png", ".png")))
        image = Image.new("P", (16, 16))
        image.putdata(numbers.ravel().tolist())
        image.putpalette([0, 0, 0, 200, 30, 30, 20, 250, 10])
        for path in (tmp_path / "masks").iterdir():
            image.save(path)
        data = set_up(tmp_path, num_classes=3)
        assert all(np.array_equal(found, numbers) for _, found in stored(data).values())

    @pytest.mark.parametrize("white", ["where it is marked", "all", "nowhere"])
    def test_grey_palette_in_another_order(self, white: str, tmp_path: Path):
        """Pillow's quantize numbers colours from bright to dark: the background would count as marked."""
        image, marked = np.zeros((16, 16), np.uint8), np.zeros((16, 16), np.uint8)
        marked[4:9, 2:] = {"where it is marked": 255, "all": 255, "nowhere": 0}[white]
        if white == "all":
            marked[:] = 255
        write(tmp_path, *several(image, marked, (".png", ".png")))
        paths = sorted((tmp_path / "masks").iterdir())
        for path in paths:
            Image.fromarray(marked).quantize(2).save(path)
        if white == "nowhere":
            assert not any(mask.any() for _, mask in stored(set_up(tmp_path)).values())
            return
        fault = "has a grey palette whose numbers do not begin with black and become brighter"
        with refused(*[f"{path}: {fault}" for path in paths]):
            set_up(tmp_path)
        with refused(*[f"{path}: {fault}" for path in paths]):
            set_up(tmp_path, num_classes=3)
        for mask_values in ({0: 1, 1: 0}, {0: 1, 1: 0, 2: 2}):
            for _, mask in stored(set_up(tmp_path, mask_values=mask_values)).values():
                assert np.array_equal(mask, marked // 255)

    def test_grey_palette_from_dark_to_bright(self, tmp_path: Path):
        numbers = RNG.integers(0, 2, (16, 16), dtype=np.uint8)
        write(tmp_path, *several(numbers, numbers, (".png", ".png")))
        for path in (tmp_path / "masks").iterdir():
            image = Image.fromarray(numbers).convert("P")
            image.putpalette([0, 0, 0, 255, 255, 255, 0, 0, 0])
            image.save(path)
        assert all(np.array_equal(mask, numbers) for _, mask in stored(set_up(tmp_path)).values())

    @pytest.mark.parametrize("mode", ["RGB", "RGBA", "LA"])
    def test_mask_in_grey_colours(self, mode: str, tmp_path: Path):
        mask = np.eye(16, dtype=np.uint8) * 255
        write(tmp_path, *several(mask, mask, (".png", ".png")))
        Image.fromarray(mask).convert(mode).save(tmp_path / "masks" / "1.png")
        ending = "is expected. All its colours are grey: save it as grey, in Pillow by image.convert('L')"
        with pytest.raises(ValueError, match=f"1.png: has pixels of Pillow's mode {mode}, and .* {re.escape(ending)}$"):
            set_up(tmp_path)
        if mode != "LA":
            colours = np.stack([mask, mask, mask // 2], axis=-1)
            Image.fromarray(colours).convert(mode).save(tmp_path / "masks" / "1.png")
            with pytest.raises(ValueError, match=r"I;16 is expected$"):
                set_up(tmp_path)

    @pytest.mark.parametrize("kind", REFUSED)
    def test_refused_as_by_every_reader_but_for_16_bits(self, kind: str, tmp_path: Path):
        make, reason = REFUSED[kind]
        write(tmp_path, *several(KINDS["RGB 8 png"][1], np.eye(32, dtype=np.uint8), (".png", ".png")))
        make(tmp_path / "images" / "0.png")
        if kind in ("grey 16 TIFF", "grey 16 TIFF, LZW", "grey 16 PNG"):
            reason = "is grey of 16 bits, and the other images RGB of 8 bits: images of one kind are expected"
        elif kind in ("RGB 16 PNG", "RGB 16 TIFF", "grey 16 PNG with alpha"):
            reason = (
                "has more than 8 bits for each channel, and 16 are read of grey PNG and TIFF files alone (save others"
            )
        with refused(f"{tmp_path}/images/0.png: {reason}"):
            set_up(tmp_path)

    @pytest.mark.parametrize(
        ("name", "content", "fault"),
        [
            (
                "0.npy",
                np.zeros((8, 8, 4), np.uint8),
                "is an array of shape (8, 8, 4), and (H, W) or, for RGB, (H, W, 3)",
            ),
            ("0.npy", np.zeros((8, 8), np.float32), "is an array of float32, and uint8 or uint16 is expected"),
            ("0.npy", np.zeros((0, 8), np.uint8), "is an array of shape (0, 8), and"),
            ("0.npy", b"\x93NUMPY\x01\x00", "cannot be read as an array ("),
            ("0.npy", b"", "cannot be read as an array ("),
            ("0.png", b"", "cannot be read as an image ("),
            ("0.png", png(DEEP[..., :1], 0)[:1500], "cannot be read as an image ("),
            ("0.png", np.zeros((8, 8, 4), np.uint8), "has pixels of Pillow's mode RGBA, and L or 1 or RGB or I;16 is"),
            (
                "0.png",
                np.zeros((8, 8, 3), np.uint8),
                "is RGB of 8 bits, and the other images grey of 8 bits: images of",
            ),
            (
                "0.npy",
                np.zeros((8, 8), np.uint16),
                "is grey of 16 bits, and the other images grey of 8 bits: images of",
            ),
            (
                "0.png",
                np.zeros((8, 6), np.uint8),
                "is 8x6 pixels (height x width), and the other images 8x8: set image_s",
            ),
        ],
    )
    def test_odd_image(self, name: str, content: Any, fault: str, tmp_path: Path):
        images, masks = several(np.zeros((8, 8), np.uint8), np.eye(8, dtype=np.uint8), (".png", ".png"))
        del images["0.png"]
        if isinstance(content, np.ndarray) and 0 not in content.shape:
            masks["0.png"] = np.eye(8, content.shape[1], dtype=np.uint8)
        with refused(f"{tmp_path}/images/{name}: {fault}"):
            set_up(write(tmp_path, {name: content, **images}, masks))

    @pytest.mark.parametrize(
        ("name", "content", "fault"),
        [
            ("0.npy", np.zeros((8, 8), np.float32), "is an array of float32, and whole numbers are expected"),
            ("0.npy", np.zeros((8, 8, 1), np.uint8), "is an array of shape (8, 8, 1), and (H, W) is expected"),
            ("0.npy", np.full((8, 8), -3), "is a mask with the values -3, which no file of 16 bits holds"),
            ("0.npy", np.full((8, 8), -3, np.int8), "is a mask with the values -3, which no file of 16 bits holds"),
            (
                "0.npy",
                np.full((8, 8), 2**40),
                "is a mask with the values 1099511627776, which no file of 16 bits holds",
            ),
            ("0.png", np.zeros((8, 8, 3), np.uint8), "has pixels of Pillow's mode RGB, and L or 1 or P or I;16 is"),
            ("0.png", np.zeros((8, 6), np.uint8), "is 8x6 pixels (height x width), and its image 8x8"),
            ("0.png", b"no mask", "cannot be read as an image ("),
        ],
    )
    @pytest.mark.parametrize("image_size", [None, 8])
    def test_odd_mask(self, name: str, content: Any, fault: str, image_size: int | None, tmp_path: Path):
        images, masks = several(np.zeros((8, 8), np.uint8), np.eye(8, dtype=np.uint8), (".png", ".png"))
        del masks["0.png"]
        with refused(f"{tmp_path}/masks/{name}: {fault}"):
            set_up(write(tmp_path, images, {name: content, **masks}), image_size=image_size)

    def test_an_archive_of_arrays(self, tmp_path: Path):
        images, masks = several(np.zeros((8, 8), np.uint8), np.eye(8, dtype=np.uint8), (".png", ".png"))
        write(tmp_path, images, masks)
        (tmp_path / "masks" / "0.png").unlink()
        np.savez(tmp_path / "masks" / "0", a=1)
        (tmp_path / "masks" / "0.npz").rename(tmp_path / "masks" / "0.npy")
        with refused(f"{tmp_path}/masks/0.npy: is an archive of arrays, and one array is expected"):
            set_up(tmp_path)


class TestNames:
    def test_pairs_by_path_whatever_the_type(self, tmp_path: Path):
        images = {"a.png": np.full((8, 8), 1, np.uint8), "b/a.npy": np.full((8, 8), 2, np.uint8),
                  "b/c.tif": np.full((8, 8), 3, np.uint8), "d.x.bmp": np.full((8, 8), 4, np.uint8)}  # fmt: skip
        masks = {}
        for number, name in enumerate(("a.tif", "b/a.png", "b/c.npy", "d.x.png")):
            masks[name] = np.zeros((8, 8), np.uint8)
            masks[name][number] = 255
        found = stored(set_up(write(tmp_path, images, masks)))
        assert sorted(found) == ["a.png", "b/a.npy", "b/c.tif", "d.x.bmp"]
        for number, name in enumerate(sorted(found)):
            image, mask = found[name]
            assert (image == number + 1).all()
            assert mask.sum(axis=1).nonzero()[0].tolist() == [number]

    def test_mask_suffix(self, nuclei: Path):
        before = stored(set_up(nuclei, **EXCLUSIVE))
        for path in sorted((nuclei / "masks").iterdir()):
            path.rename(path.with_stem(f"{path.stem}_mask"))
        after = stored(set_up(nuclei, mask_suffix="_mask", **EXCLUSIVE))
        assert before.keys() == after.keys()
        assert all(np.array_equal(before[name][1], after[name][1]) for name in before)
        (nuclei / "masks" / "p5_2_mask.png").rename(nuclei / "masks" / "p5_2.png")
        with refused(
            f"{nuclei}/images/p5_2.png: has no mask, {nuclei}/masks/p5_2_mask.*",
            f"{nuclei}/masks/p5_2.png: its name does not end in mask_suffix, _mask",
        ):
            set_up(nuclei, mask_suffix="_mask", **EXCLUSIVE)

    def test_without_partner_and_twice(self, nuclei: Path):
        (nuclei / "masks" / "p1_1.png").unlink()
        (nuclei / "images" / "p2_2.png").unlink()
        np.save(nuclei / "masks" / "p3_0.npy", np.zeros((32, 32), np.uint8))
        with refused(
            f"{nuclei}/images/p1_1.png: has no mask, {nuclei}/masks/p1_1.*",
            f"{nuclei}/masks/p2_2.png: has no image, {nuclei}/images/p2_2.*",
            f"{nuclei}/masks/p3_0.png: differs from p3_0.npy only in the suffix",
        ):
            set_up(nuclei, **EXCLUSIVE)

    def test_all_faults_in_one_error_before_training(self, nuclei: Path):
        (nuclei / "images" / "p0_0.png").write_bytes(b"")
        (nuclei / "images" / "nobody.png").write_bytes(b"")
        Image.fromarray(np.full((32, 32), 7, np.uint8)).save(nuclei / "masks" / "p1_0.png")
        data = MaskFolderDataModule(nuclei, **EXCLUSIVE)
        with refused(
            f"{nuclei}/images/nobody.png: cannot be read",
            f"{nuclei}/images/nobody.png: has no mask",
            f"{nuclei}/images/nobody.png: patient_pattern finds no patient in 'nobody'",
            f"{nuclei}/images/p0_0.png: cannot be read",
            f"{nuclei}/masks/p1_0.png: is a mask with the values 7 besides 0, 128, 255",
            f"{nuclei}/masks: the masks hold the values 0, 7, 128, 255: let mask_values give the class of each, such "
            "as mask_values: {0: 0, 7: 3, 128: 1, 255: 2}, with 255 as the class of pixels that do not count",
        ):
            trainer().fit(Witness(), datamodule=data)

    @pytest.mark.parametrize("made", [None, "images", "masks", "both"])
    def test_nothing_there(self, made: str | None, tmp_path: Path):
        for name in ("images", "masks") if made == "both" else [made] if made else []:
            (tmp_path / name).mkdir()
        said = rf"^No images in {tmp_path}/images, files" if made == "both" else rf"^No folder {tmp_path}/\w+: let root"
        with pytest.raises(FileNotFoundError, match=said):
            set_up(tmp_path)

    def test_links(self, nuclei: Path):
        (nuclei / "images" / "p9_0.png").symlink_to(nuclei / "images" / "p0_0.png")
        (nuclei / "masks" / "p9_0.png").symlink_to(nuclei / "masks" / "p0_1.png")
        with refused(f"{nuclei}/images/p9_0.png: is the same file as {nuclei}/images/p0_0.png, but has another mask"):
            set_up(nuclei, **EXCLUSIVE)
        (nuclei / "masks" / "p9_0.png").unlink()
        (nuclei / "masks" / "p9_0.png").symlink_to(nuclei / "masks" / "p0_0.png")
        with pytest.warns(UserWarning, match=r"1 entry is left out: other names of what is listed already"):
            assert len(stored(set_up(nuclei, **EXCLUSIVE))) == 18
        (nuclei / "masks" / "p9_0.png").unlink()
        (nuclei / "masks" / "p9_0.png").symlink_to(nuclei / "gone")
        with refused(
            f"{nuclei}/masks/p9_0.png: is a link that cannot be followed",
            f"{nuclei}/images/p9_0.png: has no mask",
            f"{nuclei}/images/p9_0.png: is the same file as",
        ):
            set_up(nuclei, **EXCLUSIVE)

    def test_other_files_are_left_alone(self, nuclei: Path):
        (nuclei / "images" / "README.txt").write_text("of my nuclei")
        (nuclei / "masks" / ".hidden.png").write_bytes(b"")
        assert len(stored(set_up(nuclei, **EXCLUSIVE))) == 18
        (nuclei / "masks" / "outlines.geo").write_bytes(b"")
        with pytest.warns(UserWarning, match=r"1 entry is left out: of other types \(1: masks/outlines.geo\)"):
            set_up(nuclei, **EXCLUSIVE)


class TestClasses:
    @pytest.mark.parametrize("marked", [1, 255])
    def test_one_structure_by_default(self, marked: int, tmp_path: Path):
        written = write_mask_folder(tmp_path, values=(0, marked))
        data, module = MaskFolderDataModule(tmp_path), Witness()
        trainer().fit(module, datamodule=data)
        assert data.num_classes == 1
        for name, (_, mask) in stored(data).items():
            assert np.array_equal(mask, written[name][1] > 0)
        masks = torch.cat([masks for _, masks in module.seen["train"]])
        assert masks.shape[1:] == (1, 32, 32)
        assert masks.dtype == torch.float32
        assert masks.unique().tolist() == [0, 1]

    def test_one_and_255_are_two_values(self, tmp_path: Path):
        write_mask_folder(tmp_path, values=(0, 1, 255))
        with refused(
            f"{tmp_path}/masks: the masks hold the values 0, 1, 255: let mask_values give the class of each, such as "
            "mask_values: {0: 0, 1: 1, 255: 2}, with 255 as the class of pixels that do not count"
        ):
            set_up(tmp_path)

    @pytest.mark.parametrize(
        ("given", "num_classes", "classes"),
        [
            ({"mask_values": {0: 0, 128: 1, 255: 2}}, 3, {0: 0, 128: 1, 255: 2}),
            ({"mask_values": {"0": 0, "128": 2, "255": 1}}, 3, None),
            ({"mask_values": [0, 128, 255]}, 3, {0: 0, 128: 1, 255: 2}),
            ({"mask_values": [255, 0, 128]}, 3, {0: 1, 128: 2, 255: 0}),
            ({"mask_values": {0: 0, 128: 1, 255: 1}}, 1, {0: 0, 128: 1, 255: 1}),
            ({"mask_values": {0: 0, 128: 1, 255: 0}, "num_classes": 2}, 2, {0: 0, 128: 1, 255: 0}),
            ({"mask_values": {0: 0, 128: 1, 255: 255}}, 1, {0: 0, 128: 1, 255: 255}),
            ({"mask_values": {0: 0, 128: 1, 255: -1}}, 1, {0: 0, 128: 1, 255: 255}),
            ({"mask_values": {0: 0, 128: 3, 255: -100}}, 4, {0: 0, 128: 3, 255: 255}),
            ({"mask_values": [0, 128, 255], "num_classes": 7}, 7, {0: 0, 128: 1, 255: 2}),
        ],
    )
    def test_mask_values(self, given: dict[str, Any], num_classes: int, classes: dict[int, int] | None, tmp_path: Path):
        if classes is None:
            with pytest.raises(TypeError, match=r"^A value in mask_values must be a whole number, got '0'\.$"):
                MaskFolderDataModule(**given)
            return
        written = write_mask_folder(tmp_path)
        data = set_up(tmp_path, **given)
        assert data.num_classes == num_classes
        lookup = np.zeros(256, np.uint8)
        for value, number in classes.items():
            lookup[value] = number
        for name, (_, mask) in stored(data).items():
            assert np.array_equal(mask, lookup[written[name][1]])
        _, masks = data.on_after_batch_transfer(next(iter(data.train_dataloader())), 0)
        assert masks.dtype == (torch.float32 if num_classes == 1 else torch.int64)
        assert set(masks.unique().tolist()) <= set(classes.values())

    def test_class_numbers_without_mask_values(self, tmp_path: Path):
        written = write_mask_folder(tmp_path, values=(0, 1, 2))
        data = set_up(tmp_path, num_classes=3)
        assert all(np.array_equal(mask, written[name][1]) for name, (_, mask) in stored(data).items())
        with refused(*[f"{tmp_path}/masks/{name}: is a mask with the values 2 besides 0, 1, 255" for name in written],
                     f"{tmp_path}/masks: the masks hold the values 0, 1, 2: "):  # fmt: skip
            set_up(tmp_path, num_classes=2)

    def test_more_values_than_a_message_shows(self, tmp_path: Path):
        images, masks = several(
            np.zeros((16, 16), np.uint8), np.arange(256, dtype=np.uint8).reshape(16, 16), (".png",) * 2
        )
        with pytest.raises(ValueError, match=r"values 2, 3, 4, 5, 6, 7, 8, 9, 10, 11 and 243 more besides 0, 1, 255"):
            set_up(write(tmp_path, images, masks))

    def test_class_frequencies(self, tmp_path: Path):
        written = write_mask_folder(tmp_path)
        for values, pick in (([0, 128, 255], slice(None)), ({0: 0, 128: 1, 255: 255}, slice(1, 2))):
            data = set_up(tmp_path, mask_values=values, patient_pattern=PATTERN)
            masks = [mask for name, (_, mask) in written.items() if name[:2] in data.patients["train"]]
            counts = np.array([sum((mask == value).sum() for mask in masks) for value in (0, 128, 255)], float)
            if isinstance(values, dict):
                counts[2] = 0
            assert data.class_frequencies() == pytest.approx((counts / counts.sum())[pick].tolist())
        with pytest.raises(RuntimeError, match=r"has no training set yet: call its setup\(\"fit\"\) first"):
            MaskFolderDataModule(tmp_path).class_frequencies()
        data = set_up(tmp_path, mask_values={0: -1, 128: -1, 255: -1, 7: 1})
        with pytest.raises(ValueError, match=r"No pixel of the .* training masks counts: all are 255"):
            data.class_frequencies()

    @pytest.mark.parametrize(("values", "num_classes"), [((0, 255), None), ((0, 128, 255), 3)])
    def test_the_task_learns(self, values: tuple[int, ...], num_classes: int | None, tmp_path: Path):
        write_mask_folder(tmp_path, values=values)
        data = MaskFolderDataModule(
            tmp_path, 6, mask_values=list(values), patient_pattern=PATTERN, val_fraction=0.2, test_fraction=0.2
        )
        assert data.num_classes == (num_classes or 1)
        torch.manual_seed(0)
        network = torch.nn.Sequential(
            torch.nn.Conv2d(3, 8, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv2d(8, data.num_classes, 1)
        )
        task = SegmentationTask(
            network,
            num_classes=data.num_classes,
            activation="sigmoid" if num_classes is None else "softmax",
            prior="auto",
            optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.03),
        )
        run = trainer(max_epochs=15)
        run.fit(task, datamodule=data)
        assert run.callback_metrics["val/dice"] > 0.9

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ({"mask_values": {0: 0}}, "at least one value a class from 1 to 254"),
            ({"mask_values": {0: 0, 1: 256}}, "none a higher one than 255"),
            ({"mask_values": {0: 0, 1: 255}}, "at least one value a class from 1 to 254"),
            ({"mask_values": [0, 1, 1]}, r"names a value twice: \[0, 1, 1\]"),
            ({"mask_values": [0, -1]}, "A value in mask_values must be at least 0 and less than"),
            ({"mask_values": [0, 65536]}, "A value in mask_values must be at least 0 and less than"),
            ({"mask_values": [0, 1, 2], "num_classes": 2}, "has class 2, and num_classes=2, .* set num_classes to 3"),
            ({"mask_values": [0, 1, 2], "num_classes": 1}, "has class 2, and num_classes=1"),
            ({"num_classes": 0}, "num_classes must be at least 1, got 0"),
            ({"num_classes": 256}, "num_classes must be at most 255, because masks have 8 bits, got 256"),
            ({"patient_pattern": "(p"}, r"patient_pattern is no regular expression \(missing \)"),
            ({"mean": [0.5], "std": [0.0]}, "those of std are above 0"),
            ({"mean": [0.5, 0.5], "std": [1.0]}, "mean and std hold a number for each channel"),
            ({"mean": [math.nan], "std": [1.0]}, "A value of mean must be finite, got nan"),
            ({"image_size": [0, 3]}, "image_size must be at least 1"),
        ],
    )
    def test_out_of_range(self, given: dict[str, Any], said: str):
        with pytest.raises(ValueError, match=said):
            MaskFolderDataModule(**given)

    @pytest.mark.parametrize(
        ("given", "said"),
        [
            ({"mask_values": "0"}, "mask_values must be a dictionary or a list, got '0'"),
            ({"mask_values": [0, "1"]}, "A value in mask_values must be a whole number, got '1'"),
            ({"mask_values": {0: 0, 1: "a"}}, "A class in mask_values must be a whole number, got 'a'"),
            ({"num_classes": "3"}, "num_classes must be a whole number, got '3'"),
            ({"mask_suffix": 3}, "mask_suffix must be text, got 3"),
            ({"patient_pattern": 3}, "patient_pattern must be a regular expression, got 3"),
            ({"mean": [0.5]}, "std must be a list of a number for each channel, and mean and std are given together"),
            ({"std": [0.5]}, "mean must be a list of a number for each channel"),
            ({"mean": 0.5, "std": 0.5}, "mean must be a list of a number for each channel"),
            ({"mean": ["a"], "std": [0.5]}, "A value of mean must be a number, got 'a'"),
            ({"image_size": "big"}, "image_size must be one number, or height and width, got 'big'"),
            ({"image_size": [1, 2, 3]}, "image_size must be one number, or height and width, got"),
            ({"augment": "yes"}, "augment must be True or False, got 'yes'"),
        ],
    )
    def test_of_another_type(self, given: dict[str, Any], said: str):
        with pytest.raises(TypeError, match=said):
            MaskFolderDataModule(**given)


class TestPatients:
    def test_no_patient_in_two_sets(self, nuclei: Path, caplog: pytest.LogCaptureFixture):
        with caplog.at_level("INFO"):
            data = set_up(nuclei, **EXCLUSIVE)
        assert [len(data.patients[name]) for name in ("train", "val", "test")] == [2, 2, 2]
        assert f"MaskFolder test patients (2): {', '.join(data.patients['test'])}" in caplog.messages
        for name, part in (("train", data.train_set), ("val", data.val_set), ("test", data.test_set)):
            drawn = [data.test_set.cases["name"][row] for row in part.rows]
            assert {each[:2] for each in drawn} == set(data.patients[name])
            assert len(drawn) == 6

    def test_each_image_without_a_pattern(self, nuclei: Path, caplog: pytest.LogCaptureFixture):
        with caplog.at_level("INFO"):
            data = set_up(nuclei, mask_values=[0, 128, 255])
        assert sum(map(len, data.patients.values())) == 18
        assert data.patients["test"][0] in {f"p{i}_{j}" for i in range(6) for j in range(3)}
        assert any(
            "each image is a patient of its own, because there is no patient_pattern" in m for m in caplog.messages
        )
        assert "MaskFolder test patients (4)" in caplog.messages  # names of images would fill the log
        _, _, cases = next(iter(data.test_dataloader()))
        assert cases["patient"] == [name.removesuffix(".png") for name in cases["name"]]

    @pytest.mark.parametrize(
        ("pattern", "patients"),
        [
            (PATTERN, {f"p{i}" for i in range(6)}),
            (r"p\d", {f"p{i}" for i in range(6)}),
            (r"_(\d)$", {"0", "1", "2"}),
            (r"^p(\d)_(\d)", set("012345")),
        ],
    )
    def test_pattern(self, pattern: str, patients: set[str], nuclei: Path):
        data = set_up(nuclei, mask_values=[0, 128, 255], patient_pattern=pattern)
        assert {patient for listed in data.patients.values() for patient in listed} == patients

    @pytest.mark.parametrize("pattern", ["^q", "(x)?p", "(x*)p"])
    def test_names_without_a_patient(self, pattern: str, nuclei: Path):
        with pytest.raises(
            ValueError, match=r"for 18 reasons.*\n.*p0_0.png: patient_pattern finds no patient in 'p0_0'"
        ):
            set_up(nuclei, mask_values=[0, 128, 255], patient_pattern=pattern)

    def test_marked_pixels_are_spread_over_the_sets(self, tmp_path: Path):
        """Of patients that are marked more and more, each third gives one to the test."""
        images, masks = {}, {}
        for number in range(12):
            mask = np.zeros((16, 16), np.uint8)
            mask.ravel()[: 10 * number] = 255
            images[f"{number:02}.png"], masks[f"{number:02}.png"] = np.full((16, 16), number, np.uint8), mask
        write(tmp_path, images, masks)
        for seed in range(5):
            test = set_up(tmp_path, val_fraction=0.2, test_fraction=0.25, seed=seed).patients["test"]
            assert [int(patient) // 4 for patient in test] == [0, 1, 2]
        first, again, other = (set_up(tmp_path, val_fraction=0.2, seed=seed).patients for seed in (0, 0, 1))
        assert first == again
        assert first["test"] != other["test"]

    def test_the_split_does_not_hang_on_the_size_or_the_cache(self, tmp_path: Path):
        """Structures of a few pixels vanish from resized masks, and the patients are drawn all the same."""
        rng = np.random.default_rng(0)
        images, masks = {}, {}
        for number in range(30):
            mask = np.zeros((64, 64), np.uint8)
            mask.ravel()[rng.choice(64**2, number // 2)] = 255
            images[f"p{number // 2}_{number}.png"] = np.full((64, 64), number, np.uint8)
            masks[f"p{number // 2}_{number}.png"] = mask
        root = write(tmp_path / "data", images, masks)
        cache: dict[str, Any] = {"max_memory_gb": 0, "cache_dir": tmp_path / "cache"}
        for seed in range(3):
            drawn = [
                set_up(root, patient_pattern=PATTERN, image_size=size, seed=seed, **where).patients
                for size in (None, 32, 48, [24, 40])
                for where in ({}, cache, cache)
            ]
            assert all(each == drawn[0] for each in drawn)
        assert len(list((tmp_path / "cache").iterdir())) == 4

    def test_too_few(self, tmp_path: Path):
        write_mask_folder(tmp_path, patients=2)
        with pytest.raises(ValueError, match=r"Of 2 patients, val_fraction=0.25 takes 1"):
            set_up(tmp_path, **EXCLUSIVE)


class TestBatches:
    def test_of_every_stage(self, nuclei: Path):
        data, module = MaskFolderDataModule(nuclei, 2, val_fraction=0.2, test_fraction=0.2, **EXCLUSIVE), Witness()
        run = trainer(num_sanity_val_steps=0)
        run.fit(module, datamodule=data)
        run.test(module, datamodule=data, verbose=False)
        run.predict(module, datamodule=data)
        assert all(len(batch) == 2 for batch in module.seen["train"])
        for stage, part in (("val", "val"), ("test", "test"), ("predict", "test")):
            for batch in module.seen[stage]:
                assert has_targets(batch)
                cases = cases_of(batch)
                assert set(cases.patient) <= set(data.patients[part])
                assert all(name[:2] == patient for name, patient in zip(cases.name, cases.patient, strict=True))
                assert (nuclei / "images" / cases.name[0]).is_file()
                assert batch[2].keys() == {"name", "patient"}

    def test_predict_root(self, nuclei: Path, tmp_path: Path):
        data, module = MaskFolderDataModule(nuclei, val_fraction=0.2, test_fraction=0.2, **EXCLUSIVE), Witness()
        run = trainer()
        run.fit(module, datamodule=data)
        run.save_checkpoint(tmp_path / "trained.ckpt")
        (tmp_path / "new" / "a").mkdir(parents=True)
        brighter = RNG.integers(100, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(brighter).save(tmp_path / "new" / "a" / "x.png")
        (tmp_path / "new" / "b.png").symlink_to(tmp_path / "new" / "a" / "x.png")
        fresh = MaskFolderDataModule("nowhere", predict_root=tmp_path / "new", **EXCLUSIVE)
        with pytest.warns(UserWarning, match="1 entry is left out: other names"):
            trainer().predict(module, datamodule=fresh, ckpt_path=tmp_path / "trained.ckpt")
        ((images, cases),) = module.seen["predict"]
        assert cases == {"name": ["a/x.png"]}
        assert fresh.mean == data.mean
        expected = (brighter / 255 - data.mean) / data.std
        np.testing.assert_allclose(images[0].permute(1, 2, 0), expected, rtol=1e-4, atol=1e-4)
        again = MaskFolderDataModule.load_from_checkpoint(tmp_path / "trained.ckpt", predict_root=tmp_path / "new")
        trainer().predict(module, datamodule=again)
        assert torch.equal(module.seen["predict"][1][0], images)

    def test_masks_beside_their_images_are_not_predicted_for(self, nuclei: Path, tmp_path: Path):
        """The files that `MaskWriter` writes into a folder of images."""
        for name in ("a.png", "a_mask.png", "b.png", "b_mask_0.png", "b_Mask_1.tif", "sub/c.png", "sub/c_mask.png"):
            (tmp_path / "new" / name).parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(np.zeros((32, 32, 3), np.uint8)).save(tmp_path / "new" / name)
        data = set_up(nuclei, "predict", predict_root=tmp_path / "new", **EXCLUSIVE)
        assert data.predict_set.cases["name"] == ["a.png", "b.png", "sub/c.png"]
        (tmp_path / "new" / "b.png").unlink()
        with pytest.warns(UserWarning, match=r"2 entries are left out: masks without an image beside them \(2: b_Mask"):
            set_up(nuclei, "predict", predict_root=tmp_path / "new", **EXCLUSIVE)

    def test_predict_without_a_normalization(self, nuclei: Path):
        data = MaskFolderDataModule("nowhere", predict_root=nuclei / "images", **EXCLUSIVE)
        with pytest.raises(RuntimeError, match="nothing says how: pass ckpt_path, a data module that was trained with"):
            trainer().predict(Witness(), datamodule=data)

    def test_predict_nothing(self, tmp_path: Path):
        with pytest.raises(FileNotFoundError, match=f"^No images at {tmp_path}/none, files that end in .bmp, "):
            set_up(tmp_path, "predict", predict_root=tmp_path / "none")

    def test_predict_other_channels(self, nuclei: Path, tmp_path: Path):
        data, module = MaskFolderDataModule(nuclei, val_fraction=0.2, test_fraction=0.2, **EXCLUSIVE), Witness()
        run = trainer()
        run.fit(module, datamodule=data)
        run.save_checkpoint(tmp_path / "trained.ckpt")
        (tmp_path / "grey").mkdir()
        Image.fromarray(np.zeros((32, 32), np.uint8)).save(tmp_path / "grey" / "x.png")
        fresh = MaskFolderDataModule("nowhere", predict_root=tmp_path / "grey", **EXCLUSIVE)
        with pytest.raises(
            ValueError, match="are of 3 channels, by the arguments or the checkpoint, and the images have 1"
        ):
            trainer().predict(module, datamodule=fresh, ckpt_path=tmp_path / "trained.ckpt")

    def test_a_checkpoint_brings_the_depth(self, tmp_path: Path):
        deep = write(tmp_path / "deep", *several(GREY, np.eye(32, dtype=np.uint8), (".png", ".png")))
        data, module, path = set_up(deep), Witness(1), tmp_path / "trained.ckpt"
        run = trainer()
        run.fit(module, datamodule=data)
        run.save_checkpoint(path)
        images = torch.from_numpy(GREY.astype(np.int32))[None, None]
        loaded = MaskFolderDataModule.load_from_checkpoint(path)
        assert loaded.max_value == 65535
        assert torch.equal(loaded.normalized(images), data.normalized(images))
        (tmp_path / "shallow").mkdir()
        Image.fromarray((GREY >> 8).astype(np.uint8)).save(tmp_path / "shallow" / "x.png")
        refusal = "are images of 8 bits for each channel, and the network was trained on 16: convert the images"
        for other, ckpt_path in (
            (MaskFolderDataModule("nowhere", predict_root=tmp_path / "shallow"), path),
            (MaskFolderDataModule.load_from_checkpoint(path, predict_root=tmp_path / "shallow"), None),
            (set_up(deep, predict_root=tmp_path / "shallow"), None),
        ):
            with pytest.raises(ValueError, match=refusal):
                trainer().predict(module, datamodule=other, ckpt_path=ckpt_path)
        again = MaskFolderDataModule("nowhere", predict_root=deep / "images")
        trainer().predict(module, datamodule=again, ckpt_path=path)
        assert torch.equal(module.seen["predict"][-1][0][:1], data.normalized(images))

    @pytest.mark.parametrize("precision", ["bf16-true", "16-true", "64-true"])
    @pytest.mark.parametrize("values", [{0: 0, 128: 1, 255: 255}, [0, 128, 255]], ids=["one", "several"])
    @pytest.mark.parametrize("transform", [None, {"class_path": "torchvision.transforms.v2.Identity"}])
    def test_precision(self, precision: str, values: Any, transform: Any, nuclei: Path):
        dtype = {"bf16-true": torch.bfloat16, "16-true": torch.float16, "64-true": torch.float64}[precision]
        data = MaskFolderDataModule(
            nuclei, mask_values=values, patient_pattern=PATTERN, augment=True, train_transform=transform
        )
        module = Witness()
        trainer(precision=precision).fit(module, datamodule=data)
        exact = MaskFolderDataModule(nuclei, mask_values=values, patient_pattern=PATTERN, seed=data.seed)
        exact.setup("fit")
        everything = torch.stack([exact.train_set[index][0] for index in range(len(exact.train_set))])
        for images, masks in module.seen["train"]:
            assert images.dtype == dtype
            assert masks.dtype == (torch.int64 if data.num_classes > 1 else dtype)
            assert masks.unique().tolist() == ([0, 1, 255] if isinstance(values, dict) else [0, 1, 2])
        found = torch.cat([images for images, _ in module.seen["train"]]).double()
        # Mirrored images have the same mean and extremes.
        expected = exact.normalized(everything).double()
        assert found.mean().item() == pytest.approx(expected.mean().item(), abs=0.02)
        assert found.max().item() == pytest.approx(expected.max().item(), rel=0.02)
        assert found.min().item() == pytest.approx(expected.min().item(), rel=0.02)

    @pytest.mark.parametrize("stage", ["val", "test"])
    def test_augment_in_training_alone(self, stage: str, nuclei: Path):
        torch.manual_seed(0)
        written = stored(set_up(nuclei, val_fraction=0.2, test_fraction=0.2, **EXCLUSIVE))
        data = MaskFolderDataModule(nuclei, val_fraction=0.2, test_fraction=0.2, augment=True, **EXCLUSIVE)
        module = Witness()
        run = trainer(num_sanity_val_steps=0)
        run.fit(module, datamodule=data)
        run.test(module, datamodule=data, verbose=False)
        known = {mask.tobytes() for _, mask in written.values()}
        assert not {mask.byte().numpy().tobytes() for mask in module.seen["train"][0][1]} <= known
        assert {mask.byte().numpy().tobytes() for mask in module.seen[stage][0][1]} <= known


class TestSize:
    def test_sizes_may_differ(self, tmp_path: Path):
        images = {f"{i}.png": RNG.integers(0, 256, (40 + 7 * i, 50 - 5 * i, 3), dtype=np.uint8) for i in range(4)}
        masks = {name: RNG.choice([0, 128, 255], image.shape[:2]).astype(np.uint8) for name, image in images.items()}
        write(tmp_path, images, masks)
        data = set_up(tmp_path, image_size=[24, 31], mask_values=[0, 128, 255])
        for name, (image, mask) in stored(data).items():
            assert image.shape == (24, 31, 3)
            # Pillow's bilinear filter widens when it shrinks, as antialiasing does, and rounds in between.
            reference = Image.fromarray(images[name]).resize((31, 24), Image.Resampling.BILINEAR)
            assert np.abs(image.astype(int) - np.asarray(reference)).max() <= 1
            nearest = np.asarray(Image.fromarray(masks[name]).resize((31, 24), Image.Resampling.NEAREST))
            assert np.array_equal(np.array([0, 128, 255])[mask], nearest)
        with pytest.raises(
            ValueError, match=r"for 3 reasons.*\n.* pixels .*: set image_size, and all are resized to it"
        ):
            set_up(tmp_path, mask_values=[0, 128, 255])

    def test_the_usual_kind_counts_whatever_the_sizes(self, tmp_path: Path):
        images = {f"{i}.png": np.zeros((8 + i, 8), np.uint8) for i in range(4)}
        images |= {f"{i}.png": np.zeros((9, 9, 3), np.uint8) for i in range(4, 6)}
        masks = {name: np.eye(*image.shape[:2], dtype=np.uint8) for name, image in images.items()}
        faults = [f"{tmp_path}/images/{i}.png: is RGB of 8 bits, and the other images grey of 8 bits" for i in (4, 5)]
        with refused(*faults):
            set_up(write(tmp_path, images, masks), image_size=8)

    def test_16_bits_are_kept(self, tmp_path: Path):
        from torchvision.transforms.v2 import functional as F

        images, masks = several(GREY, np.eye(32, dtype=np.uint8), (".png", ".png"))
        data = set_up(write(tmp_path, images, masks), image_size=20)
        reference = F.resize(torch.from_numpy(GREY.astype(np.float32))[None], [20, 20], antialias=True)[0]
        for image, _ in stored(data).values():
            assert image.max() > 255
            assert np.abs(image[..., 0] - reference.numpy()).max() <= 0.51

    def test_predicted_images_too(self, nuclei: Path):
        data = set_up(nuclei, "predict", predict_root=nuclei / "images", image_size=16, **EXCLUSIVE)
        images, _ = next(iter(data.predict_dataloader()))
        assert images.shape[1:] == (3, 16, 16)

    @pytest.mark.parametrize("where", ["predict_root", "test set", "from the cache"])
    def test_batches_say_the_size_of_the_files(self, where: str, tmp_path: Path):
        sizes = {f"{number}.png": (20 + 7 * number, 31) for number in range(4)}
        images = {name: np.zeros(size, np.uint8) for name, size in sizes.items()}
        write(tmp_path, images, {name: np.eye(*size, dtype=np.uint8) for name, size in sizes.items()})
        kwargs: dict[str, Any] = {"image_size": [24, 16]}
        if where == "predict_root":
            kwargs |= {"predict_root": tmp_path / "images", "mean": [0.5], "std": [0.5]}
        elif where == "from the cache":
            kwargs |= {"max_memory_gb": 0, "cache_dir": tmp_path / "cache"}
            set_up(tmp_path, **kwargs)
        data, module = MaskFolderDataModule(tmp_path, val_fraction=0.25, test_fraction=0.5, **kwargs), Witness(1)
        trainer(precision="bf16-true").predict(module, datamodule=data)
        (batch,) = module.seen["predict"]
        assert isinstance(batch[-1]["size"], np.ndarray)
        assert len(batch[-1]["name"]) == (4 if where == "predict_root" else 2)
        assert batch[-1]["size"].tolist() == [list(sizes[name]) for name in batch[-1]["name"]]

    @pytest.mark.parametrize("label_map", [False, True])
    def test_written_masks_lie_over_their_images(self, label_map: bool, tmp_path: Path):
        sizes = {"a.png": (20, 31), "sub/b.png": (64, 48), "c.png": (24, 16)}
        images = {name: RNG.integers(0, 256, size, dtype=np.uint8) for name, size in sizes.items()}
        write(tmp_path, images, {})
        data = MaskFolderDataModule(
            "nowhere", predict_root=tmp_path / "images", image_size=[24, 16], mean=[0.5], std=[0.2]
        )
        task = SegmentationTask(torch.nn.Conv2d(1, 3, 3, padding=1), num_classes=3, activation="softmax")
        run = trainer(callbacks=[MaskWriter(tmp_path / "out", label_map=label_map)])
        (probabilities,) = run.predict(task, datamodule=data)
        with (tmp_path / "out" / "scores.csv").open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        assert [row["image"] for row in rows] == [name for name in sorted(sizes) for _ in range(3)]
        for number, row in enumerate(rows):
            written = np.asarray(Image.open(tmp_path / "out" / row["mask"]))
            classes = probabilities[number // 3].argmax(0).byte().numpy()
            expected = resized_mask(classes, sizes[row["image"]])
            if label_map:
                assert np.array_equal(written, expected)
            else:
                assert np.array_equal(written, (expected == number % 3) * np.uint8(255))
            assert int(row["pixels"]) == (expected == number % 3).sum()
            assert float(row["fraction"]) == pytest.approx((expected == number % 3).mean(), abs=1e-6)


class TestNormalization:
    def test_of_the_training_images_alone(self, tmp_path: Path):
        images, masks = {}, {}
        for number in range(8):
            images[f"{number}.npy"] = RNG.integers(0, 2**16, (9, 7), dtype=np.uint16)
            masks[f"{number}.png"] = np.eye(9, 7, dtype=np.uint8)
        data = set_up(write(tmp_path, images, masks))
        pixels = np.stack([images[f"{name}.npy"] for name in data.patients["train"]]) / 65535
        assert data.mean == pytest.approx([pixels.mean()], rel=1e-12)
        assert data.std == pytest.approx([pixels.std()], rel=1e-9)
        assert (data.hparams.mean, data.hparams.std) == (list(data.mean), list(data.std))

    def test_computed_where_a_checkpoint_brings_none(
        self, nuclei: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ):
        data = MaskFolderDataModule(nuclei, val_fraction=0.2, test_fraction=0.2, **EXCLUSIVE)
        run = trainer()
        run.fit(Witness(), datamodule=data)
        run.save_checkpoint(tmp_path / "trained.ckpt")
        fresh = MaskFolderDataModule(nuclei, val_fraction=0.2, test_fraction=0.2, **EXCLUSIVE)
        trainer().test(Witness(), datamodule=fresh, verbose=False)
        assert (fresh.mean, fresh.std) == (data.mean, data.std)
        monkeypatch.setattr(MaskedImages, "__getitem__", lambda *_: pytest.fail("reads the training images"))
        for stage in ("validate", "test", "predict"):
            other = MaskFolderDataModule(nuclei, val_fraction=0.2, test_fraction=0.2, **EXCLUSIVE)
            getattr(trainer(), stage)(Witness(), datamodule=other, ckpt_path=tmp_path / "trained.ckpt")
            assert (other.mean, other.std) == (data.mean, data.std)

    def test_constants(self, nuclei: Path):
        given = {"mean": [0.1, 0.2, 0.3], "std": [0.5, 0.5, 0.25]}
        data = set_up(nuclei, **given, **EXCLUSIVE)
        assert (data.mean, data.std) == (tuple(given["mean"]), tuple(given["std"]))
        raw = data.train_set[0][0].numpy() / 255
        expected = (raw - np.reshape(given["mean"], (3, 1, 1))) / np.reshape(given["std"], (3, 1, 1))
        np.testing.assert_allclose(data.normalized(data.train_set[0][0]), expected, rtol=1e-4, atol=1e-5)
        with pytest.raises(ValueError, match="are of 1 channels, by the arguments or the checkpoint, and the images"):
            set_up(nuclei, mean=[0.5], std=[0.5], **EXCLUSIVE)

    def test_channel_without_contrast(self, tmp_path: Path):
        image = RNG.integers(0, 256, (8, 8, 3), dtype=np.uint8)
        image[..., 2] = 77
        data = set_up(write(tmp_path, *several(image, np.eye(8, dtype=np.uint8), (".png", ".png"))))
        assert data.std[2] == 1
        normalized = data.normalized(data.train_set[0][0])
        assert normalized.isfinite().all()
        assert normalized[2].abs().max() < 1e-6

    def test_a_checkpoint_brings_its_own(self, nuclei: Path, tmp_path: Path):
        data = MaskFolderDataModule(nuclei, val_fraction=0.2, test_fraction=0.2, **EXCLUSIVE)
        run = trainer(logger=CSVLogger(tmp_path / "logs"))
        run.fit(Witness(), datamodule=data)
        run.save_checkpoint(tmp_path / "trained.ckpt")
        saved = torch.load(tmp_path / "trained.ckpt", weights_only=True)
        assert saved["MaskFolderDataModule"]["mean"] == saved["datamodule_hyper_parameters"]["mean"] == list(data.mean)
        # The same patients, whose training images have become darker.
        darker = tmp_path / "darker"
        shutil.copytree(nuclei, darker)
        for path in (darker / "images").iterdir():
            Image.fromarray(np.asarray(Image.open(path)) // 2).save(path)
        for stage in ("validate", "test", "predict"):
            other = MaskFolderDataModule(darker, val_fraction=0.2, test_fraction=0.2, **EXCLUSIVE)
            getattr(trainer(), stage)(Witness(), datamodule=other, ckpt_path=tmp_path / "trained.ckpt")
            assert (other.mean, other.std) == (data.mean, data.std)
        other = MaskFolderDataModule(
            darker, val_fraction=0.2, test_fraction=0.2, mean=[0.5] * 3, std=[0.5] * 3, **EXCLUSIVE
        )
        with pytest.raises(ValueError, match=r"was trained with mean=\[.*\], and mean=\[0.5, 0.5, 0.5\] .*leave both"):
            trainer().test(Witness(), datamodule=other, ckpt_path=tmp_path / "trained.ckpt")

    def test_refuses_to_be_judged_by_patients_it_has_seen(self, nuclei: Path, tmp_path: Path):
        data = MaskFolderDataModule(nuclei, val_fraction=0.2, test_fraction=0.2, **EXCLUSIVE)
        run = trainer()
        run.fit(Witness(), datamodule=data)
        run.save_checkpoint(tmp_path / "trained.ckpt")
        other = next(
            each
            for each in (
                set_up(nuclei, val_fraction=0.2, test_fraction=0.2, seed=seed, **EXCLUSIVE) for seed in range(99)
            )
            if each.patients["test"] != data.patients["test"]
        )
        with pytest.raises(
            ValueError, match=r"trained or chosen on 1 of the patients of the test set \(p\d\): use the"
        ):
            trainer().test(Witness(), datamodule=other, ckpt_path=tmp_path / "trained.ckpt")

    @pytest.mark.parametrize("stage", ["fit", "test"])
    def test_a_resumed_training_says_that_patients_moved(
        self, stage: str, nuclei: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
    ):
        data = MaskFolderDataModule(nuclei, val_fraction=0.3, test_fraction=0.2, **EXCLUSIVE)
        run = trainer()
        run.fit(Witness(), datamodule=data)
        run.save_checkpoint(tmp_path / "trained.ckpt")
        train, val = data.patients["train"], data.patients["val"]
        moved = {"train": [*train[1:], val[0], "p9"], "val": val[1:], "test": data.patients["test"]}
        for patients, said in ((data.patients, None), (moved, stage == "fit")):
            other = MaskFolderDataModule(nuclei, val_fraction=0.3, test_fraction=0.2, **EXCLUSIVE)
            other.setup("fit")
            other.patients = patients
            recwarn.clear()
            getattr(trainer(max_epochs=2), stage)(Witness(), datamodule=other, ckpt_path=tmp_path / "trained.ckpt")
            found = [str(each.message) for each in recwarn if "had other patients" in str(each.message)]
            assert len(found) == bool(said)
            for part in (f"{val[0]} moved from val to train", f"{train[0]} of train is gone", "p9 is new in train"):
                assert all(part in message for message in found)


class TestTask:
    def test_other_classes_are_refused_before_decoding(self, tmp_path: Path):
        data = MaskFolderDataModule(tmp_path / "none", mask_values=[0, 128, 255])
        task = SegmentationTask(torch.nn.Conv2d(3, 2, 1), num_classes=2, activation="softmax")
        for stage in ("fit", "test"):
            with pytest.raises(
                ValueError, match=r"data.init_args.num_classes is 3, and model.init_args.num_classes is 2: set both"
            ):
                getattr(trainer(), stage)(task, datamodule=data)

    @pytest.mark.parametrize("predict_root", [True, False])
    def test_fewer_images_than_processes(self, predict_root: bool, nuclei: Path, monkeypatch: pytest.MonkeyPatch):
        count = 18 if predict_root else 3
        given = {"predict_root": nuclei / "images"} if predict_root else {}
        data = MaskFolderDataModule(nuclei, mean=[0.5] * 3, std=[0.5] * 3, **EXCLUSIVE, **given)
        run = trainer()
        kwargs = {"num_replicas": 19, "rank": 0}
        monkeypatch.setattr(type(run), "distributed_sampler_kwargs", kwargs, raising=False)
        with pytest.raises(
            ValueError, match=f"{count} images are too few for 19 processes: set trainer.devices to {count} or less"
        ):
            run.predict(Witness(), datamodule=data)


class TestLargerThanMemory:
    @pytest.mark.parametrize("suffix", [".png", ".npy"])
    def test_the_same_images(self, suffix: str, tmp_path: Path):
        content = {".png": COLOURS.astype(np.uint8), ".npy": COLOURS}[suffix]
        root = write(tmp_path / "data", *several(content, np.eye(32, dtype=np.uint8), (suffix, ".png")))
        kwargs = {"max_memory_gb": 0, "cache_dir": tmp_path / "cache"}
        MaskFolderDataModule(root, **kwargs).prepare_data()
        (file,) = (tmp_path / "cache").iterdir()
        marked = 4 * 8  # a number for each mask, behind the pixels
        assert file.stat().st_size == 4 * 32 * 32 * (4 if suffix == ".png" else 7) + marked
        mapped, held = set_up(root, **kwargs), set_up(root)
        assert not mapped.train_set.images.flags.owndata
        assert held.train_set.images.flags.owndata
        assert (mapped.mean, mapped.std) == (held.mean, held.std)
        for name, (image, mask) in stored(held).items():
            assert np.array_equal(stored(mapped)[name][0], image)
            assert np.array_equal(stored(mapped)[name][1], mask)
        assert list((tmp_path / "cache").iterdir()) == [file]

    @pytest.mark.parametrize("limit", [0, 4])
    def test_headers_are_read_once(self, limit: int, nuclei: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
        read: list[Path] = []
        monkeypatch.setattr(mask_files, "_kind", lambda path, kind=mask_files._kind: read.append(path) or kind(path))
        data = MaskFolderDataModule(
            nuclei, image_size=16, max_memory_gb=limit, cache_dir=tmp_path / "cache", **EXCLUSIVE
        )
        for _ in range(2):
            trainer().fit(Witness(), datamodule=data)
        trainer().test(Witness(), datamodule=data, verbose=False)
        assert sorted(read) == sorted((nuclei / "images").iterdir())

    def test_a_folder_that_changes_is_listed_anew(self, nuclei: Path):
        """What `prepare_data` found is used once, by the `setup` that follows."""
        data = MaskFolderDataModule(nuclei, predict_root=nuclei / "images", mean=[0.5] * 3, std=[0.5] * 3, **EXCLUSIVE)
        for count in (18, 17):
            module = Witness()
            trainer().predict(module, datamodule=data)
            assert sum(len(images) for images, _ in module.seen["predict"]) == count
            (nuclei / "images" / "p0_0.png").unlink(missing_ok=True)

    def test_other_settings_are_decoded_anew(self, nuclei: Path, tmp_path: Path):
        kwargs: dict[str, Any] = {"max_memory_gb": 0, "cache_dir": tmp_path / "cache"}
        first = stored(set_up(nuclei, **EXCLUSIVE, **kwargs))
        second = stored(set_up(nuclei, mask_values=[0, 255, 128], patient_pattern=PATTERN, **kwargs))
        assert not any(np.array_equal(first[name][1], second[name][1]) for name in first)
        set_up(nuclei, image_size=32, **EXCLUSIVE, **kwargs)
        assert len(list((tmp_path / "cache").iterdir())) == 3


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded, use of fork:DeprecationWarning")
def test_workers(workers: int, nuclei: Path):
    def images_of(**kwargs: Any) -> list[Tensor]:
        torch.manual_seed(3)
        data = set_up(nuclei, batch_size=3, **EXCLUSIVE, **kwargs)
        return [part for batch in data.train_dataloader() for part in batch]

    assert all(map(torch.equal, images_of(), images_of(num_workers=workers)))
