"""Files of LGG MRI segmentation: the slices of each patient, and their pixels."""

import os
import re
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from lightning_znorm.data.case_files import CaseFile, CaseFiles, by
from lightning_znorm.data.decoding import VERSION, BadFileError, read_pixels, size_of
from lightning_znorm.data.listing import (
    AGAIN,
    MASK,
    Listing,
    file_identity,
    list_files,
    list_images,
    list_subfolders,
    refuse_broken_links,
    same_files,
    warn_of_skipped,
)
from lightning_znorm.data.resizing import resized_image, resized_mask
from lightning_znorm.errors import ZNormFileNotFoundError

_IMAGES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff"}
_PATIENT = "TCGA_"
_NO_SLICES = "folders without slices"


@dataclass(frozen=True)
class SliceFiles(CaseFiles):
    """The slices in a folder, patient after patient from top to bottom, and their pixels: RGB, and 1 where marked."""

    what: ClassVar[str] = "slices"

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of the decoded slices, ``(N, C, H, W)``, in the size of most patients' first slices."""
        channels = 4 if self.has_masks else 3
        if self.image_size is not None:
            return len(self.files), channels, *self.image_size
        firsts = {each.patient or each.image: each.image for each in reversed(self.files)}
        sizes = Counter(size for size in map(size_of, firsts.values()) if size is not None)
        size = sizes.most_common(1)[0][0] if sizes else (1, 1)
        return len(self.files), channels, *size

    @property
    @override
    def sizes(self) -> list[tuple[int, int]]:
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            return [size or (0, 0) for size in threads.map(size_of, [each.image for each in self.files])]

    @property
    @override
    def cache_name(self) -> str:
        return f"lgg-{VERSION}{'' if self.image_size is None else '-resized'}"

    @override
    def read(self, index: int, into: NDArray[np.uint8]) -> list[str]:
        faults, self.marked[index] = _read(self.files[index], into, self.image_size is not None)
        return faults


def find_patients(root: Path, image_size: tuple[int, int] | None = None) -> SliceFiles:
    """Find the slices of all patients: each folder in ``kaggle_3m`` is one, whatever its name.

    A patient's folder holds an image and a mask beside it for each slice. A warning names what is skipped.

    Args:
        root: ``kaggle_3m``, or a folder that holds ``kaggle_3m`` or ``lgg-mri-segmentation/kaggle_3m``. Kaggle's
            archive holds both; the first is read.
        image_size: Height and width that slices are resized to.

    Returns:
        The slices. Faults are masks without an image, images without a mask, two images or masks that differ only in
        their suffix or the case of letters, and a file that is the image of two slices. Several slices may have the
        same mask file, because some programs store equal files once.

    Raises:
        FileNotFoundError: If there are none, or if ``kaggle_3m`` is a broken link.
    """
    # The root comes last: beside kaggle_3m it may hold other folders of images.
    candidates = [root / "kaggle_3m", root / "lgg-mri-segmentation" / "kaggle_3m", root]
    folder = next(filter(_holds_patients, candidates), None)
    if folder is None:
        raise ZNormFileNotFoundError(
            f"No LGG slices (kaggle_3m/TCGA_*/*.tif) at {root}: let root name the folder that holds kaggle_3m, from "
            "https://www.kaggle.com/datasets/mateuszbuda/lgg-mri-segmentation."
        )
    names, found = list_subfolders(folder, _IMAGES)
    slices: list[CaseFile] = []
    for name in names:
        listing = list_files(folder / name, _IMAGES, recursive=False)
        if not listing.paths and not listing.faults and not name.startswith(_PATIENT):
            found.skip(_NO_SLICES, [str(folder / name)])
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
    kept = [each for index, each in enumerate(slices) if index not in again]
    return SliceFiles(folder, kept, found.faults, image_size)


def find_images(folder: Path, image_size: tuple[int, int] | None = None) -> SliceFiles:
    """Find images to predict for, as `list_images` does. Of each folder, slice 10 comes after slice 9."""
    found = list_images(folder, _IMAGES)
    paths = sorted(map(Path, found.paths), key=lambda path: (path.parent, _in_order(path.stem)))
    return SliceFiles(folder, [CaseFile(path) for path in paths], found.faults, image_size)


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
        if (stems or files.faults) if name.startswith(_PATIENT) else any(map(MASK.search, stems)):
            return True
    return False


def _pair(patient: Path, listing: Listing) -> list[CaseFile]:
    """Return a patient's slices from top to bottom, and add what is wrong to the faults of the listing."""
    files: dict[str, Path] = {}
    for path in map(Path, listing.paths):
        stem = MASK.sub(lambda end: end.group().lower(), path.stem)
        if (other := files.setdefault(stem, path)) != path:
            listing.faults.append(f"{path}: differs from {other.name} only in the suffix or the case of letters")
    images = sorted((stem for stem in files if not MASK.search(stem)), key=_in_order)
    if not images and not listing.faults:
        listing.faults.append(f"{patient}: holds no slices")
    slices = []
    for stem in images:
        slices.append(CaseFile(files[stem], files.pop(f"{stem}_mask", None), _patient(patient.name)))
        if slices[-1].mask is None:
            listing.faults.append(f"{files[stem]}: has no mask beside it, {stem}_mask.tif")
    for stem, path in files.items():
        if MASK.search(stem):
            of = MASK.sub("", stem)
            fault = f"is a second mask of {files[of].name}" if of in files else f"has no image beside it, {of}.tif"
            listing.faults.append(f"{path}: {fault}")
    return slices


def _is_one_slice(first: CaseFile, other: CaseFile) -> bool:
    if first.mask is None or other.mask is None:
        return first == other
    return first.patient == other.patient and file_identity(first.mask) == file_identity(other.mask)


def _read(found: CaseFile, into: NDArray[np.uint8], resize: bool) -> tuple[list[str], float]:
    """Decode a slice, resized to the size of ``into`` or refused if it has another.

    Returns:
        Its faults, and the share of the pixels that are marked in the file of its mask.
    """
    faults, share = [], 0.0
    size = into.shape[1:]
    pixels = None
    try:
        pixels = read_pixels(found.image, modes=["RGB"] if len(into) > 3 else ["RGB", "L"])
        image = resized_image(pixels, size) if resize else _of_size(pixels, size, "the other slices")
        into[:3] = image.transpose(2, 0, 1) if image.ndim > 2 else image
    except BadFileError as fault:
        faults.append(f"{found.image}: {fault}")
    if found.mask is not None:
        try:
            mask = read_pixels(found.mask, modes=["L", "1"])
            if not resize:
                mask = _of_size(mask, size, "the other slices")
            elif pixels is not None:
                mask = _of_size(mask, pixels.shape[:2], "its image")
            marked = mask == 255
            if (others := mask[(mask != 0) & ~marked]).size:
                values = ", ".join(map(str, np.unique(others)))
                raise BadFileError(f"is a mask with the values {values} besides 0 and 255")
            share = float(marked.mean())
            into[3] = resized_mask(marked.astype(np.uint8), size)
        except BadFileError as fault:
            faults.append(f"{found.mask}: {fault}")
    return faults, share


def _of_size(pixels: NDArray[np.uint8], size: Sequence[int], of: str) -> NDArray[np.uint8]:
    if pixels.shape[:2] != tuple(size):
        raise BadFileError(f"is {by(pixels.shape[:2])} pixels (height x width), and {of} {by(size)}")
    return pixels


def _in_order(stem: str) -> tuple[str, int]:
    """Return a sorting key that puts slice 10 after slice 9."""
    return stem.rstrip("0123456789"), number_of(stem) or 0


def number_of(stem: str) -> int | None:
    """Return the number at the end of a name, if there is one."""
    digits = stem[len(stem.rstrip("0123456789")) :]
    return int(digits) if digits else None


def _patient(folder: str) -> str:
    """Return the patient of a folder: its name, for ``TCGA_*`` without the day of the scan."""
    return re.sub(r"_\d{8}$", "", folder) if folder.startswith(_PATIENT) else folder
