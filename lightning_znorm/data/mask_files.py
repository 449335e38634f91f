"""Images and masks in two folders, paired by their names, as arrays of values and of class numbers."""

import hashlib
import os
import re
from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from lightning_znorm.data.case_files import CaseFile, CaseFiles, by
from lightning_znorm.data.datasets import IGNORED
from lightning_znorm.data.decoding import VERSION, BadFileError, Pixels, kind_of, read_deep_pixels
from lightning_znorm.data.listing import (
    AGAIN,
    Listing,
    file_identity,
    list_files,
    list_images,
    refuse_broken_links,
    same_files,
    warn_of_skipped,
)
from lightning_znorm.data.resizing import resized_image, resized_mask
from lightning_znorm.data.splits import patient_of
from lightning_znorm.errors import ZNormFileNotFoundError

IMAGES, MASKS = "images", "masks"
_NUMPY = ".npy"
_SUFFIXES = {".bmp", ".jpeg", ".jpg", _NUMPY, ".png", ".tif", ".tiff"}
# NumPy parses the headers of arrays by `ast`, which fails at times in several threads at once (CPython 3.11).
_HEADER = Lock()
_UNKNOWN = -1
_SHOWN = 10  # values that a message names


@dataclass(frozen=True)
class MaskFiles(CaseFiles):
    """Images of one kind, grey or RGB, of 8 or 16 bits for each channel, and masks of class numbers.

    Args:
        classes: The class of each value of a mask; `IGNORED` if its pixels do not count.
        either: Values of which only one may occur.
        by_default: Whether the user has not said which class a value is.
    """

    classes: Mapping[int, int] = field(default_factory=dict)
    either: tuple[int, ...] = ()
    by_default: bool = False
    found: set[int] = field(default_factory=set)
    """Values of all masks that were read."""

    @cached_property
    def _kinds(self) -> list[tuple[int, int, int, int] | None]:
        """What the header of each image says."""
        with ThreadPoolExecutor(os.cpu_count()) as threads:
            return list(threads.map(_kind, [each.image for each in self.files]))

    @property
    @override
    def sizes(self) -> list[tuple[int, int]]:
        return [(0, 0) if kind is None else kind[2:] for kind in self._kinds]

    @cached_property
    def kind(self) -> tuple[int, int, int, int]:
        """Channels and bits of most images, and height and width of most of these."""
        kinds = [kind for kind in self._kinds if kind is not None]
        if not kinds:
            return 1, 8, 1, 1
        ((usual, _),) = Counter(kind[:2] for kind in kinds).most_common(1)
        return Counter(kind for kind in kinds if kind[:2] == usual).most_common(1)[0][0]

    @property
    def value_bytes(self) -> int:
        """Bytes of a value of the images."""
        return self.kind[1] // 8

    @property
    @override
    def shape(self) -> tuple[int, ...]:
        channels, _, *size = self.kind
        return len(self.files), channels * self.value_bytes + self.has_masks, *(self.image_size or size)

    @property
    @override
    def cache_name(self) -> str:
        settings = repr((sorted(self.classes.items()), self.either, self.by_default, self.kind[:2], self.image_size))
        return f"masks-{VERSION}-{hashlib.sha256(settings.encode()).hexdigest()[:8]}"

    @cached_property
    def _class_of(self) -> NDArray[np.int64]:
        classes = np.full(2**16, _UNKNOWN)
        for value, number in self.classes.items():
            classes[value] = number
        return classes

    @override
    def read(self, index: int, into: NDArray[np.uint8]) -> list[str]:
        files, faults, size = self.files[index], [], None
        try:
            pixels = _read_image(files.image)
            size = pixels.shape[:2]
            self._check_kind(pixels)
            channels = np.atleast_3d(resized_image(pixels, into.shape[1:])).transpose(2, 0, 1)
            parts = [channels] if self.value_bytes == 1 else [channels >> 8, channels & 255]
            into[: len(into) - self.has_masks] = np.stack(parts, axis=1).reshape(-1, *into.shape[1:])
        except BadFileError as fault:
            faults.append(f"{files.image}: {fault}")
        if files.mask is not None:
            try:
                mask = _read_mask(files.mask, self.by_default)
                if size is not None and mask.shape != size:
                    raise BadFileError(f"is {by(mask.shape)} pixels (height x width), and its image {by(size)}")
                classes = self._classes_in(mask)
                self.marked[index] = ((classes != 0) & (classes != IGNORED)).mean()
                into[-1] = resized_mask(classes, into.shape[1:])
            except BadFileError as fault:
                faults.append(f"{files.mask}: {fault}")
        return faults

    @override
    def faults_of_all(self) -> list[str]:
        values = sorted(self.found)
        unknown = [value for value in values if value not in self.classes]
        if not unknown and sum(value in self.found for value in self.either) < 2:
            return []
        given = {} if self.either else dict(self.classes)
        free = iter(number for number in range(IGNORED) if number not in given.values())
        proposal = given | {value: next(free, IGNORED) for value in values[:_SHOWN] if value not in given}
        return [
            f"{self.folder.parent / MASKS}: the masks hold the values {_listed(values)}: let mask_values give the "
            f"class of each, such as mask_values: {dict(sorted(proposal.items()))}, with {IGNORED} as the class of "
            "pixels that do not count"
        ]

    def _check_kind(self, pixels: Pixels) -> None:
        channels, bits, *size = self.kind
        found = 1 if pixels.ndim == 2 else pixels.shape[2], pixels.dtype.itemsize * 8
        if found != (channels, bits):
            raise BadFileError(
                f"is {_words(*found)}, and the other images {_words(channels, bits)}: images of one kind are expected"
            )
        if self.image_size is None and pixels.shape[:2] != tuple(size):
            raise BadFileError(
                f"is {by(pixels.shape[:2])} pixels (height x width), and the other images {by(size)}: set image_size, "
                "and all are resized to it"
            )

    def _classes_in(self, mask: NDArray[Any]) -> NDArray[np.uint8]:
        if mask.dtype.kind == "i" or mask.dtype.itemsize > 2:
            outside = np.unique(mask[(mask < 0) | (mask >= 2**16)])
            if outside.size:
                raise BadFileError(f"is a mask with the values {_listed(outside)}, which no file of 16 bits holds")
        values = np.unique(mask).tolist()
        self.found.update(values)
        if unknown := [value for value in values if value not in self.classes]:
            raise BadFileError(f"is a mask with the values {_listed(unknown)} besides {_listed(sorted(self.classes))}")
        classes: NDArray[np.uint8] = self._class_of[mask].astype(np.uint8)
        return classes


def find_pairs(
    root: Path,
    mask_suffix: str,
    patient: re.Pattern[str] | None,
    classes: Mapping[int, int],
    either: tuple[int, ...],
    image_size: tuple[int, int] | None,
    by_default: bool,
) -> MaskFiles:
    """Find the images in ``root/images`` and their masks in ``root/masks``, by their names.

    Args:
        root: Folder that holds both.
        mask_suffix: What the name of a mask has behind that of its image.
        patient: Finds the patient in an image's name.
        classes: The class of each value of a mask.
        either: Values of which only one may occur.
        image_size: Height and width that images and masks are resized to.
        by_default: Whether the user has not said which class a value is.

    Returns:
        The files. Faults are images without a mask, masks without an image, two files whose names differ only in the
        suffix, names without a patient, and a file that is the image of two cases.

    Raises:
        FileNotFoundError: If there are none.
    """
    folder, folder_of_masks = root / IMAGES, root / MASKS
    refuse_broken_links([root, folder, folder_of_masks])
    for each in (folder, folder_of_masks):
        if not each.is_dir():
            raise ZNormFileNotFoundError(
                f"No folder {each}: let root name the folder that holds {IMAGES} and {MASKS}, with files of the same "
                "names in both."
            )
    listing, of_masks = list_files(folder, _SUFFIXES), list_files(folder_of_masks, _SUFFIXES)
    faults = [*listing.faults, *of_masks.faults]
    images = _by_name(folder, listing, "", faults)
    masks = _by_name(folder_of_masks, of_masks, mask_suffix, faults)
    if not images and not masks and not faults:
        raise ZNormFileNotFoundError(f"No images in {folder}, files that end in {', '.join(sorted(_SUFFIXES))}.")
    faults += [
        f"{path}: has no mask, {folder_of_masks / name}{mask_suffix}.*"
        for name, path in images.items()
        if name not in masks
    ]
    faults += [f"{path}: has no image, {folder / name}.*" for name, path in masks.items() if name not in images]
    cases = []
    for name in sorted(images):
        who = patient_of(name, patient)
        if not who:
            faults.append(f"{images[name]}: patient_pattern finds no patient in {name!r}")
        cases.append(CaseFile(images[name], masks.get(name), who))
    repeated = _repeated(cases, listing, faults)
    listing.skip(AGAIN, [str(cases[index].image) for index in repeated])
    every = Listing(faults=faults)
    for part in (listing, of_masks):
        for reason, paths in part.skipped.items():
            every.skip(reason, paths)
    warn_of_skipped(root, every)
    kept = [case for index, case in enumerate(cases) if index not in repeated]
    return MaskFiles(folder, kept, faults, image_size, classes, either, by_default)


def find_images(folder: Path, image_size: tuple[int, int] | None) -> MaskFiles:
    """Find images to predict for, as `list_images` does."""
    listing = list_images(folder, _SUFFIXES)
    return MaskFiles(folder, [CaseFile(Path(path)) for path in listing.paths], listing.faults, image_size)


def _by_name(folder: Path, listing: Listing, end: str, faults: list[str]) -> dict[str, Path]:
    """Return files by their paths in a folder, without suffix and without what else their names end in."""
    files: dict[str, Path] = {}
    for path in map(Path, listing.paths):
        name = path.relative_to(folder).with_suffix("").as_posix()
        if not name.endswith(end):
            faults.append(f"{path}: its name does not end in mask_suffix, {end}")
            continue
        name = name.removesuffix(end)
        if (other := files.setdefault(name, path)) != path:
            faults.append(f"{path}: differs from {other.name} only in the suffix")
    return files


def _repeated(cases: list[CaseFile], listing: Listing, faults: list[str]) -> set[int]:
    """Return the cases whose image and mask are files of an earlier case.

    A case whose image alone is that of an earlier case is added to the faults.
    """
    numbers = dict(zip(listing.paths, listing.inodes, strict=True))
    paths = [str(case.image) for case in cases]
    repeated = set()
    for first, other in same_files(paths, [numbers[path] for path in paths]):
        one, two = cases[first], cases[other]
        if one.mask and two.mask and file_identity(one.mask) == file_identity(two.mask):
            repeated.add(other)
        else:
            faults.append(f"{two.image}: is the same file as {one.image}, but has another mask")
    return repeated


def _kind(path: Path) -> tuple[int, int, int, int] | None:
    """Return channels, bits, height and width of an image; None if its header cannot be read, or is of another kind."""
    if path.suffix.lower() != _NUMPY:
        kind = kind_of(path)
        return kind if kind is not None and kind[0] in (1, 3) else None
    try:
        pixels = _array(path)
        _check_array(pixels)
    except BadFileError:
        return None
    return 1 if pixels.ndim == 2 else 3, pixels.dtype.itemsize * 8, *pixels.shape[:2]


def _read_image(path: Path) -> Pixels:
    if path.suffix.lower() != _NUMPY:
        return read_deep_pixels(path, modes=["L", "1", "RGB", "I;16"])
    pixels = _array(path)
    _check_array(pixels)
    return np.array(pixels, dtype=pixels.dtype.newbyteorder("="))


def _check_array(pixels: NDArray[Any]) -> None:
    if pixels.dtype.newbyteorder("=") not in (np.dtype(np.uint8), np.dtype(np.uint16)):
        raise BadFileError(f"is an array of {pixels.dtype}, and uint8 or uint16 is expected")
    if 0 in pixels.shape or not (pixels.ndim == 2 or (pixels.ndim == 3 and pixels.shape[2] == 3)):
        raise BadFileError(f"is an array of shape {pixels.shape}, and (H, W) or, for RGB, (H, W, 3) is expected")


def _read_mask(path: Path, by_default: bool) -> NDArray[Any]:
    if path.suffix.lower() != _NUMPY:
        return read_deep_pixels(path, modes=["L", "1", "P", "I;16"], brighter=by_default)
    mask = _array(path)
    if mask.dtype.kind not in "biu":
        raise BadFileError(f"is an array of {mask.dtype}, and whole numbers are expected")
    if mask.ndim != 2 or 0 in mask.shape:
        raise BadFileError(f"is an array of shape {mask.shape}, and (H, W) is expected")
    return np.array(mask, dtype=np.uint8 if mask.dtype == np.bool_ else mask.dtype)


def _array(path: Path) -> NDArray[Any]:
    """Map an array in a file; its values are read when they are used."""
    try:
        with _HEADER:
            array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # NumPy raises several for damaged files
        raise BadFileError(f"cannot be read as an array ({type(error).__name__}: {error})") from error
    if not isinstance(array, np.ndarray):
        raise BadFileError("is an archive of arrays, and one array is expected")
    return array


def _words(channels: int, bits: int) -> str:
    return f"{'grey' if channels == 1 else 'RGB'} of {bits} bits"


def _listed(values: Any) -> str:
    values = [int(value) for value in values]
    others = f" and {len(values) - _SHOWN} more" if len(values) > _SHOWN else ""
    return f"{', '.join(map(str, values[:_SHOWN]))}{others}"
