"""LGG MRI segmentation: its files, and the data module."""

import math
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import override

from lightning_znorm.arguments import checked_folder, checked_number
from lightning_znorm.data.array_file import cache_folder, cached_array
from lightning_znorm.data.augmentation import random_flip_and_rotate
from lightning_znorm.data.base import ImageDataModule
from lightning_znorm.data.datasets import MaskedImages, NamedImages
from lightning_znorm.data.decoding import VERSION, BadFileError, read_all, read_pixels, refuse, size_of
from lightning_znorm.data.listing import (
    AGAIN,
    Listing,
    file_identity,
    list_files,
    list_subfolders,
    refuse_broken_links,
    same_files,
    warn_of_skipped,
)
from lightning_znorm.data.splits import split_patients
from lightning_znorm.errors import ZNormFileNotFoundError, ZNormValueError
from lightning_znorm.hyperparameters import plain_values

_IMAGES = {".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff"}
_MASK = re.compile(r"_mask(_\d+)?$", re.IGNORECASE)
_PATIENT = "TCGA_"
_LONE_MASKS = "masks without an image beside them"
_NO_SLICES = "folders without slices"


@dataclass(frozen=True)
class Slice:
    """The files of a slice.

    Args:
        image: Path of the image.
        mask: Path of the mask, if there is one.
        patient: Who was scanned.
    """

    image: Path
    mask: Path | None = None
    patient: str = ""


@dataclass(frozen=True)
class SliceFiles:
    """The slices in a folder, and their pixels.

    Args:
        folder: Where the slices are.
        slices: All of them, patient after patient from top to bottom.
        faults: What is wrong, apart from the pixels.
    """

    folder: Path
    slices: list[Slice]
    faults: list[str] = field(default_factory=list)

    @property
    def names(self) -> list[str]:
        """Paths of the images, relative to the folder."""
        return [each.image.relative_to(self.folder).as_posix() for each in self.slices]

    @cached_property
    def shape(self) -> tuple[int, ...]:
        """Shape of the decoded slices, ``(N, C, H, W)``, in the size of most patients' first slices."""
        firsts = {each.patient or each.image: each.image for each in reversed(self.slices)}
        sizes = Counter(size for size in map(size_of, firsts.values()) if size is not None)
        size = sizes.most_common(1)[0][0] if sizes else (1, 1)
        return len(self.slices), 4 if any(each.mask for each in self.slices) else 3, *size

    def fits(self, max_memory: float) -> bool:
        """Return whether the decoded slices take at most ``max_memory`` bytes."""
        return math.prod(self.shape) <= max_memory

    def decode(self, max_memory: float, cache: Path) -> NDArray[np.uint8]:
        """Decode all slices, into memory if they fit and otherwise into a file.

        Args:
            max_memory: Size in bytes up to which they fit.
            cache: Folder for the file.

        Returns:
            Shape ``(N, C, H, W)``: red, green and blue and, if the slices have masks, 1 where the mask is marked.

        Raises:
            ValueError: If a file is damaged, or missing: all such are named.
        """
        if self.faults:
            self._fill(None)  # raises, with the faults of the pixels too
        if self.fits(max_memory):
            array = np.empty(self.shape, dtype=np.uint8)
            self._fill(array)
            return array
        sources = [path for each in self.slices for path in (each.image, each.mask) if path is not None]
        return cached_array(f"lgg-{VERSION}", sources, self.shape, self._fill, cache).map()[0]

    def _fill(self, array: NDArray[np.uint8] | None) -> None:
        def read(index: int) -> list[str]:
            return _read(self.slices[index], np.empty(self.shape[1:], np.uint8) if array is None else array[index])

        refuse(sorted(self.faults + read_all(read, len(self.slices), "slices")), self.folder)


class LGGDataModule(ImageDataModule):
    """LGG MRI segmentation: brain slices of 110 patients with lower-grade glioma, and masks of the tumour.

    3,929 slices of 256x256 pixels. Red is the scan before contrast, green FLAIR, blue after contrast (FLAIR replaces
    one that is missing). About two thirds of the masks are empty, and about 1 % of all pixels are marked::

        root/                                    (or root is kaggle_3m, or holds lgg-mri-segmentation)
          kaggle_3m/
            TCGA_CS_4941_19960909/
              TCGA_CS_4941_19960909_1.tif        RGB
              TCGA_CS_4941_19960909_1_mask.tif   0 or 255
              ...
            ...

    Kaggle's archive holds everything twice, in ``kaggle_3m`` and in ``lgg-mri-segmentation/kaggle_3m``: only one of
    them is read. Each folder beside the ``TCGA_*`` folders is a patient too, and slices and masks may be png, jpg or
    bmp files, named in upper or lower case. The names of ``TCGA_*`` folders end in the day of the scan: folders that
    differ only in the day are one patient.

    Files are read as they are stored, or refused by name: RGB images and grey masks of 8 bits for each channel, one in
    each file. Volumes of several pages are refused, and so are images that EXIF says to rotate. Of a camera's JPEG file
    of several views (MPO) the first is read. Links are followed, broken links are refused by name, and no file counts
    twice. One warning names the files that are skipped, except hidden files, texts, and files of operating systems.

    No patient is in two sets, because the slices of one brain are alike. Each set gets its share of the patients with
    little tumour and of those with much (measured by the share of their slices whose mask is not empty). The lists of
    patients are in `patients`, in the log, in the hyperparameters and in every checkpoint. A checkpoint is refused if
    it was trained on patients that it would be validated or tested on, such as after a change of the seed.

    Batches of training, validation and test are pairs of images, ``(N, 3, H, W)``, and masks, ``(N, 1, H, W)`` of
    0.0 and 1.0. Batches for prediction are pairs of images and their names, paths that begin in ``predict_root`` (or
    in ``kaggle_3m``).

    All slices are decoded once, on all cores, into memory (1 GB in each process). Slices that exceed ``max_memory_gb``
    are decoded into a file of ``cache_dir``, which all processes of a machine share and later runs find again.
    They travel as uint8 and are normalized on the device. The mean and standard deviation per channel are constants, of
    30 of the patients: an image is normalized in the same way in training and in use.

    Source:
        Buda, Saha and Mazurowski, "Association of genomic subtypes of lower-grade gliomas with shape features
        automatically extracted by a deep learning algorithm", Computers in Biology and Medicine, 2019,
        https://www.kaggle.com/datasets/mateuszbuda/lgg-mri-segmentation (CC BY-NC-SA 4.0); images from The Cancer
        Imaging Archive, collection TCGA-LGG.

    Args:
        root: Folder that holds ``kaggle_3m``.
        batch_size: Slices per batch and process.
        val_fraction: Share of the patients to validate on.
        test_fraction: Share of the patients to test on.
        seed: Draws the patients to validate and test on, and nothing else.
        augment: Mirror and rotate each training image and its mask at random
            (`lightning_znorm.data.augmentation.random_flip_and_rotate`).
        predict_root: Folder of images to predict for (tif, png, jpg or bmp in RGB or grey, all of one size, also in
            folders inside it and behind links; masks beside their image are left out). Without it, the test slices.
        max_memory_gb: Size of the decoded slices, in GB, up to which they are held in memory.
        cache_dir: Folder for larger ones, by default ``~/.cache/lightning_znorm``. What is in it may be deleted.

    Raises:
        ValueError: If an argument is out of range or leaves a set without patients. Before training, if files are
            damaged, missing, of different sizes, of more than 8 bits or one page, the same for two patients, or masks
            with other values than 0 and 255: one error names them. If a checkpoint was trained on patients that it
            would be judged by.
        TypeError: If an argument is of another type.
        FileNotFoundError: If there are no slices.

    Example:
        >>> data = LGGDataModule(root="data", batch_size=32, augment=True)
        >>> data.num_classes, data.hparams.batch_size
        (1, 32)
    """

    num_classes = 1
    max_value = 255
    # Of the 1,114 slices of 30 patients.
    mean = (0.1031, 0.0847, 0.0906)
    std = (0.1477, 0.1228, 0.1328)

    def __init__(
        self,
        root: str | Path = "data",
        batch_size: int = 128,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        seed: int = 0,
        augment: bool = False,
        predict_root: str | Path | None = None,
        max_memory_gb: float = 4.0,
        cache_dir: str | Path | None = None,
    ) -> None:
        super().__init__(batch_size, val_fraction, seed)
        root, test_fraction, augment, predict_root, max_memory_gb, cache_dir = plain_values(
            root=root,
            test_fraction=test_fraction,
            augment=augment,
            predict_root=predict_root,
            max_memory_gb=max_memory_gb,
            cache_dir=cache_dir,
        )
        self.test_fraction = checked_number("test_fraction", test_fraction)
        self.max_memory = checked_number("max_memory_gb", max_memory_gb, minimum=0) * 1e9
        if not 0 < test_fraction < 1 - self.val_fraction:
            raise ZNormValueError(
                f"test_fraction is the share of patients to test on, in (0, 1 - val_fraction): {test_fraction}."
            )
        self.save_hyperparameters()
        self.root = checked_folder("root", root)
        self.predict_root = None if predict_root is None else checked_folder("predict_root", predict_root)
        self.augment = augment
        self.cache = cache_folder(cache_dir)
        self.patients: dict[str, list[str]] = {}
        """The patients of ``"train"``, ``"val"`` and ``"test"``, once they are drawn in `setup`."""

    @override
    def prepare_data(self) -> None:
        """Decode slices that do not fit in memory. One process per machine runs this."""
        predicting = self.trainer is not None and self.trainer.state.fn == TrainerFn.PREDICTING
        found = self._find("predict" if predicting else "")
        if not found.fits(self.max_memory):
            found.decode(self.max_memory, self.cache)

    @override
    def setup(self, stage: str) -> None:
        """Decode the slices, once for all stages, and draw the sets."""
        super().setup(stage)
        if stage == "predict" and self.predict_root is not None:
            found = self._find(stage)
            slices = found.decode(self.max_memory, self.cache)
            self.predict_set = NamedImages(slices, np.arange(len(slices)), found.names)
            return
        if not self.patients:
            self._draw_sets()
        self.predict_set = self._named_test_set

    @override
    def class_frequencies(self) -> list[float]:
        """Return the share of marked pixels in the training masks, as a list of one, after ``setup("fit")``.

        Raises:
            RuntimeError: Before ``setup("fit")``.
        """
        self.require_train_set()
        assert isinstance(self.train_set, MaskedImages)
        images, rows = self.train_set.images, self.train_set.rows
        return [sum(float(images[row, 3].mean()) for row in rows) / len(rows)]

    @override
    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the loader of images and their names."""
        return self.loader(self.predict_set, shuffle=False)

    @override
    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor | list[str]], dataloader_idx: int) -> Any:
        """Augment (in training only) and normalize, on the device."""
        images, masks = batch
        if not isinstance(masks, Tensor):  # the names of NamedImages
            return self.normalized(images), masks
        if self.augment and self.trainer is not None and self.trainer.training:
            images, masks = random_flip_and_rotate(images, masks)
        return self.normalized(images), self.in_precision(masks.float())

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the lists of patients, and the seed of the orders."""
        return {"patients": self.patients, **super().state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse a checkpoint that was trained on the patients that it would be judged by."""
        super().load_state_dict(state_dict)
        if self.trainer is None:  # in `load_from_checkpoint`, which judges nothing yet
            return
        trained = state_dict["patients"]
        seen = {"val": trained["train"], "test": trained["train"] + trained["val"]}
        # The checkpoint of a resumed training holds the sets of that training only, so both sets must be right there.
        judged_by: dict[TrainerFn | None, list[str]] = {
            TrainerFn.VALIDATING: ["val"],
            TrainerFn.TESTING: ["test"],
            TrainerFn.PREDICTING: [],
        }
        for name in judged_by.get(self.trainer.state.fn, ["test", "val"]):
            if shared := sorted(set(self.patients[name]) & set(seen[name])):
                raise ZNormValueError(
                    f"The checkpoint was trained or chosen on {len(shared)} of the patients of the {name} set "
                    f"({', '.join(shared)}): use the seed, the fractions and the data that it was trained with."
                )

    def _find(self, stage: str) -> SliceFiles:
        if stage == "predict" and self.predict_root is not None:
            return find_images(self.predict_root)
        return find_patients(self.root)

    def _draw_sets(self) -> None:
        found = self._find("")
        slices = found.decode(self.max_memory, self.cache)
        marked = np.array([each[3].any() for each in slices])
        patients = np.array([each.patient for each in found.slices])
        shares = {str(patient): float(marked[patients == patient].mean()) for patient in np.unique(patients)}
        self.patients = split_patients(shares, self.val_fraction, self.test_fraction, self.seed)
        self.save_hyperparameters({"patients": self.patients})
        for name, listed in self.patients.items():
            rank_zero_info(f"LGG {name} patients ({len(listed)}): {', '.join(listed)}")
        rows = {name: np.flatnonzero(np.isin(patients, listed)) for name, listed in self.patients.items()}
        self.train_set, self.val_set, self.test_set = (MaskedImages(slices, rows[name]) for name in self.patients)
        self._named_test_set = NamedImages(slices, rows["test"], found.names)


def find_patients(root: Path) -> SliceFiles:
    """Find the slices of all patients: each folder in ``kaggle_3m`` is one, whatever its name.

    A patient's folder holds an image and a mask beside it for each slice. A warning names what is skipped.

    Args:
        root: ``kaggle_3m``, or a folder that holds ``kaggle_3m`` or ``lgg-mri-segmentation/kaggle_3m``. Kaggle's
            archive holds both; the first is read.

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
    slices: list[Slice] = []
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
    return SliceFiles(folder, [each for index, each in enumerate(slices) if index not in again], found.faults)


def find_images(folder: Path) -> SliceFiles:
    """Find images in a folder and in the folders inside it.

    Masks are left out: files named like an image beside them with ``_mask``, or ``_mask_0`` and so on, as `MaskWriter`
    names them, in upper or lower case. A warning names what else is left out, also masks without an image. An image
    counts once, however many links lead to it.

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
    found.skip(_LONE_MASKS, [str(mask) for mask in masks if (mask.parent, _MASK.sub("", mask.stem)) not in names])
    warn_of_skipped(folder, found)
    if not kept and not found.faults:
        raise ZNormFileNotFoundError(
            f"No images at {folder}, files that end in {', '.join(sorted(_IMAGES))} and are not masks (*_mask)."
        )
    slices = [Slice(path) for path in sorted(kept, key=lambda path: (path.parent, _in_order(path.stem)))]
    return SliceFiles(folder, slices, found.faults)


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
    """Return a patient's slices from top to bottom, and add what is wrong to the faults of the listing."""
    files: dict[str, Path] = {}
    for path in map(Path, listing.paths):
        stem = _MASK.sub(lambda end: end.group().lower(), path.stem)
        if (other := files.setdefault(stem, path)) != path:
            listing.faults.append(f"{path}: differs from {other.name} only in the suffix or the case of letters")
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
    """Decode a slice, and return its faults."""
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
    """Return a sorting key that puts slice 10 after slice 9."""
    number = re.search(r"\d*$", stem)
    assert number is not None
    return stem[: number.start()], int(number.group() or 0)


def _patient(folder: str) -> str:
    """Return the patient of a folder: its name, for ``TCGA_*`` without the day of the scan."""
    return re.sub(r"_\d{8}$", "", folder) if folder.startswith(_PATIENT) else folder
