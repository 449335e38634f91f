"""LGG MRI segmentation."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from lightning_znorm.data.arguments import check_number, checked_folder
from lightning_znorm.data.array_file import cache_folder
from lightning_znorm.data.augmentation import random_flip_and_rotate
from lightning_znorm.data.images import Batch, ImageDataModule
from lightning_znorm.data.lgg_files import Found, find_images, find_patients
from lightning_znorm.data.patients import split_patients
from lightning_znorm.errors import ZNormValueError
from lightning_znorm.hyperparameters import plain_values


class MaskedSlices(Dataset[Batch]):
    """Slices and their masks, of which a DataLoader takes a whole batch at a time.

    Args:
        slices: Shape ``(N, 4, H, W)``, uint8: red, green, blue and the mask (0 or 1).
        rows: Which of the slices are in the set, shape ``(M,)``.
    """

    def __init__(self, slices: NDArray[np.uint8], rows: NDArray[np.int64]) -> None:
        self.slices = slices
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        """Return one image of shape ``(3, H, W)`` and its mask of shape ``(1, H, W)``."""
        images, masks = self.__getitems__([index])
        return images[0], masks[0]

    def __getitems__(self, indices: list[int]) -> Batch:
        """Return a batch; `DataLoader` calls this in place of `__getitem__`."""
        taken = torch.from_numpy(self.slices[self.rows[indices]])
        return taken[:, :3], taken[:, 3:]


class NamedSlices(Dataset[tuple[Tensor, list[str]]]):
    """Slices and their names, of which a DataLoader takes a whole batch at a time.

    Args:
        slices: Shape ``(N, C, H, W)``, uint8: red, green, blue and whatever is left out here.
        rows: Which of the slices are in the set, shape ``(M,)``.
        names: Of all slices.
    """

    def __init__(self, slices: NDArray[np.uint8], rows: NDArray[np.int64], names: list[str]) -> None:
        self.slices = slices
        self.rows = rows
        self.names = names

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, list[str]]:
        """Return a batch; `DataLoader` calls this in place of `__getitem__`."""
        rows = self.rows[indices]
        return torch.from_numpy(self.slices[rows])[:, :3], [self.names[row] for row in rows]


class LGGDataModule(ImageDataModule):
    """LGG MRI segmentation: slices of the brains of 110 patients with lower-grade glioma, and where it is.

    3,929 slices of 256x256 pixels; red is the scan before contrast, green FLAIR, blue after contrast (FLAIR stands in
    where one of these is missing). About two thirds of the masks are empty, and about 1 % of all pixels are marked::

        root/                                    (or root is kaggle_3m, or holds lgg-mri-segmentation)
          kaggle_3m/
            TCGA_CS_4941_19960909/
              TCGA_CS_4941_19960909_1.tif        RGB
              TCGA_CS_4941_19960909_1_mask.tif   0 or 255
              ...
            ...

    Kaggle's archive holds everything twice, in ``kaggle_3m`` and in ``lgg-mri-segmentation/kaggle_3m``: only one of
    them is read. Each folder beside the ``TCGA_*`` folders is a patient too, and slices and masks may be png, jpg or
    bmp files, named in upper or lower case. ``TCGA_*`` folders end in the day of the scan: those that differ in nothing
    else are one patient.

    Files are read as they are stored, or refused by name: RGB images and grey masks of 8 bits for each channel, one in
    each file; no volumes of several pages, and nothing that EXIF says to turn. Of a camera's JPEG file of several views
    (MPO) the first is read. Links are followed, those that lead nowhere are refused by name, and no file counts twice.
    One warning names what is left out, but for hidden files, what systems leave in folders, and texts.

    No patient is in two sets: the slices of one brain are alike. The sets are drawn so that each has its part of the
    patients with little tumour and with much (share of their slices whose mask is not empty). The lists are in
    `patients`, in the log, in the hyperparameters and in every checkpoint; to judge a checkpoint by patients that it
    has seen, such as those of another seed, is refused.

    Batches of training, validation and test are pairs of images, ``(N, 3, H, W)``, and masks, ``(N, 1, H, W)`` of
    0.0 and 1.0. Batches for prediction are pairs of images and their names, paths that begin in ``predict_root`` (or
    in ``kaggle_3m``).

    All slices are decoded once, on all cores, into memory (1 GB in each process), and in what exceeds
    ``max_memory_gb`` into a file of ``cache_dir``, which all processes of a machine share and later runs find again.
    They travel as uint8 and are normalized on the device, with the mean and standard deviation per channel of 30 of the
    patients, whichever they are: an image is treated alike in training and in use.

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
        augment: Mirror and turn each training image and its mask at random
            (`lightning_znorm.data.augmentation.random_flip_and_rotate`).
        predict_root: Folder of images to predict for (tif, png, jpg or bmp in RGB or grey, all of one size, in folders
            within it and behind links too, but for masks beside their image); without it, the test slices.
        max_memory_gb: Size of the decoded slices, in GB, up to which they are held in memory.
        cache_dir: Folder for what exceeds that, by default ``~/.cache/lightning_znorm``. What is in it may be deleted.

    Raises:
        ValueError: If an argument is out of range or leaves a set without patients; before training, if files
            are damaged, missing, of different sizes, of more than 8 bits or one page, the same for two patients, or
            masks with other values than 0 and 255: one error names them. If a checkpoint was trained on patients of the
            other sets.
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
        check_number("test_fraction", test_fraction, float)
        check_number("max_memory_gb", max_memory_gb, float, least=0)
        if not 0 < test_fraction < 1 - self.val_fraction:
            raise ZNormValueError(
                f"test_fraction is the share of patients to test on, in (0, 1 - val_fraction): {test_fraction}."
            )
        self.save_hyperparameters()
        self.root = checked_folder("root", root)
        self.predict_root = None if predict_root is None else checked_folder("predict_root", predict_root)
        self.test_fraction = test_fraction
        self.augment = augment
        self.max_memory = max_memory_gb * 1e9
        self.cache = cache_folder(cache_dir)
        self.patients: dict[str, list[str]] = {}
        """Who is in which set, ``"train"``, ``"val"`` and ``"test"``, once they are drawn in `setup`."""

    @override
    def prepare_data(self) -> None:
        """Decode what does not fit in memory; one process per machine runs this."""
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
            self.predict_set = NamedSlices(slices, np.arange(len(slices)), found.names)
            return
        if not self.patients:
            self._draw_sets()
        self.predict_set = self._named_test_set

    @override
    def predict_dataloader(self) -> DataLoader[Any]:
        """Batches of images and their names."""
        return self.loader(self.predict_set, shuffle=False)

    @override
    def on_after_batch_transfer(self, batch: tuple[Tensor, Tensor | list[str]], dataloader_idx: int) -> Any:
        """Augment (in training alone) and normalize, on the device."""
        images, masks = batch
        if not isinstance(masks, Tensor):  # they are names
            return self.normalized(images), masks
        if self.augment and self.trainer is not None and self.trainer.training:
            images, masks = random_flip_and_rotate(images, masks)
        return self.normalized(images), self.in_precision(masks.float())

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the lists of patients, and what the orders are drawn from."""
        return {"patients": self.patients, **super().state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse a checkpoint that has seen the patients of the sets it would be judged by."""
        super().load_state_dict(state_dict)
        if self.trainer is None:  # `load_from_checkpoint`, which judges nothing yet
            return
        trained = state_dict["patients"]
        seen = {"val": trained["train"], "test": trained["train"] + trained["val"]}
        # A training that is resumed ends in a checkpoint that knows of its own sets alone, so both must be right there.
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

    def _find(self, stage: str) -> Found:
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
        self.train_set, self.val_set, self.test_set = (MaskedSlices(slices, rows[name]) for name in self.patients)
        self._named_test_set = NamedSlices(slices, rows["test"], found.names)
