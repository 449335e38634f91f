"""LGG MRI segmentation: the data module."""

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from typing_extensions import override

from lightning_znorm.arguments import checked_folder
from lightning_znorm.data.case_files import CaseFiles
from lightning_znorm.data.lgg_files import SliceFiles, find_images, find_patients, number_of
from lightning_znorm.data.segmentation import SegmentationDataModule
from lightning_znorm.data.transforms import Described, hyperparameter
from lightning_znorm.hyperparameters import plain_values


class LGGDataModule(SegmentationDataModule):
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
    little tumour and of those with much (measured by the share of their slices whose mask, as its file has it, is not
    empty). The lists of patients are in `patients`, in the log, in the hyperparameters and in every checkpoint. A
    checkpoint is refused if it was trained on patients that it would be validated or tested on, such as after a change
    of the seed.

    Batches begin with images, ``(N, 3, H, W)``, and masks, ``(N, 1, H, W)`` of 0.0 and 1.0. Behind them, those of
    validation, test and prediction have a dictionary about the slices: ``name``, the path from ``kaggle_3m`` on,
    ``patient``, and ``slice``, the number at the end of the name (None without one). Batches of ``predict_root`` are
    pairs of images and such a dictionary, without ``patient``.

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
        image_size: Height and width, or one number for both, that slices are resized to when they are read: bilinear
            with antialiasing, and masks by the nearest pixel. Sizes may then differ. Without it, as they are stored.
            With it, losses and scores are of the resized slices, and batches about cases have ``size`` too, the height
            and width of each slice's file, a NumPy array of shape ``(N, 2)``: `MaskWriter` writes masks in that size.
        train_transform: A transform of each training image and its mask, or a list of several: a dictionary transform
            of MONAI with the keys ``image`` and ``label``, one of `torchvision.transforms.v2`, or a function that takes
            and returns such a dictionary; in YAML ``class_path`` and ``init_args``. It gets images in float32 from 0
            to 1, before ``augment``, and its draws follow from the seed of the training. See
            `lightning_znorm.data.transforms.CaseTransforms`. An object, other than a description, has to be passed to
            ``load_from_checkpoint`` again.
        num_workers: Worker processes per loader and process, for a ``train_transform`` that takes long. Without one,
            reading from memory is faster.

    Raises:
        ValueError: If an argument is out of range or leaves a set without patients. Before training, if files are
            damaged, missing, of different sizes, of more than 8 bits or one page, the same for two patients, or masks
            with other values than 0 and 255: one error names them. If a checkpoint was trained on patients that it
            would be judged by.
        TypeError: If an argument is of another type.
        ImportError: If a package that it needs is missing.
        FileNotFoundError: If there are no slices.

    Example:
        >>> data = LGGDataModule(root="data", batch_size=32, augment=True)
        >>> data.num_classes, data.hparams.batch_size
        (1, 32)
    """

    _packages = ("PIL", "rich")
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
        image_size: int | list[int] | None = None,
        train_transform: Described = None,
        num_workers: int = 0,
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
        (root,) = plain_values(root=root)
        train_transform = hyperparameter(self.train_transform)
        self.save_hyperparameters()
        self.root = checked_folder("root", root)

    @override
    def find_cases(self) -> SliceFiles:
        return find_patients(self.root, self.image_size)

    @override
    def find_images(self, folder: Path) -> SliceFiles:
        return find_images(folder, self.image_size)

    @override
    def amount_of(self, marked: NDArray[np.float64]) -> float:
        """Return the share of a patient's slices whose mask is not empty."""
        return float((marked > 0).mean())

    @override
    def slices(self, files: CaseFiles) -> list[int | None]:
        """Return the numbers at the end of the files' names."""
        return [number_of(each.image.stem) for each in files.files]
