"""The readers of files, with valid files to begin with, and the outcomes that are right for other files.

A reader either returns what its data set may hold, or ends in a sentence of this package that names the file. Anything
else is a fault: another exception, or data that no such file could hold.
"""

import contextlib
import io
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from unittest.mock import patch

import numpy as np
from PIL import Image
from torchvision.datasets import CIFAR10

from lightning_znorm.cli import main
from lightning_znorm.cli.error_sentences import sentence
from lightning_znorm.data import CIFAR10DataModule, ImageFolderDataModule, MaskFolderDataModule
from lightning_znorm.data.lgg_files import find_images, find_patients
from lightning_znorm.data.pcam import read_h5, read_kaggle
from tests.cifar10 import write_cifar10
from tests.data.jpegs import write_image_folder
from tests.medical import PCAM, write_kaggle_pcam, write_lgg, write_pcam

CONFIGS = Path(__file__).parents[2] / "configs"
RUN, SENTENCE = "run", "sentence"


@dataclass(frozen=True)
class Target:
    """A reader and a file that it reads.

    Args:
        make: Writes valid files into an empty folder, and returns the path of the one to change.
        read: Reads them from the folder. Raises AssertionError if what comes of it is impossible.
        is_text: Whether the file is to be changed by lines too.
    """

    make: Callable[[Path], Path]
    read: Callable[[Path], None]
    is_text: bool = False


def outcome(target: Target, folder: Path, path: Path) -> str:
    """Read files, one of which was changed, and return the outcome.

    Returns:
        `RUN`, `SENTENCE`, or what was wrong.
    """
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()) as err:
            target.read(folder)
    except SystemExit as end:
        said = end.code if isinstance(end.code, str) else err.getvalue()[err.getvalue().find("error: ") :].strip()
        if end.code in (0, None):
            return RUN
        return SENTENCE if said.startswith("error: ") and "\n" not in said else f"says {said!r}"
    except AssertionError as error:
        return f"makes {error}"
    except Exception as error:
        error.__traceback__ = _from_package_on(error.__traceback__)
        said = sentence(error) or ""
        if not said:
            return f"raises {type(error).__name__}: {error}"
        return SENTENCE if str(path) in said or str(path.parent) in said else f"names no file: {said}"
    return RUN


def _from_package_on(steps: TracebackType | None) -> TracebackType | None:
    while steps is not None and not steps.tb_frame.f_globals["__name__"].startswith("lightning_znorm"):
        steps = steps.tb_next
    return steps


# CIFAR-10


@contextlib.contextmanager
def _published(sums: dict[str, str]) -> Iterator[None]:
    train = [[f"data_batch_{i}", sums[f"data_batch_{i}"]] for i in range(1, 6)]
    with (
        patch.object(CIFAR10, "train_list", train),
        patch.object(CIFAR10, "test_list", [["test_batch", sums["test_batch"]]]),
        patch.object(CIFAR10, "meta", {**CIFAR10.meta, "md5": sums["batches.meta"]}),
    ):
        yield


def _make_cifar10(folder: Path) -> Path:
    sums = write_cifar10(folder, images_per_batch=4)
    (folder / "sums.txt").write_text("\n".join(f"{name} {md5}" for name, md5 in sums.items()))
    return folder / "cifar-10-batches-py" / "data_batch_3"


def _read_cifar10(folder: Path) -> None:
    sums = dict(line.split() for line in (folder / "sums.txt").read_text().splitlines())
    with _published(sums):
        images, labels = CIFAR10DataModule(folder).load(train=True)
    assert images.shape == (20, 3, 32, 32), images.shape
    assert labels.tolist() == [0, 1, 2, 3] * 5, labels


# PatchCamelyon


def _make_pcam(what: str, **dataset: object) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        write_pcam(folder, (3, 1, 1), **dataset)
        return folder / "pcam" / PCAM.format(split="train", what=what)

    return make


def _read_pcam(folder: Path) -> None:
    images, labels = read_h5(folder / "pcam", "train", folder / "cache")
    array = np.array(images.map()[0])
    assert array.shape == (len(labels), 96, 96, 3), array.shape
    assert set(labels.tolist()) <= {0, 1}, labels


def _make_kaggle(folder: Path) -> Path:
    write_kaggle_pcam(folder, 3)
    return folder / "histopathologic-cancer-detection" / "train_labels.csv"


def _make_kaggle_tif(folder: Path) -> Path:
    return next((_make_kaggle(folder).parent / "train").iterdir())


def _read_kaggle(folder: Path) -> None:
    images, labels = read_kaggle(folder / "histopathologic-cancer-detection", folder / "cache")
    array = np.array(images.map()[0])
    assert array.shape == (3, 96, 96, 3), array.shape
    assert set(labels.tolist()) <= {0, 1}, labels


# LGG


def _make_lgg(mask: bool, **save: object) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        write_lgg(folder, patients=2, slices=2, size=16, **save)
        return next((folder / "kaggle_3m").rglob(f"*_1{'_mask' * mask}.tif"))

    return make


def _read_lgg(folder: Path) -> None:
    found = find_patients(folder)
    array = found.decode(1e9, folder / "cache")
    assert array.shape == (4, 4, 16, 16), array.shape
    assert array[:, 3].max() <= 1, array[:, 3]


def _make_predicted(suffix: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        path = folder / f"a.{suffix}"
        Image.fromarray(np.random.default_rng(0).integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(path)
        return path

    return make


def _read_predicted(folder: Path) -> None:
    array = find_images(folder).decode(1e9, folder / "cache")
    assert array.shape[:2] == (1, 3), array.shape


# Own images and masks


def _make_own(image: str, which: str) -> Callable[[Path], Path]:
    """Write images of 16 bits and their masks; the first image, or the first mask, is to be changed."""

    def make(folder: Path) -> Path:
        rng = np.random.default_rng(0)
        for name, suffix, top, kind in (("images", image, 2**16, np.uint16), ("masks", ".png", 2, np.uint8)):
            (folder / name).mkdir()
            for number in range(4):
                pixels = rng.integers(0, top, (64, 64)).astype(kind)
                if suffix == ".npy":
                    np.save(folder / name / f"{number}.npy", pixels)
                else:
                    Image.fromarray(pixels).save(folder / name / f"{number}{suffix}")
        return next((folder / which).glob("0.*"))

    return make


def _read_own(folder: Path) -> None:
    data = MaskFolderDataModule(folder, val_fraction=0.25, test_fraction=0.25)
    data.setup("fit")
    assert data.train_set.images.shape == (4, 3, 64, 64), data.train_set.images.shape
    assert data.train_set.images[:, -1].max() <= 1, data.train_set.images[:, -1]


# Folders of images


def _make_image_folder(folder: Path) -> Path:
    return next((write_image_folder(folder, classes=1, train=2, val=1) / "val").rglob("*.JPEG"))


def _read_image_folder(folder: Path) -> None:
    data = ImageFolderDataModule(folder, image_size=16, resize_size=16, val_fraction=0.5)
    data.setup("test")
    image, label = data.test_set[0]
    assert image.shape == (3, 16, 16), image.shape
    assert label == 0, label


# Config files


def _make_config(name: str) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        return Path(shutil.copy(CONFIGS / name, folder / "config.yaml"))

    return make


def _read_config(folder: Path) -> None:
    main(["fit", "--config", str(folder / "config.yaml"), "--print_config"])


def _read_method(folder: Path) -> None:
    digits = str(CONFIGS / "digits/resnet20.yaml")
    main(["fit", "--config", digits, "--config", str(folder / "config.yaml"), "--print_config"])


TARGETS = {
    "CIFAR-10 batch": Target(_make_cifar10, _read_cifar10),
    "PCam images, h5": Target(_make_pcam("x"), _read_pcam),
    "PCam images, h5 gzip": Target(_make_pcam("x", compression="gzip"), _read_pcam),
    "PCam labels, h5": Target(_make_pcam("y"), _read_pcam),
    "PCam labels, Kaggle csv": Target(_make_kaggle, _read_kaggle, is_text=True),
    "PCam image, Kaggle tif": Target(_make_kaggle_tif, _read_kaggle),
    "LGG slice, tif": Target(_make_lgg(mask=False), _read_lgg),
    "LGG slice, tif LZW": Target(_make_lgg(mask=False, compression="tiff_lzw"), _read_lgg),
    "LGG mask, tif": Target(_make_lgg(mask=True), _read_lgg),
    "image to predict, png": Target(_make_predicted("png"), _read_predicted),
    "image to predict, bmp": Target(_make_predicted("bmp"), _read_predicted),
    "own image, npy": Target(_make_own(".npy", "images"), _read_own),
    "own image, tif": Target(_make_own(".tif", "images"), _read_own),
    "own mask, png": Target(_make_own(".npy", "masks"), _read_own),
    "image folder, JPEG": Target(_make_image_folder, _read_image_folder),
    "experiment, YAML": Target(_make_config("digits/resnet20.yaml"), _read_config, is_text=True),
    "method, YAML": Target(_make_config("methods/znorm.yaml"), _read_method, is_text=True),
}
