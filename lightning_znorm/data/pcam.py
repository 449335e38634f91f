"""PatchCamelyon: its files, published as HDF5 or on Kaggle, and the data module."""

import csv
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_znorm.arguments import checked_folder, checked_number
from lightning_znorm.data.array_file import ArrayFile, cache_folder, cached_array
from lightning_znorm.data.base import ImageDataModule
from lightning_znorm.data.datasets import Labels, MappedImages
from lightning_znorm.data.decoding import VERSION, BadFileError, read_all, read_pixels, refuse, with_progress
from lightning_znorm.data.listing import (
    Listing,
    file_identity,
    list_files,
    refuse_broken_links,
    same_files,
    warn_of_skipped,
)
from lightning_znorm.data.samplers import BlockSampler
from lightning_znorm.data.splits import stratified_indices
from lightning_znorm.errors import ZNormFileNotFoundError, ZNormRuntimeError, ZNormValueError
from lightning_znorm.hyperparameters import plain_values

_SPLITS = ("train", "valid", "test")
_PATCH = (96, 96, 3)  # height, width and channels
_KAGGLE_LABELS = "train_labels.csv"
_ADVICE = (
    "get it from https://github.com/basveeling/pcam, or with torchvision.datasets.PCAM(root, split, download=True), "
    "and unpack it with gunzip"
)


class PCamDataModule(ImageDataModule):
    """PatchCamelyon: patches of lymph node sections, 96x96 pixels, RGB. Class 1 has tumour in the central 32x32 pixels.

    Two folder layouts are read. The published one has three splits (262,144, 32,768 and 32,768 patches, half of them
    with tumour, and no slide in two splits)::

        root/
          pcam/                                        (or root is this folder)
            camelyonpatch_level_2_split_train_x.h5     'x': (N, 96, 96, 3) uint8
            camelyonpatch_level_2_split_train_y.h5     'y': (N, 1, 1, 1) uint8
            camelyonpatch_level_2_split_valid_{x,y}.h5
            camelyonpatch_level_2_split_test_{x,y}.h5

    The other one is that of Kaggle's competition ``histopathologic-cancer-detection``: 220,025 patches without
    duplicates, and nothing says from which slides they are. Its ``test`` has no labels, so validation and test images
    are drawn from ``train``, stratified by class. Patches of one slide are then in all three sets, which makes the
    accuracy too high::

        root/
          histopathologic-cancer-detection/            (or root is this folder)
            train_labels.csv                           id,label
            train/
              f38a6374c348f90b587e046aac6079959adf3835.tif
              ...

    Kaggle's images may end in tif or tiff, in upper or lower case, and may be links. Each is read as it is stored, or
    refused by name: RGB of 8 bits for each channel, one page, 96x96 pixels. A file with two labels is refused. One
    warning names what else is in ``train``, except hidden files, what operating systems leave in folders, and texts.

    Images need not fit in memory. If they are stored uncompressed and contiguous in their HDF5 file, as h5py writes
    them by default, they are read from there through a memory map. Compressed or chunked files, and Kaggle's, are
    decoded once into ``cache_dir`` (9.1 GB for PCam, 6.1 GB for Kaggle's), by one process per machine. Training images
    are read in blocks of 32 neighbours in random order, and shuffled among 256 such blocks
    (`lightning_znorm.data.samplers.BlockSampler`). `torchvision.datasets.PCAM` opens the HDF5 file for every image.

    Source:
        Veeling et al., "Rotation Equivariant CNNs for Digital Pathology", MICCAI 2018,
        https://github.com/basveeling/pcam (CC0), from Ehteshami Bejnordi et al., "Diagnostic Assessment of Deep
        Learning Algorithms for Detection of Lymph Node Metastases in Women With Breast Cancer", JAMA 2017.

    Args:
        root: Folder of one of the two layouts.
        batch_size: Images per batch and process.
        num_workers: Worker processes per loader and process, which read ahead of the training. They help with slow
            disks; images that the operating system has cached in memory come faster without them.
        val_fraction: With Kaggle's layout, share of the images outside of the test set to validate on.
        test_fraction: With Kaggle's layout, share of the images to test on.
        seed: With Kaggle's layout, draws the validation and test images, and nothing else.
        cache_dir: Folder for decoded images, by default ``~/.cache/lightning_znorm``. What is in it may be deleted.

    Raises:
        ValueError: If an argument is out of range, if the data are not PatchCamelyon's, or if a file has two names,
            through a link or as a hard link.
        TypeError: If an argument is of another type.
        ImportError: If a package that it needs is missing.
        FileNotFoundError: If files are missing, or are broken links.
        RuntimeError: If an HDF5 file cannot be read.

    Example:
        >>> data = PCamDataModule(root="data", batch_size=128)
        >>> data.num_classes, data.hparams.batch_size
        (2, 128)
    """

    _packages = ("PIL", "h5py", "rich", "sklearn")
    num_classes = 2
    max_value = 255
    # Of 2,217 of the training images.
    mean = (0.7026, 0.5483, 0.6997)
    std = (0.2397, 0.2833, 0.2167)

    def __init__(
        self,
        root: str | Path = "data",
        batch_size: int = 256,
        num_workers: int = 0,
        val_fraction: float = 0.1,
        test_fraction: float = 0.1,
        seed: int = 0,
        cache_dir: str | Path | None = None,
    ) -> None:
        super().__init__(batch_size, val_fraction, seed, num_workers)
        root, test_fraction, cache_dir = plain_values(root=root, test_fraction=test_fraction, cache_dir=cache_dir)
        self.test_fraction = checked_number("test_fraction", test_fraction)
        if not 0 < test_fraction < 1:
            raise ZNormValueError(f"test_fraction is the share of the images to test on, in (0, 1): {test_fraction}.")
        self.save_hyperparameters()
        self.root = checked_folder("root", root)
        self.cache = cache_folder(cache_dir)

    @override
    def prepare_data(self) -> None:
        """Decode images that cannot be mapped. One process per machine runs this."""
        folder, is_kaggle = self._layout()
        if is_kaggle:
            read_kaggle(folder, self.cache)
            return
        for split in _SPLITS:
            if _h5_path(folder, split, "x").is_file() and _h5_path(folder, split, "y").is_file():
                read_h5(folder, split, self.cache)

    @override
    def setup(self, stage: str) -> None:
        """Find the images that the stage needs, and read their labels."""
        super().setup(stage)
        folder, is_kaggle = self._layout()
        if is_kaggle:
            self._split(folder)
        elif stage in ("fit", "validate"):
            self.train_set, self.val_set = (
                MappedImages(*read_h5(folder, split, self.cache)) for split in ("train", "valid")
            )
        else:
            self.test_set = MappedImages(*read_h5(folder, "test", self.cache))

    @override
    def sampler(self, dataset: Dataset[Any], num_replicas: int = 1, rank: int = 0, seed: int = 0) -> BlockSampler:
        """Return the sampler of the training images."""
        assert isinstance(dataset, MappedImages)
        return BlockSampler(dataset, num_replicas, rank, seed)

    def _layout(self) -> tuple[Path, bool]:
        """Return the folder of the files, and whether its layout is Kaggle's."""
        for folder in (self.root, self.root / "pcam"):
            paths = [_h5_path(folder, split, what) for split in _SPLITS for what in "xy"]
            refuse_broken_links([folder, *paths])
            if paths := [path for path in paths if path.is_file()]:
                _refuse_same_files(paths)
                return folder, False
        for folder in (self.root, self.root / "histopathologic-cancer-detection"):
            if (folder / _KAGGLE_LABELS).is_file() and (folder / "train").is_dir():
                return folder, True
        packed = sorted(path for folder in (self.root, self.root / "pcam") for path in folder.glob("camelyon*.h5.gz"))
        if packed:
            raise ZNormFileNotFoundError(
                f"PatchCamelyon is still packed: unpack {', '.join(map(str, packed))} with gunzip."
            )
        raise ZNormFileNotFoundError(
            f"No PatchCamelyon at {self.root}, neither {_h5_path(Path('pcam'), 'train', 'x')} nor Kaggle's "
            f"{_KAGGLE_LABELS} and train: let root name the folder that holds them, or {_ADVICE}."
        )

    def _split(self, folder: Path) -> None:
        images, labels = read_kaggle(folder, self.cache)
        training, test = stratified_indices(labels, self.test_fraction, self.seed)
        train, val = stratified_indices(labels[training], self.val_fraction, self.seed)
        for name, rows in (("train_set", training[train]), ("val_set", training[val]), ("test_set", test)):
            rows.sort()  # so that images of a block are neighbours in the file
            setattr(self, name, MappedImages(images, labels[rows], rows))


def _h5_path(folder: Path, split: str, what: str) -> Path:
    """Return the path of the images (``x``) or labels (``y``) of ``train``, ``valid`` or ``test``."""
    return folder / f"camelyonpatch_level_2_split_{split}_{what}.h5"


def _refuse_same_files(paths: Iterable[Path]) -> None:
    """Refuse several names of one file, because a split would be validated or tested on itself.

    Raises:
        ValueError: If two are the same file.
    """
    by_identity: dict[object, Path] = {}
    for path in paths:
        if (first := by_identity.setdefault(file_identity(path), path)) != path:
            raise ZNormValueError(f"{path} is the same file as {first}: {_ADVICE}.")


def read_h5(folder: Path, split: str, cache: Path) -> tuple[ArrayFile, Labels]:
    """Find the images of a split, and read its labels.

    Args:
        folder: Holds the files.
        split: ``"train"``, ``"valid"`` or ``"test"``.
        cache: Folder for the images, unless they are stored uncompressed and contiguous in their file.

    Returns:
        Where the images are, shape ``(N, 96, 96, 3)``, and their labels.

    Raises:
        FileNotFoundError: If a file is missing.
        RuntimeError: If a file cannot be read.
        ValueError: If it does not hold PatchCamelyon's patches and labels.
    """
    x, y = (_h5_path(folder, split, what) for what in "xy")
    if missing := [path for path in (x, y) if not path.is_file()]:
        raise ZNormFileNotFoundError(f"No {' and no '.join(map(str, missing))}: {_ADVICE}.")
    labels = _h5_labels(y)
    with _h5_dataset(x, "x") as images:
        if images.shape[1:] != _PATCH or images.dtype != np.uint8:
            raise ZNormValueError(
                f"'x' of {x} has shape {images.shape} and type {images.dtype}, and PatchCamelyon's images have shape "
                f"(N, {', '.join(map(str, _PATCH))}) and type uint8: {_ADVICE}."
            )
        if len(images) != len(labels):
            raise ZNormValueError(f"{x} holds {len(images)} images, and {y} {len(labels)} labels: one is not PCam's.")
        offset = images.id.get_offset()  # None if they are chunked, or in another file
        if offset is not None:
            return ArrayFile(x, offset, images.shape), labels
        return cached_array(f"pcam-{split}", [x], images.shape, _h5_copier(images, x), cache), labels


def _h5_labels(path: Path) -> Labels:
    with _h5_dataset(path, "y") as values:
        if values.ndim == 0 or values.size != len(values) or values.dtype.kind not in "bui":
            raise ZNormValueError(
                f"'y' of {path} has shape {values.shape} and type {values.dtype}, and PatchCamelyon's labels have "
                f"shape (N, 1, 1, 1) and type uint8: {_ADVICE}."
            )
        with _reading_h5(path):
            labels: Labels = values[...].reshape(-1).astype(np.int64)
    if not len(labels):
        raise ZNormValueError(f"'y' of {path} is empty: {_ADVICE}.")
    wrong = np.flatnonzero((labels != 0) & (labels != 1))
    if len(wrong):
        raise ZNormValueError(
            f"Label {wrong[0]} of {path} is {labels[wrong[0]]}, and {len(wrong)} labels in total are neither 0 (no "
            f"tumour) nor 1: {_ADVICE}."
        )
    return labels


def _h5_copier(images: Any, path: Path) -> Callable[[NDArray[np.uint8]], None]:
    def copy(array: NDArray[np.uint8]) -> None:
        # Whole chunks: otherwise each would be decompressed several times.
        step = (images.chunks or (1,))[0]
        step *= -(-1024 // step)
        starts = range(0, len(images), step)
        for start in with_progress(starts, len(starts), "Decompressing PCam"):
            with _reading_h5(path):
                images.read_direct(array, np.s_[start : start + step], np.s_[start : start + step])

    return copy


@contextmanager
def _h5_dataset(path: Path, name: str) -> Iterator[Any]:
    import h5py

    with _reading_h5(path):
        file = h5py.File(path)
    with file:
        with _reading_h5(path):
            found = file.get(name)
            names = sorted(file)
        if not isinstance(found, h5py.Dataset):
            raise ZNormValueError(f"{path} holds no data set {name!r}, but {names}: {_ADVICE}.")
        with _reading_h5(path):
            # All that is read later, so that a damaged header is found here.
            found.shape, found.dtype, found.chunks, found.id.get_offset()
        yield found


@contextmanager
def _reading_h5(path: Path) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # the type that h5py raises depends on which part of the file is damaged
        raise ZNormRuntimeError(
            f"{path} cannot be read ({error}): it is damaged or half downloaded; {_ADVICE}."
        ) from error


def read_kaggle(folder: Path, cache: Path) -> tuple[ArrayFile, Labels]:
    """Decode the labelled images, or find them as an earlier run has decoded them.

    Args:
        folder: Holds ``train`` and ``train_labels.csv``.
        cache: Folder for the decoded images.

    Returns:
        Where the images are, shape ``(N, 96, 96, 3)``, in the order of their names, and their labels.

    Raises:
        ValueError: If images and labels do not belong together, or images are damaged: all of them are named.
    """
    labels, faults = _kaggle_labels(folder / _KAGGLE_LABELS)
    listing = list_files(folder / "train", {".tif", ".tiff"}, recursive=False)
    paths, faults_of_images = _kaggle_paths(listing)
    faults += faults_of_images
    faults += [
        f"{path}: has no label in {_KAGGLE_LABELS}" for name, path in sorted(paths.items()) if name not in labels
    ]
    faults += [f"{folder / 'train' / name}.tif: is missing" for name in sorted(labels) if name not in paths]
    refuse(faults, folder)
    warn_of_skipped(folder / "train", listing)
    names = sorted(labels)

    def fill(array: NDArray[np.uint8]) -> None:
        def read(index: int) -> list[str]:
            path = paths[names[index]]
            try:
                pixels = read_pixels(path, modes=["RGB"])
                if pixels.shape != _PATCH:
                    raise BadFileError(f"is {pixels.shape[0]}x{pixels.shape[1]} pixels, and 96x96 are expected")
                array[index] = pixels
            except BadFileError as fault:
                return [f"{path}: {fault}"]
            return []

        refuse(read_all(read, len(names), "patches"), folder)

    sources = [folder / _KAGGLE_LABELS, *(paths[name] for name in names)]
    images = cached_array(f"pcam-kaggle-{VERSION}", sources, (len(names), *_PATCH), fill, cache)
    return images, np.array([labels[name] for name in names], dtype=np.int64)


def _kaggle_paths(listing: Listing) -> tuple[dict[str, Path], list[str]]:
    faults = listing.faults
    paths: dict[str, Path] = {}
    for path in map(Path, listing.paths):
        if (other := paths.setdefault(path.stem, path)) != path:
            faults.append(f"{path}: differs from {other.name} only in the suffix")
    # Chance would decide in which of the sets each name is.
    faults += [
        f"{listing.paths[other]}: is the same file as {listing.paths[first]}"
        for first, other in same_files(listing.paths, listing.inodes)
    ]
    return paths, faults


def _kaggle_labels(path: Path) -> tuple[dict[str, int], list[str]]:
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
        raise ZNormValueError(
            f"{path} cannot be read, because its line {rows.line_num} is not CSV ({error})."
        ) from error
    if not labels and not faults:
        faults.append(f"{path}: holds no labels")
    return labels, faults
