"""Base of the data modules of decoded 2-D images and their masks; that of volumes does not derive from it."""

from abc import abstractmethod
from collections.abc import Sequence, Sized
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.trainer.states import TrainerFn
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_znorm.arguments import checked_flag
from lightning_znorm.data.augmentation import random_flip_and_rotate
from lightning_znorm.data.case_files import CaseFiles
from lightning_znorm.data.datasets import IGNORED, Cases, MaskedImages, NamedImages
from lightning_znorm.data.patients import PatientDataModule
from lightning_znorm.data.resizing import checked_size
from lightning_znorm.data.samplers import EpochSampler, SeededSampler
from lightning_znorm.data.transforms import CaseTransforms, Described, built
from lightning_znorm.errors import ZNormValueError
from lightning_znorm.hyperparameters import plain_values


class SegmentationDataModule(PatientDataModule):
    """Base of the data modules of 2-D images and masks that are decoded once, and split by patient.

    The data module of volumes is not derived from it, but from `PatientDataModule`, as this class is.

    A subclass finds the files in `find_cases` and `find_images`, says what of a patient counts in `amount_of`, and has
    ``num_classes``: 1 for masks of 0.0 and 1.0, or more for masks of class numbers.

    Batches of training are pairs of images, ``(N, C, H, W)``, and masks, ``(N, 1, H, W)``. Those of validation and
    test, and of prediction for the test set, have a dictionary about the cases behind them, which
    `lightning_znorm.batches.cases_of` reads. Those of prediction for ``predict_root`` are pairs of images and that
    dictionary.

    Args:
        batch_size: Images per batch and process.
        val_fraction: Share of the patients to validate on.
        test_fraction: Share of the patients to test on.
        seed: Draws the patients to validate and test on, and nothing else.
        num_workers: Worker processes per loader and process.
        augment: Mirror and rotate each training image and its mask at random.
        train_transform: Transforms of each training image and its mask.
        predict_root: Folder of images to predict for. Without it, the test images.
        image_size: Height and width that images and masks are resized to.
        max_memory_gb: Size of the decoded images, in GB, up to which they are held in memory.
        cache_dir: Folder for larger ones.

    Raises:
        ValueError: If one of these is out of range.
        TypeError: If one is of another type.
    """

    num_classes: int

    def __init__(
        self,
        batch_size: int,
        val_fraction: float,
        test_fraction: float,
        seed: int,
        num_workers: int = 0,
        augment: bool = False,
        train_transform: Described = None,
        predict_root: str | Path | None = None,
        image_size: int | Sequence[int] | None = None,
        max_memory_gb: float = 4.0,
        cache_dir: str | Path | None = None,
    ) -> None:
        super().__init__(
            batch_size,
            val_fraction,
            test_fraction,
            seed,
            num_workers=num_workers,
            train_transform=train_transform,
            predict_root=predict_root,
            max_memory_gb=max_memory_gb,
            cache_dir=cache_dir,
        )
        augment, image_size = plain_values(augment=augment, image_size=image_size)
        self.augment = checked_flag("augment", augment)
        self.image_size = checked_size("image_size", image_size)
        self._found: tuple[Path | None, CaseFiles] | None = None

    @abstractmethod
    def find_cases(self) -> CaseFiles:
        """Find the images with masks."""

    @abstractmethod
    def find_images(self, folder: Path) -> CaseFiles:
        """Find the images to predict for, which have no masks."""

    @abstractmethod
    def amount_of(self, marked: NDArray[np.float64]) -> float:
        """Return how much a patient has of what is marked, so that each set gets patients with little and much.

        Args:
            marked: The share of the pixels that are marked in each of the patient's masks, as the files have them, so
                that the sets do not depend on ``image_size``.
        """

    def slices(self, files: CaseFiles) -> Sequence[int | None] | None:
        """Return which slice of the patient's volume each image is; by default nothing is known of it."""
        return None

    @override
    def prepare_data(self) -> None:
        """Decode images that do not fit in memory. One process per machine runs this."""
        predicting = self.trainer is not None and self.trainer.state.fn == TrainerFn.PREDICTING
        folder = self.predict_root if predicting else None
        if folder is None and self.patients:  # the sets are drawn already
            return
        found = self._find(folder)
        if not found.fits(self.max_memory):
            found.decode(self.max_memory, self.cache)
        self._found = folder, found

    @override
    def setup(self, stage: str) -> None:
        """Decode the images, once for all stages, and draw the sets."""
        super().setup(stage)
        # Built to train alone: a checkpoint of a stranger may name any class.
        steps = built("train_transform", self.train_transform) if stage == "fit" else []
        if stage == "predict" and self.predict_root is not None:
            found = self._find(self.predict_root)
            self.refuse_idle_processes(len(found.files), "image")
            images = found.decode(self.max_memory, self.cache)
            self.on_decoded(found, images.shape)
            self.predict_set = NamedImages(images, self._cases(found), self.value_bytes)
            return
        if not self.patients:
            self._draw_sets()
        self.predict_set = self.test_set
        if stage == "predict" and isinstance(self.test_set, Sized):
            self.refuse_idle_processes(len(self.test_set), "image")
        if steps:
            assert isinstance(self.train_set, MaskedImages)
            values = max(self.num_classes, 2)
            self.train_set.transform = CaseTransforms("train_transform", steps, values, self.max_value)

    def on_decoded(self, found: CaseFiles, shape: Sequence[int]) -> None:
        """Take note of the kind of images that were decoded, before the sets are made; by default it is known."""

    def on_sets_drawn(self) -> None:
        """Take note that the sets are drawn; by default nothing follows from that."""

    @property
    def value_bytes(self) -> int:
        """Bytes of a value of the images."""
        return 1 if self.max_value < 2**8 else 2

    @override
    def sampler(self, dataset: Dataset[Any], num_replicas: int = 1, rank: int = 0, seed: int = 0) -> EpochSampler:
        """Return the sampler of the training images, which gives a seed with each of them if they are transformed."""
        kind = EpochSampler if self.train_transform is None else SeededSampler
        return kind(dataset, num_replicas, rank, seed)

    @override
    def class_frequencies(self) -> list[float]:
        """Return the share of each class among the pixels of the training masks that count, after ``setup("fit")``.

        Returns:
            One share with ``num_classes=1``, that of the marked pixels, and otherwise ``num_classes`` of them.

        Raises:
            RuntimeError: Before ``setup("fit")``.
            ValueError: If no pixel counts.
        """
        self.require_train_set()
        assert isinstance(self.train_set, MaskedImages)
        images, rows = self.train_set.images, self.train_set.rows
        counts = np.zeros(256)
        for row in rows:
            counts += np.bincount(images[row, -1].ravel(), minlength=256)
        counts[IGNORED] = 0
        if not counts.any():
            raise ZNormValueError(f"No pixel of the {len(rows)} training masks counts: all are {IGNORED}.")
        shares: list[float] = (counts / counts.sum())[: max(self.num_classes, 2)].tolist()
        return shares[1:] if self.num_classes == 1 else shares

    @override
    def on_after_batch_transfer(self, batch: Sequence[Any], dataloader_idx: int) -> Any:
        """Augment (in training only) and normalize, on the device."""
        images, *others = batch
        if images.is_floating_point():  # train_transform's are in units of the largest value
            images = images.float() * self.max_value
        if not isinstance(others[0], Tensor):  # there are no masks
            return self.normalized(images), *others
        masks, *cases = others
        if self.augment and self.trainer is not None and self.trainer.training:
            images, masks = random_flip_and_rotate(images, masks)
        # Class numbers stay integers, because half precision does not hold all of them.
        masks = self.in_precision(masks.float()) if self.num_classes == 1 else masks.long()
        return self.normalized(images), masks, *cases

    def _find(self, folder: Path | None) -> CaseFiles:
        """Return the images to predict for in a folder, or those with masks. What `prepare_data` found is used once."""
        if self._found is not None and self._found[0] == folder:
            found = self._found[1]
        else:
            found = self.find_cases() if folder is None else self.find_images(folder)
        self._found = None
        return found

    def _cases(self, found: CaseFiles) -> Cases:
        """Return what is known about the images, as batches say it."""
        cases: dict[str, Sequence[Any] | NDArray[Any]] = {"name": found.names}
        if self.image_size is not None:
            cases["size"] = np.array(found.sizes, dtype=np.int64)
        if found.has_masks:
            cases["patient"] = [each.patient for each in found.files]
        slices = self.slices(found)
        return cases if slices is None else {**cases, "slice": slices}

    def _draw_sets(self) -> None:
        found = self._find(None)
        images = found.decode(self.max_memory, self.cache)
        self.on_decoded(found, images.shape)
        patients = np.array([each.patient for each in found.files])
        self.draw_patients({str(each): self.amount_of(found.marked[patients == each]) for each in np.unique(patients)})
        cases = self._cases(found)
        rows = {name: np.flatnonzero(np.isin(patients, listed)) for name, listed in self.patients.items()}
        self.train_set = MaskedImages(images, rows["train"], value_bytes=self.value_bytes)
        self.val_set, self.test_set = (
            MaskedImages(images, rows[name], cases, self.value_bytes) for name in ("val", "test")
        )
        self.on_sets_drawn()
