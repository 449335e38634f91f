"""Own images and masks, in two folders."""

import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray
from torch import Tensor
from typing_extensions import override

from lightning_znorm.arguments import checked_folder, checked_integer, checked_number, shown
from lightning_znorm.data.case_files import CaseFiles
from lightning_znorm.data.datasets import IGNORED, MaskedImages
from lightning_znorm.data.mask_files import MaskFiles, find_images, find_pairs
from lightning_znorm.data.segmentation import SegmentationDataModule
from lightning_znorm.data.splits import checked_pattern
from lightning_znorm.data.transforms import Described, hyperparameter
from lightning_znorm.errors import ZNormRuntimeError, ZNormTypeError, ZNormValueError
from lightning_znorm.hyperparameters import plain_values

_MARKED = (1, 255)


class MaskFolderDataModule(SegmentationDataModule):
    """Own images and masks, in two folders, paired by their names.

    Laid out as::

        root/
          images/
            anna_01.png
            ben/02.tif              (folders inside are part of the name)
            ...
          masks/
            anna_01.png
            ben/02.npy              (the file type may differ)
            ...

    **Images** are PNG, TIFF, JPEG, BMP or NumPy files (``.npy``, in ``(H, W)`` or ``(H, W, 3)``), grey or RGB, of 8
    bits or 16 (grey in PNG, TIFF and ``.npy``, RGB in ``.npy`` alone). All must be of one kind, and of one size unless
    ``image_size`` is set. They are read as they are stored, or refused by name, as `LGGDataModule` does.

    **Masks** have one channel, also a palette, whose numbers are read. By default 0 is the background, and 1 or 255 is
    the structure; a grey palette whose number 0 is white, or in which a higher number is darker, is then refused.
    ``mask_values`` gives the class of each value. A pixel of class 255, or of a negative class, does not
    count: its mask holds 255, and the task needs ``ignore_index=255``. Lossy files (JPEG) change values.

    **Classes.** With one structure (``num_classes`` is 1), masks are 0.0 and 1.0, for
    `~lightning_znorm.tasks.SegmentationTask` as it is. With several, masks are class numbers from 0, for the task with
    ``activation="softmax"`` and the same ``num_classes``, background included.

    **Patients.** No patient is in two sets, because images of one patient are alike. ``patient_pattern`` finds the
    patient in the name. Without it each image is a patient of its own: use it wherever several images are of one
    person, animal or slide. Each set gets its share of the patients with few marked pixels and of those with many, as
    the files have them, whatever ``image_size`` is. The lists are in `patients`, in the hyperparameters and in every
    checkpoint, and in the log with ``patient_pattern``. A checkpoint is refused if it was trained on patients that it
    would be validated or tested on.

    **Batches** begin with images, ``(N, C, H, W)``, and masks, ``(N, 1, H, W)``. Behind them, those of validation, test
    and prediction have a dictionary about the cases: ``name``, the path in ``images``, and ``patient``. Batches of
    ``predict_root`` are pairs of images and a dictionary with ``name``.

    **Normalization** on the device, per channel, by the mean and standard deviation of all training images, which
    every checkpoint holds: resuming, testing and predicting with ``ckpt_path`` use those of the checkpoint, and so does
    ``load_from_checkpoint``. Images of another depth (8 or 16 bits) than those of the training are refused. A channel
    without contrast is divided by 1.

    All images are decoded once, on all cores, into memory. Those that exceed ``max_memory_gb`` are decoded into a file
    of ``cache_dir``, which all processes of a machine share and later runs find again.

    Args:
        root: Folder that holds ``images`` and ``masks``.
        batch_size: Images per batch and process.
        num_classes: 1 for one structure, or the number of classes with the background. By default, it follows from
            ``mask_values``: one more than the highest class, or 1 if that is 1. Without ``mask_values``, 3 or more say
            that masks hold class numbers.
        mask_values: The class of each value of the masks, as a dictionary or, for the values' order, as a list of the
            values of class 0, 1 and so on: ``{0: 0, 128: 1, 255: 2}`` is ``[0, 128, 255]``.
        mask_suffix: What the name of a mask has behind that of its image, such as ``_mask``.
        patient_pattern: Regular expression that is searched for in the name, the path in ``images`` without its suffix.
            Its first group is the patient, or the whole match if it has none. ``"^([^_]+)_"`` takes what is in front of
            the first underscore.
        val_fraction: Share of the patients to validate on.
        test_fraction: Share of the patients to test on.
        seed: Draws the patients to validate and test on, and nothing else.
        image_size: Height and width, or one number for both, that images (bilinear with antialiasing) and masks (by
            the nearest pixel) are resized to when they are read. Losses and scores are of the resized ones. Batches
            about cases then have ``size`` too, the height and width of each image's file, a NumPy array of shape
            ``(N, 2)``: `MaskWriter` writes masks in that size.
        mean: Mean of each channel, in units of the largest value (255 or 65535); by default of the training images.
        std: Standard deviation of each channel, in the same units; given together with ``mean``.
        augment: Mirror and rotate each training image and its mask at random
            (`lightning_znorm.data.augmentation.random_flip_and_rotate`).
        train_transform: A transform of each training image and its mask, or a list of several: a dictionary transform
            of MONAI with the keys ``image`` and ``label``, one of `torchvision.transforms.v2`, or a function that takes
            and returns such a dictionary; in YAML ``class_path`` and ``init_args``. It gets images in float32 from 0
            to 1 (the largest value), before ``augment``, and its draws follow from the seed of the training. See
            `lightning_znorm.data.transforms.CaseTransforms`. An object, other than a description, has to be passed to
            ``load_from_checkpoint`` again.
        predict_root: Folder of images to predict for, also in folders inside it; masks (``*_mask``) beside their image
            are left out. Without it, the test images.
        num_workers: Worker processes per loader and process, for a ``train_transform`` that takes long. Without one,
            reading from memory is faster.
        max_memory_gb: Size of the decoded images, in GB, up to which they are held in memory.
        cache_dir: Folder for larger ones, by default ``~/.cache/lightning_znorm``. What is in it may be deleted.

    Raises:
        ValueError: If an argument is out of range or leaves a set without patients. Before training, if files are
            damaged, without partner, of different kinds or sizes, of unknown values, without a patient, or the same for
            two cases: one error names them. If a checkpoint was trained on patients that it would be judged by, or with
            another ``mean`` and ``std`` than given.
        TypeError: If an argument is of another type.
        ImportError: If a package that it needs is missing.
        FileNotFoundError: If there are no images.
        RuntimeError: If images are to be predicted for without a checkpoint, a training or a ``mean``.

    Example:
        >>> data = MaskFolderDataModule(root="data", mask_values=[0, 128, 255], patient_pattern="^([^_]+)_")
        >>> data.num_classes
        3
    """

    _packages = ("PIL", "rich")

    def __init__(
        self,
        root: str | Path = "data",
        batch_size: int = 16,
        num_classes: int | None = None,
        mask_values: dict[int, int] | list[int] | None = None,
        mask_suffix: str = "",
        patient_pattern: str | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        seed: int = 0,
        image_size: int | list[int] | None = None,
        mean: list[float] | None = None,
        std: list[float] | None = None,
        augment: bool = False,
        train_transform: Described = None,
        predict_root: str | Path | None = None,
        num_workers: int = 0,
        max_memory_gb: float = 4.0,
        cache_dir: str | Path | None = None,
    ) -> None:
        super().__init__(
            batch_size,
            val_fraction,
            test_fraction,
            seed,
            num_workers=num_workers,
            augment=augment,
            train_transform=train_transform,
            predict_root=predict_root,
            image_size=image_size,
            max_memory_gb=max_memory_gb,
            cache_dir=cache_dir,
        )
        root, image_size, num_classes, mask_values, mask_suffix, patient_pattern, mean, std = plain_values(
            root=root,
            image_size=image_size,
            num_classes=num_classes,
            mask_values=mask_values,
            mask_suffix=mask_suffix,
            patient_pattern=patient_pattern,
            mean=mean,
            std=std,
        )
        train_transform = hyperparameter(self.train_transform)
        self.num_classes, self._classes, self._either = _checked_classes(num_classes, mask_values)
        self._classes_by_default = mask_values is None
        self.save_hyperparameters()
        # Lightning refuses a task and its data that log different ones, such as None here.
        self.save_hyperparameters({"num_classes": self.num_classes})
        self.root = checked_folder("root", root)
        if not isinstance(mask_suffix, str):
            raise ZNormTypeError(f"mask_suffix must be text, got {shown(mask_suffix)}.")
        self.mask_suffix = mask_suffix
        self.patient_pattern = checked_pattern(patient_pattern)
        self.patients_are_named = patient_pattern is not None
        self._has_constants = mean is not None
        self.mean, self.std = _checked_constants(mean, std)
        self.max_value = 255
        self._trained_value: int | None = None
        self._decoded: tuple[int, int] | None = None

    @override
    def find_cases(self) -> MaskFiles:
        return find_pairs(
            self.root,
            self.mask_suffix,
            self.patient_pattern,
            self._classes,
            self._either,
            self.image_size,
            by_default=self._classes_by_default,
        )

    @override
    def find_images(self, folder: Path) -> MaskFiles:
        return find_images(folder, self.image_size)

    @override
    def on_decoded(self, found: CaseFiles, shape: Sequence[int]) -> None:
        assert isinstance(found, MaskFiles)
        channels, bits, *_ = found.kind
        self._decoded = channels, 2**bits - 1
        self._check_decoded()
        self.max_value = 2**bits - 1

    @override
    def amount_of(self, marked: NDArray[np.float64]) -> float:
        """Return the share of the pixels that are marked, the mean over a patient's images."""
        return float(marked.mean())

    @override
    def on_sets_drawn(self) -> None:
        self._trained_value = self.max_value
        if self.patient_pattern is None:
            rank_zero_info(
                "MaskFolder: each image is a patient of its own, because there is no patient_pattern. Set it if "
                "several images are of one patient, or they get into training and test alike."
            )

    @override
    def prepare_data(self) -> None:
        """Refuse a task with other classes, and decode images that do not fit in memory, in one process per machine."""
        self._refuse_other_classes()
        super().prepare_data()

    @override
    def setup(self, stage: str) -> None:
        """Decode the images, draw the sets and, to train, compute the normalization."""
        self._refuse_other_classes()
        super().setup(stage)
        if stage == "fit":
            self._compute_normalization()
            self.save_hyperparameters({"mean": list(self.mean), "std": list(self.std)})

    @override
    def normalized(self, images: Tensor) -> Tensor:
        """Normalize images by `mean` and `std`.

        Raises:
            RuntimeError: If there are none yet.
        """
        if hasattr(self, "train_set"):  # no checkpoint brought a normalization
            self._compute_normalization()
        if not self.mean:
            raise ZNormRuntimeError(
                "The images to predict for are normalized as the training images were, and nothing says how: pass "
                "ckpt_path, a data module that was trained with, or mean and std."
            )
        return super().normalized(images)

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the normalization and its unit, the lists of patients, and the seed of the orders."""
        return {"mean": list(self.mean), "std": list(self.std), "max_value": self.max_value, **super().state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the normalization of a checkpoint, unless it was trained on patients that it would be judged by."""
        super().load_state_dict(state_dict)
        mean, std = tuple(state_dict["mean"]), tuple(state_dict["std"])
        if self._has_constants and (mean, std) != (self.mean, self.std):
            raise ZNormValueError(
                f"The checkpoint was trained with mean={list(mean)} and std={list(std)}, and mean={list(self.mean)} "
                f"and std={list(self.std)} are given: leave both out, or give those of the checkpoint."
            )
        self.mean, self.std = mean, std
        self._trained_value = state_dict["max_value"]
        self._check_decoded()
        self.max_value = state_dict["max_value"]

    def _refuse_other_classes(self) -> None:
        predicts = self.trainer is not None and self.trainer.state.fn == TrainerFn.PREDICTING
        if not predicts or self.predict_root is None:  # images of predict_root have no masks
            self.refuse_other_settings("num_classes")

    def _compute_normalization(self) -> None:
        """Compute the normalization from the training images, unless it is known."""
        if not self.mean:
            assert isinstance(self.train_set, MaskedImages)
            images, rows, value_bytes = self.train_set.images, self.train_set.rows, self.train_set.value_bytes
            as_stored = MaskedImages(images, rows, value_bytes=value_bytes)  # without train_transform
            self.mean, self.std = _mean_and_std(as_stored, self.max_value)

    def _check_decoded(self) -> None:
        """Refuse images with other channels than the normalization has, or of another depth."""
        if self._decoded is None:
            return
        channels, max_value = self._decoded
        if self.mean and len(self.mean) != channels:
            raise ZNormValueError(
                f"mean and std are of {len(self.mean)} channels, by the arguments or the checkpoint, and the images "
                f"have {channels}: convert the images, or give {channels} of each."
            )
        if self._trained_value not in (None, max_value):
            found, trained = (8 if value < 2**8 else 16 for value in (max_value, self._trained_value or 0))
            raise ZNormValueError(
                f"These are images of {found} bits for each channel, and the network was trained on {trained}: convert "
                f"the images to {trained} bits as those of the training were made, because their units differ."
            )


def _checked_classes(num_classes: Any, mask_values: Any) -> tuple[int, dict[int, int], tuple[int, ...]]:
    """Return the number of classes, the class of each value, and values of which only one may occur."""
    if num_classes is not None:
        checked_integer("num_classes", num_classes, minimum=1)
        if num_classes > IGNORED:
            raise ZNormValueError(
                f"num_classes must be at most {IGNORED}, because masks have 8 bits, got {num_classes}."
            )
    if mask_values is None:
        if num_classes is not None and num_classes > 2:
            return num_classes, {number: number for number in range(num_classes)}, ()
        return num_classes or 1, {0: 0, **dict.fromkeys(_MARKED, 1)}, _MARKED
    if isinstance(mask_values, (list, tuple)):
        if len(set(map(str, mask_values))) < len(mask_values):
            raise ZNormValueError(f"mask_values names a value twice: {shown(mask_values)}.")
        mask_values = {value: number for number, value in enumerate(mask_values)}
    if not isinstance(mask_values, dict):
        raise ZNormTypeError(f"mask_values must be a dictionary or a list, got {shown(mask_values)}.")
    values = [checked_integer("A value in mask_values", value, minimum=0, bits=16) for value in mask_values]
    numbers = [checked_integer("A class in mask_values", number) for number in mask_values.values()]
    classes = {value: IGNORED if number < 0 else number for value, number in zip(values, numbers, strict=True)}
    highest = max((number for number in classes.values() if number != IGNORED), default=0)
    if highest > IGNORED or highest == 0:
        raise ZNormValueError(
            f"mask_values must give at least one value a class from 1 to {IGNORED - 1}, and none a higher one than "
            f"{IGNORED} (which does not count), got {shown(mask_values)}."
        )
    if num_classes is not None and highest >= max(num_classes, 2):
        raise ZNormValueError(
            f"mask_values has class {highest}, and num_classes={num_classes}, which counts the background from two "
            f"classes on: set num_classes to {highest + 1} or more, or leave it out."
        )
    return num_classes or (1 if highest == 1 else highest + 1), classes, ()


def _checked_constants(mean: Any, std: Any) -> tuple[tuple[float, ...], tuple[float, ...]]:
    if mean is None and std is None:
        return (), ()
    for name, values in (("mean", mean), ("std", std)):
        if not isinstance(values, (list, tuple)) or not values:
            raise ZNormTypeError(
                f"{name} must be a list of a number for each channel, and mean and std are given together, got "
                f"{shown(values)}."
            )
    means = tuple(checked_number("A value of mean", value, finite=True) for value in mean)
    stds = tuple(checked_number("A value of std", value, finite=True) for value in std)
    if len(means) != len(stds) or min(stds) <= 0:
        raise ZNormValueError(
            f"mean and std hold a number for each channel, and those of std are above 0, got mean={shown(mean)} and "
            f"std={shown(std)}."
        )
    return means, stds


def _mean_and_std(train_set: MaskedImages, max_value: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation of each channel, in units of the largest value, over all images of a set.

    The sums are taken in float64, one image after the other, so they depend neither on the batch size nor on the
    number of threads.
    """

    def moments(row: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
        image = train_set[row][0].numpy().astype(np.float64) / max_value
        return image.mean(axis=(1, 2)), (image**2).mean(axis=(1, 2))

    sums: Any = 0.0
    squares: Any = 0.0
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        for mean_of_image, square_of_image in threads.map(moments, range(len(train_set))):
            sums += mean_of_image
            squares += square_of_image
    mean = sums / len(train_set)
    variance = np.maximum(squares / len(train_set) - mean**2, 0)
    # Of a constant channel the difference is rounding, of the order of 1e-16.
    std = np.where(variance > 1e-12, np.sqrt(variance), 1.0)
    return tuple(mean.tolist()), tuple(std.tolist())
