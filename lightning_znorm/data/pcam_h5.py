"""PatchCamelyon's HDF5 files."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lightning_znorm.data.array_file import ArrayFile, cached_array
from lightning_znorm.data.decoding import with_progress
from lightning_znorm.data.files import file_identity
from lightning_znorm.data.images import Labels
from lightning_znorm.errors import ZNormFileNotFoundError, ZNormImportError, ZNormRuntimeError, ZNormValueError

PATCH = (96, 96, 3)
"""Height, width and channels of a patch."""
ADVICE = (
    "get it from https://github.com/basveeling/pcam, or with torchvision.datasets.PCAM(root, split, download=True), "
    "and unpack it with gunzip"
)


def h5_path(folder: Path, split: str, what: str) -> Path:
    """Return the path of the images (``x``) or labels (``y``) of ``train``, ``valid`` or ``test``."""
    return folder / f"camelyonpatch_level_2_split_{split}_{what}.h5"


def refuse_same_files(paths: Iterable[Path]) -> None:
    """Refuse files that are one file under several names: a split would be validated or tested on itself.

    Raises:
        ValueError: If there are such.
    """
    by_identity: dict[object, Path] = {}
    for path in paths:
        if (first := by_identity.setdefault(file_identity(path), path)) != path:
            raise ZNormValueError(f"{path} is the same file as {first}: {ADVICE}.")


def read_h5(folder: Path, split: str, cache: Path) -> tuple[ArrayFile, Labels]:
    """Find the images of a split, and read its labels.

    Args:
        folder: Holds the files.
        split: ``"train"``, ``"valid"`` or ``"test"``.
        cache: Folder for the images, unless they lie uncompressed and in one piece in their file.

    Returns:
        Where the images are, shape ``(N, 96, 96, 3)``, and their labels.

    Raises:
        FileNotFoundError: If a file is missing.
        RuntimeError: If a file cannot be read.
        ValueError: If it holds anything but PatchCamelyon's patches and labels.
    """
    x, y = (h5_path(folder, split, what) for what in "xy")
    if missing := [path for path in (x, y) if not path.is_file()]:
        raise ZNormFileNotFoundError(f"No {' and no '.join(map(str, missing))}: {ADVICE}.")
    labels = _labels(y)
    with _dataset(x, "x") as images:
        if images.shape[1:] != PATCH or images.dtype != np.uint8:
            raise ZNormValueError(
                f"'x' of {x} has shape {images.shape} and type {images.dtype}, and PatchCamelyon's images have shape "
                f"(N, {', '.join(map(str, PATCH))}) and type uint8: {ADVICE}."
            )
        if len(images) != len(labels):
            raise ZNormValueError(f"{x} holds {len(images)} images, and {y} {len(labels)} labels: one is not PCam's.")
        offset = images.id.get_offset()  # None where there are chunks, or another file
        if offset is not None:
            return ArrayFile(x, offset, images.shape), labels
        return cached_array(f"pcam-{split}", [x], images.shape, _copier(images, x), cache), labels


def _labels(path: Path) -> Labels:
    with _dataset(path, "y") as values:
        if values.ndim == 0 or values.size != len(values) or values.dtype.kind not in "bui":
            raise ZNormValueError(
                f"'y' of {path} has shape {values.shape} and type {values.dtype}, and PatchCamelyon's labels have "
                f"shape (N, 1, 1, 1) and type uint8: {ADVICE}."
            )
        with _reading(path):
            labels: Labels = values[...].reshape(-1).astype(np.int64)
    if not len(labels):
        raise ZNormValueError(f"'y' of {path} is empty: {ADVICE}.")
    wrong = np.flatnonzero((labels != 0) & (labels != 1))
    if len(wrong):
        raise ZNormValueError(
            f"Label {wrong[0]} of {path} is {labels[wrong[0]]}, and {len(wrong)} labels in all are neither 0 (no "
            f"tumour) nor 1: {ADVICE}."
        )
    return labels


def _copier(images: Any, path: Path) -> Callable[[NDArray[np.uint8]], None]:
    def copy(array: NDArray[np.uint8]) -> None:
        # Whole chunks, or each would be decompressed several times.
        step = (images.chunks or (1,))[0]
        step *= -(-1024 // step)
        starts = range(0, len(images), step)
        for start in with_progress(starts, len(starts), "Decompressing PCam"):
            with _reading(path):
                images.read_direct(array, np.s_[start : start + step], np.s_[start : start + step])

    return copy


@contextmanager
def _dataset(path: Path, name: str) -> Iterator[Any]:
    try:
        import h5py
    except ImportError as error:
        raise ZNormImportError(
            "PatchCamelyon's h5 files are read by h5py, which is missing: pip install h5py"
        ) from error

    with _reading(path):
        file = h5py.File(path)
    with file:
        with _reading(path):
            found = file.get(name)
            names = sorted(file)
        if not isinstance(found, h5py.Dataset):
            raise ZNormValueError(f"{path} holds no data set {name!r}, but {names}: {ADVICE}.")
        with _reading(path):
            # All that is asked of it later: a damaged head shows here.
            found.shape, found.dtype, found.chunks, found.id.get_offset()
        yield found


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # h5py takes whichever fits the part of the file that is damaged
        raise ZNormRuntimeError(
            f"{path} cannot be read ({error}): it is damaged or half downloaded; {ADVICE}."
        ) from error
