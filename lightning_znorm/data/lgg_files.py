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
from lightning_znorm.data.decoding import VERSION, BadFileError, read_all, read_pixels, refuse, size_of
from lightning_znorm.data.files import (
    AGAIN,
    Listing,
    file_identity,
    list_files,
    list_subfolders,
    refuse_broken_links,
    same_files,
    warn_of_skipped,
)
from lightning_znorm.errors import ZNormFileNotFoundError

_IMAGES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff"}
_MASK = re.compile(r"_mask(_\d+)?$", re.IGNORECASE)
_PATIENT = "TCGA_"
LONE_MASKS = "masks without an image beside them"
NO_SLICES = "folders without slices"


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
        return cached_array(f"lgg-{VERSION}", sources, self.shape, self._fill, cache).map()[0]

    def _fill(self, array: NDArray[np.uint8] | None) -> None:
        def read(index: int) -> list[str]:
            return _read(self.slices[index], np.empty(self.shape[1:], np.uint8) if array is None else array[index])

        refuse(sorted(self.faults + read_all(read, len(self.slices), "slices")), self.folder)


def find_patients(root: Path) -> Found:
    """Find the slices of all patients: of each folder in ``kaggle_3m``, whatever its name.

    A patient's folder holds an image and a mask beside it for each slice. What is left out is named in a warning.

    Args:
        root: ``kaggle_3m``, or a folder that holds it, or that holds ``lgg-mri-segmentation/kaggle_3m``. Kaggle's
            archive holds both of the latter, of which one is read.

    Returns:
        The slices. Among the faults are masks without an image, images without a mask, two images or masks that
        differ in their suffix or the case of letters alone, and a file that is the image of two slices. A mask may be
        that of several slices, as where equal files are stored once.

    Raises:
        FileNotFoundError: If there are none, or if ``kaggle_3m`` is a link that leads nowhere.
    """
    # The fallback last: beside kaggle_3m there may be other folders of images.
    candidates = [root / "kaggle_3m", root / "lgg-mri-segmentation" / "kaggle_3m", root]
    folder = next(filter(_holds_patients, candidates), None)
    if folder is None:
        raise ZNormFileNotFoundError(
            f"No LGG slices (kaggle_3m/TCGA_*/*.tif) at {root}: let root name the folder that holds kaggle_3m, from "
            "https://www.kaggle.com/datasets/mateuszbuda/lgg-mri-segmentation."
        )
    names, found = list_subfolders(folder, _IMAGES)
    slices: list[Slice] = []
    for name in names:
        listing = list_files(folder / name, _IMAGES, recursive=False)
        if not listing.paths and not listing.faults and not name.startswith(_PATIENT):
            found.skip(NO_SLICES, [str(folder / name)])
            continue
        slices += _pair(folder / name, listing)
        found.extend(listing)
    numbers = dict(zip(found.paths, found.inodes, strict=True))
    images = [str(each.image) for each in slices]
    again = set()
    for first, other in same_files(images, [numbers[path] for path in images]):
        if _is_one_slice(slices[first], slices[other]):
            again.add(other)
        else:
            found.faults.append(
                f"{images[other]}: is the same file as {images[first]}, but not of its patient and mask"
            )
    found.skip(AGAIN, [images[index] for index in again])
    warn_of_skipped(folder, found)
    return Found(folder, [each for index, each in enumerate(slices) if index not in again], found.faults)


def find_images(folder: Path) -> Found:
    """Find images in a folder and in those inside it.

    Masks are left out: files named like an image beside them and ``_mask``, or ``_mask_0`` and so on, as `MaskWriter`
    names them, in upper or lower case. What else is left out is named in a warning, masks without an image too. An
    image counts once, whatever links lead to it.

    Raises:
        FileNotFoundError: If there are none.
    """
    found = list_files(folder, _IMAGES) if folder.is_dir() else Listing()
    numbers = dict(zip(found.paths, found.inodes, strict=True))
    images = [path for path in found.paths if not _MASK.search(Path(path).stem)]
    again = {other for _, other in same_files(images, [numbers[path] for path in images])}
    found.skip(AGAIN, [images[index] for index in again])
    kept = [Path(path) for index, path in enumerate(images) if index not in again]
    names = {(path.parent, path.stem) for path in kept}
    masks = map(Path, {*found.paths} - {*images})
    found.skip(LONE_MASKS, [str(mask) for mask in masks if (mask.parent, _MASK.sub("", mask.stem)) not in names])
    warn_of_skipped(folder, found)
    if not kept and not found.faults:
        raise ZNormFileNotFoundError(
            f"No images at {folder}, files that end in {', '.join(sorted(_IMAGES))} and are no masks (*_mask)."
        )
    slices = [Slice(path) for path in sorted(kept, key=lambda path: (path.parent, _in_order(path.stem)))]
    return Found(folder, slices, found.faults)


def _holds_patients(folder: Path) -> bool:
    refuse_broken_links([folder.parent, folder])
    if not folder.is_dir():
        return False
    names, listing = list_subfolders(folder, ())
    if any(fault.startswith(str(folder / _PATIENT)) for fault in listing.faults):
        return True
    for name in names:
        files = list_files(folder / name, _IMAGES, recursive=False)
        stems = [Path(path).stem for path in files.paths]
        if (stems or files.faults) if name.startswith(_PATIENT) else any(map(_MASK.search, stems)):
            return True
    return False


def _pair(patient: Path, listing: Listing) -> list[Slice]:
    """Put a patient's images and masks together, from top to bottom; what is wrong becomes a fault of the listing."""
    files: dict[str, Path] = {}
    for path in map(Path, listing.paths):
        stem = _MASK.sub(lambda end: end.group().lower(), path.stem)
        if (other := files.setdefault(stem, path)) != path:
            listing.faults.append(f"{path}: has the name of {other.name} but for the suffix or the case of letters")
    images = sorted((stem for stem in files if not _MASK.search(stem)), key=_in_order)
    if not images and not listing.faults:
        listing.faults.append(f"{patient}: holds no slices")
    slices = []
    for stem in images:
        slices.append(Slice(files[stem], files.pop(f"{stem}_mask", None), _patient(patient.name)))
        if slices[-1].mask is None:
            listing.faults.append(f"{files[stem]}: has no mask beside it, {stem}_mask.tif")
    for stem, path in files.items():
        if _MASK.search(stem):
            of = _MASK.sub("", stem)
            fault = f"is a second mask of {files[of].name}" if of in files else f"has no image beside it, {of}.tif"
            listing.faults.append(f"{path}: {fault}")
    return slices


def _is_one_slice(first: Slice, other: Slice) -> bool:
    if first.mask is None or other.mask is None:
        return first == other
    return first.patient == other.patient and file_identity(first.mask) == file_identity(other.mask)


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


def _in_order(stem: str) -> tuple[str, int]:
    """Sort slice 10 behind slice 9."""
    number = re.search(r"\d*$", stem)
    assert number is not None
    return stem[: number.start()], int(number.group() or 0)


def _patient(folder: str) -> str:
    """Leave out the day of the scan, which the names of ``TCGA_*`` end in: who was scanned twice is one patient."""
    return re.sub(r"_\d{8}$", "", folder) if folder.startswith(_PATIENT) else folder
