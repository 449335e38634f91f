"""Which files are slices, in the LGG data set and in a folder without masks, and their pixels."""

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lightning_znorm.data.array_file import cached_array
from lightning_znorm.data.decoding import BadFileError, read_all, read_pixels, refuse, size_of

_MASK = "_mask"
_TIFF = {".tif", ".tiff"}
_IMAGES = _TIFF | {".bmp", ".jpeg", ".jpg", ".png"}


@dataclass(frozen=True)
class Slice:
    """A slice in files.

    Args:
        image: Path of the image.
        mask: Path of the mask, if there is one.
        patient: Who was scanned.
    """

    image: Path
    mask: Path | None = None
    patient: str = ""


@dataclass(frozen=True)
class Found:
    """What is in a folder.

    Args:
        folder: Where the slices are.
        slices: All of them, patient after patient from top to bottom.
        faults: What is wrong so far.
    """

    folder: Path
    slices: list[Slice]
    faults: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """Paths of the images, from the folder on."""
        return [found.image.relative_to(self.folder).as_posix() for found in self.slices]

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of the decoded slices, ``(N, C, H, W)``, with the size that most patients' first slices have."""
        firsts = {found.patient or found.image: found.image for found in reversed(self.slices)}
        sizes = Counter(size for size in map(size_of, firsts.values()) if size is not None)
        size = sizes.most_common(1)[0][0] if sizes else (1, 1)
        return len(self.slices), 4 if any(found.mask for found in self.slices) else 3, *size

    def fits(self, max_memory: float) -> bool:
        """Whether the decoded slices take at most that many bytes."""
        return math.prod(self.shape) <= max_memory

    def decode(self, max_memory: float, cache: Path) -> NDArray[np.uint8]:
        """Decode everything once, into memory if it fits there and else into a file.

        Args:
            max_memory: Size in bytes up to which it fits.
            cache: Folder for the file.

        Returns:
            Shape ``(N, C, H, W)``: red, green and blue and, if the slices have masks, 1 where the mask is marked.

        Raises:
            ValueError: If a file is damaged, or missing: all such are named.
        """
        if self.faults:
            self._fill(None)  # for the other faults there are: it raises
        if self.fits(max_memory):
            array = np.empty(self.shape, dtype=np.uint8)
            self._fill(array)
            return array
        sources = [path for found in self.slices for path in (found.image, found.mask) if path is not None]
        return cached_array("lgg", sources, self.shape, self._fill, cache).map()[0]

    def _fill(self, array: NDArray[np.uint8] | None) -> None:
        def read(index: int) -> list[str]:
            return _read(self.slices[index], np.empty(self.shape[1:], np.uint8) if array is None else array[index])

        refuse(sorted(self.faults + read_all(read, len(self.slices), "slices")), self.folder)


def find_patients(root: Path) -> Found:
    """Find the slices of all patients.

    Args:
        root: ``kaggle_3m``, or a folder that holds it, or that holds ``lgg-mri-segmentation/kaggle_3m``. Kaggle's
            archive holds both of the latter, of which one is read.

    Returns:
        The slices. Masks without an image and images without a mask are among the faults.

    Raises:
        FileNotFoundError: If there are none.
    """
    candidates = [root, root / "kaggle_3m", root / "lgg-mri-segmentation" / "kaggle_3m"]
    folder = next((candidate for candidate in candidates if any(candidate.glob("TCGA_*/*.tif"))), None)
    if folder is None:
        raise FileNotFoundError(
            f"No LGG slices (kaggle_3m/TCGA_*/*.tif) at {root}: let root name the folder that holds kaggle_3m, from "
            "https://www.kaggle.com/datasets/mateuszbuda/lgg-mri-segmentation."
        )
    slices, faults = [], []
    for patient in sorted(path for path in folder.glob("TCGA_*") if path.is_dir()):
        files = {path.stem: path for path in patient.iterdir() if _is_image(path, _TIFF)}
        images = sorted((stem for stem in files if not stem.endswith(_MASK)), key=_in_order)
        if not images:
            faults.append(f"{patient}: holds no slices")
        for stem in images:
            mask = files.get(stem + _MASK)
            slices.append(Slice(files[stem], mask, _patient(patient.name)))
            if mask is None:
                faults.append(f"{files[stem]}: has no mask beside it, {stem}{_MASK}.tif")
        alone = [stem for stem in files if stem.endswith(_MASK) and stem.removesuffix(_MASK) not in files]
        faults += [f"{files[stem]}: has no image beside it, {stem.removesuffix(_MASK)}.tif" for stem in alone]
    return Found(folder, slices, faults)


def find_images(folder: Path) -> Found:
    """Find images in a folder and in those inside it; masks among them are left out.

    Raises:
        FileNotFoundError: If there are none.
    """
    paths = [path for path in folder.rglob("*") if _is_image(path, _IMAGES) and not path.stem.endswith(_MASK)]
    if not paths:
        raise FileNotFoundError(f"No images at {folder}, files that end in {', '.join(sorted(_IMAGES))}.")
    return Found(folder, [Slice(path) for path in sorted(paths, key=lambda path: (path.parent, _in_order(path.stem)))])


def _read(found: Slice, into: NDArray[np.uint8]) -> list[str]:
    """Decode a slice, and return what is wrong with it."""
    faults = []
    size = into.shape[1:]
    try:
        pixels = read_pixels(found.image, modes=["RGB"] if len(into) > 3 else ["RGB", "L"])
        into[:3] = _of_size(pixels, size).transpose(2, 0, 1) if pixels.ndim > 2 else _of_size(pixels, size)
    except BadFileError as fault:
        faults.append(f"{found.image}: {fault}")
    if found.mask is not None:
        try:
            mask = _of_size(read_pixels(found.mask, modes=["L", "1"]), size)
            marked = mask == 255
            if (others := mask[(mask != 0) & ~marked]).size:
                values = ", ".join(map(str, np.unique(others)))
                raise BadFileError(f"is a mask with the values {values} besides 0 and 255")
            into[3] = marked
        except BadFileError as fault:
            faults.append(f"{found.mask}: {fault}")
    return faults


def _of_size(pixels: NDArray[np.uint8], size: Iterable[int]) -> NDArray[np.uint8]:
    if pixels.shape[:2] != tuple(size):
        raise BadFileError(f"is {_by(pixels.shape[:2])} pixels (height x width), and the other slices {_by(size)}")
    return pixels


def _by(size: Iterable[int]) -> str:
    return "x".join(map(str, size))


def _is_image(path: Path, suffixes: set[str]) -> bool:
    return path.suffix.lower() in suffixes and not path.name.startswith(".") and path.is_file()


def _in_order(stem: str) -> tuple[str, int]:
    """Sort slice 10 behind slice 9."""
    number = re.search(r"\d*$", stem)
    assert number is not None
    return stem[: number.start()], int(number.group() or 0)


def _patient(folder: str) -> str:
    """Leave out the day of the scan: who was scanned twice is one patient."""
    return re.sub(r"_\d{8}$", "", folder)
