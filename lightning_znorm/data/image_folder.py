"""Images in one folder per class, like ImageNet's."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_znorm.arguments import checked_folder, checked_integer
from lightning_znorm.data.base import ImageDataModule
from lightning_znorm.data.datasets import ImageFiles, Indices, Labels, Paths, Transform
from lightning_znorm.data.decoding import refuse
from lightning_znorm.data.listing import (
    AGAIN,
    Listing,
    list_files,
    list_subfolders,
    same_files,
    some,
    warn_of_skipped,
)
from lightning_znorm.data.samplers import SeededSampler
from lightning_znorm.data.splits import stratified_indices
from lightning_znorm.errors import ZNormFileNotFoundError, ZNormValueError
from lightning_znorm.hyperparameters import plain_values


class ImageFolderDataModule(ImageDataModule):
    """Images in one folder per class, such as ImageNet's.

    Laid out as for `torchvision.datasets.ImageFolder`::

        root/
          train/
            n01440764/
              n01440764_10026.JPEG
              ...
            ...
          val/
            n01440764/
              ILSVRC2012_val_00000293.JPEG
              ...
            ...

    The images in ``val`` are the test set, because ImageNet's own test labels are not public. Validation images are
    split off from those in ``train``, stratified by class. Classes are numbered in the order of their folders' names.

    Images are the files with torchvision's suffixes (jpg, jpeg, png, ppm, bmp, pgm, tif, tiff and webp, in upper or
    lower case), also in folders inside the class folders and behind links. Each file counts once: a second name in the
    same class is skipped, a second name in another class is an error, and so is a name in ``val`` of a file in
    ``train``. One warning names what is skipped, except hidden files, what operating systems leave in folders, and
    texts.

    Files are read as torchvision's loader reads them: converted to RGB, with the colours that are stored. Transparency,
    colour profiles, gamma and a camera's EXIF orientation are not applied (Pillow does rotate TIFF files by their
    orientation). What that loader would cut or change is an error: more than 8 bits for each channel, more channels
    than colours and transparency, more than one page or frame, colours multiplied by their transparency. Of a camera's
    JPEG file of several views (MPO) the first is read.

    Worker processes decode, crop and mirror as torchvision's reference recipe does. In training they take a random crop
    of 8 to 100 % of the area, resize it, and mirror it with probability 1/2. In evaluation they resize the shorter side
    and take the centre. Images travel as uint8 and are normalized on the device, with ImageNet's mean and standard
    deviation.

    Source:
        Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", 2015, https://www.image-net.org (for
        non-commercial research and education).

    Args:
        root: Folder that holds ``train`` and ``val``.
        batch_size: Images per batch and process.
        num_workers: Worker processes per loader and process. They live as long as the training.
        image_size: Width and height of the network's input.
        resize_size: Length of the shorter side before the centre is cut out, in evaluation.
        val_fraction: Share of the images in ``train`` that become validation images, between 0 and 1.
        seed: Draws the validation images, and nothing else.

    Raises:
        ValueError: If an argument is out of range, if ``val_fraction`` is too small for the classes or ``image_size``
            exceeds ``resize_size``, if ``train`` and ``val`` have different classes, or if a file is in two classes or
            in both folders.
        TypeError: If an argument is of another type.
        ImportError: If a package that it needs is missing.
        FileNotFoundError: If ``train``, ``val``, or the images of a class are missing.
        RuntimeError: When a batch is read, if an image cannot be read, or would be cut or changed.

    Example:
        >>> data = ImageFolderDataModule(root="imagenet", batch_size=64, num_workers=12)
        >>> data.hparams.image_size
        224
    """

    _packages = ("PIL", "sklearn", "torchvision")
    max_value = 255
    # Of ImageNet's training images.
    mean = (0.485, 0.456, 0.406)
    std = (0.229, 0.224, 0.225)

    def __init__(
        self,
        root: str | Path = "data",
        batch_size: int = 256,
        num_workers: int = 8,
        image_size: int = 224,
        resize_size: int = 256,
        val_fraction: float = 0.1,
        seed: int = 0,
    ) -> None:
        super().__init__(batch_size, val_fraction, seed, num_workers)
        root, image_size, resize_size = plain_values(root=root, image_size=image_size, resize_size=resize_size)
        self.save_hyperparameters()
        self.image_size = checked_integer("image_size", image_size)
        self.resize_size = checked_integer("resize_size", resize_size)
        if not 0 < image_size <= resize_size:
            raise ZNormValueError(
                f"image_size={image_size} must be at least 1 and at most resize_size={resize_size}: images for "
                "evaluation are cut from the centre of the resized ones."
            )
        self.root = checked_folder("root", root)

    @property
    def classes(self) -> list[str]:
        """Names of the class folders, in the order of their labels."""
        (train, faults), (val, faults_of_val) = (_class_folders(self.root / part) for part in ("train", "val"))
        refuse(faults + faults_of_val, self.root)
        if train != val:
            unmatched = [
                f"{some(names)} only in {self.root / part}"
                for part, names in (("train", set(train) - set(val)), ("val", set(val) - set(train)))
                if names
            ]
            raise ZNormValueError(
                f"train and val have different classes ({', '.join(unmatched)}): both must hold the same folders."
            )
        return train

    @property
    def num_classes(self) -> int:
        """Number of class folders."""
        return len(self.classes)

    @override
    def setup(self, stage: str) -> None:
        """Find the images that the stage needs."""
        super().setup(stage)
        training, evaluation = self._transforms()
        classes = self.classes
        images = _find_images(self.root, classes)
        if stage in ("fit", "validate"):
            paths, labels = images["train"]
            train, val = self._split(labels, classes)
            self.train_set = ImageFiles(paths[train], labels[train], training)
            self.val_set = ImageFiles(paths[val], labels[val], evaluation)
        else:
            self.test_set = ImageFiles(*images["val"], evaluation)

    @override
    def sampler(self, dataset: Dataset[Any], num_replicas: int = 1, rank: int = 0, seed: int = 0) -> SeededSampler:
        """Return the sampler of the training images, which gives a seed with each of them."""
        return SeededSampler(dataset, num_replicas, rank, seed)

    def _transforms(self) -> tuple[Transform, Transform]:
        from torchvision.transforms import v2

        names: Any = v2  # for mypy, which takes a module without __all__ to export nothing
        crop = [names.RandomResizedCrop(self.image_size), names.RandomHorizontalFlip()]
        centre = [names.Resize(self.resize_size), names.CenterCrop(self.image_size)]
        return names.Compose([*crop, names.PILToTensor()]), names.Compose([*centre, names.PILToTensor()])

    def _split(self, labels: Labels, classes: list[str]) -> tuple[Indices, Indices]:
        single = np.flatnonzero(np.bincount(labels) == 1)
        if len(single):
            raise ZNormValueError(
                f"{some(str(self.root / 'train' / classes[label]) for label in single)} holds only one image, which "
                "cannot be used both for training and for validation: add another."
            )
        try:
            return stratified_indices(labels, self.val_fraction, self.seed)
        except ValueError as error:
            raise ZNormValueError(
                f"val_fraction={self.val_fraction} of the {len(labels)} images in {self.root / 'train'} leaves less "
                f"than one image for each of the {len(classes)} classes, in training or validation: change it."
            ) from error


def _class_folders(folder: Path) -> tuple[list[str], list[str]]:
    """Return the names of the class folders, and their faults."""
    if not folder.is_dir():
        raise ZNormFileNotFoundError(
            f"No folder {folder}: let root name the folder that holds train and val, with one folder of images per "
            "class in each."
        )
    names, listing = list_subfolders(folder, ())
    if not names and not listing.faults:
        raise ZNormFileNotFoundError(
            f"No class folders in {folder}: sort its images into one folder per class (ImageNet's validation images "
            "are published without)."
        )
    return names, listing.faults


def _find_images(root: Path, classes: list[str]) -> dict[str, tuple[Paths, Labels]]:
    """Return the paths and labels of the images in ``train`` and ``val``, in torchvision's order.

    Both are listed at every stage, to find images that are in both.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    found, empty = Listing(), []
    origins: list[tuple[str, int]] = []
    for part in ("train", "val"):
        found.extend(list_subfolders(root / part, IMG_EXTENSIONS)[1])
        for label, name in enumerate(classes):
            images = list_files(root / part / name, IMG_EXTENSIONS)
            if not images.paths and not images.faults:
                empty.append(str(root / part / name))
            found.extend(images)
            origins += [(part, label)] * len(images.paths)
    again = set()
    for first, other in same_files(found.paths, found.inodes):
        if origins[first] == origins[other]:
            again.add(other)
        else:  # an image has one class, and is not tested on what it was trained on
            found.faults.append(
                f"{found.paths[other]}: is the same file as {found.paths[first]} (delete one, or make it a copy)"
            )
    refuse(found.faults, root)
    found.skip(AGAIN, [found.paths[index] for index in again])
    warn_of_skipped(root, found)
    if empty:
        raise ZNormFileNotFoundError(
            f"No images in {some(empty)}: every class folder must hold files that end in {', '.join(IMG_EXTENSIONS)}."
        )
    parts = {}
    for part in ("train", "val"):
        kept = [index for index, (of, _) in enumerate(origins) if of == part and index not in again]
        paths = np.array([os.fsencode(found.paths[index]) for index in kept])
        parts[part] = paths, np.array([origins[index][1] for index in kept], dtype=np.int64)
    return parts
