"""PatchCamelyon as Kaggle's competition `histopathologic-cancer-detection` has it."""

import csv
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lightning_znorm.data.array_file import ArrayFile, cached_array
from lightning_znorm.data.decoding import VERSION, BadFileError, read_all, read_pixels, refuse
from lightning_znorm.data.files import Listing, list_files, same_files, warn_of_skipped
from lightning_znorm.data.images import Labels
from lightning_znorm.errors import ZNormValueError

LABELS = "train_labels.csv"
PATCH = (96, 96, 3)


def read_kaggle(folder: Path, cache: Path) -> tuple[ArrayFile, Labels]:
    """Decode the labelled images, or find them decoded by an earlier run.

    Args:
        folder: Holds ``train`` and ``train_labels.csv``.
        cache: Folder for the decoded images.

    Returns:
        Where the images are, shape ``(N, 96, 96, 3)``, in the order of their names, and their labels.

    Raises:
        ValueError: If images and labels do not belong together, or an image is damaged: all such are named.
    """
    labels, faults = _labels(folder / LABELS)
    listing = list_files(folder / "train", {".tif", ".tiff"}, recursive=False)
    paths, faults_of_images = _by_name(listing)
    faults += faults_of_images
    faults += [f"{path}: has no label in {LABELS}" for name, path in sorted(paths.items()) if name not in labels]
    faults += [f"{folder / 'train' / name}.tif: is missing" for name in sorted(labels) if name not in paths]
    refuse(faults, folder)
    warn_of_skipped(folder / "train", listing)
    names = sorted(labels)

    def fill(array: NDArray[np.uint8]) -> None:
        def read(index: int) -> list[str]:
            path = paths[names[index]]
            try:
                pixels = read_pixels(path, modes=["RGB"])
                if pixels.shape != PATCH:
                    raise BadFileError(f"is {pixels.shape[0]}x{pixels.shape[1]} pixels, and 96x96 are expected")
                array[index] = pixels
            except BadFileError as fault:
                return [f"{path}: {fault}"]
            return []

        refuse(read_all(read, len(names), "patches"), folder)

    sources = [folder / LABELS, *(paths[name] for name in names)]
    images = cached_array(f"pcam-kaggle-{VERSION}", sources, (len(names), *PATCH), fill, cache)
    return images, np.array([labels[name] for name in names], dtype=np.int64)


def _by_name(listing: Listing) -> tuple[dict[str, Path], list[str]]:
    faults = listing.faults
    paths: dict[str, Path] = {}
    for path in map(Path, listing.paths):
        if (other := paths.setdefault(path.stem, path)) != path:
            faults.append(f"{path}: has the name of {other.name} but for the suffix")
    # In which of the sets each name would be, chance decides.
    faults += [
        f"{listing.paths[other]}: is the same file as {listing.paths[first]}"
        for first, other in same_files(listing.paths, listing.inodes)
    ]
    return paths, faults


def _labels(path: Path) -> tuple[dict[str, int], list[str]]:
    labels: dict[str, int] = {}
    faults = []
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines(keepends=True)
    except (OSError, UnicodeDecodeError) as error:
        raise ZNormValueError(f"{path} cannot be read ({error}): unpack it again.") from error
    rows = csv.DictReader(lines, strict=True)
    try:
        if not {"id", "label"} <= set(rows.fieldnames or ()):
            raise ZNormValueError(f"{path} begins with {rows.fieldnames}, and its columns must be id and label.")
        for row in rows:
            name, label = row["id"], row["label"]
            if label not in ("0", "1"):
                faults.append(f"{path}: line {rows.line_num} labels {name} {label!r}, which is neither 0 nor 1")
            elif name in labels:
                faults.append(f"{path}: line {rows.line_num} names {name} again")
            else:
                labels[name] = int(label)
    except csv.Error as error:
        raise ZNormValueError(f"{path} cannot be read, for its line {rows.line_num} is no CSV ({error}).") from error
    if not labels and not faults:
        faults.append(f"{path}: holds no labels")
    return labels, faults
