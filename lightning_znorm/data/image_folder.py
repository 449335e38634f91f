"""Images in one folder per class, as ImageNet has them."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_znorm.data.arguments import check_number, checked_folder
from lightning_znorm.data.decoding import BadFileError, read_rgb, refuse
from lightning_znorm.data.files import (
    AGAIN,
    Listing,
    list_files,
    list_subfolders,
    same_files,
    some,
    warn_of_skipped,
)
from lightning_znorm.data.images import ImageDataModule, Labels, stratified_indices
from lightning_znorm.data.shuffle import SeededShuffle
from lightning_znorm.errors import ZNormFileNotFoundError, ZNormRuntimeError, ZNormValueError
from lightning_znorm.hyperparameters import plain_values

Paths: TypeAlias = NDArray[np.bytes_]
"""Shape ``(N,)``, as the file system spells them."""
Transform: TypeAlias = Callable[[Any], Tensor]
"""Makes a uint8 tensor of shape ``(C, H, W)`` from a PIL image in RGB."""


class ImageFiles(Dataset[tuple[Tensor, int]]):
    """Image files, read when they are asked for.

    Paths are kept in one NumPy array, because worker processes share its memory: they would copy a list of a million
    strings, page by page, as they count references to each.

    Args:
        paths: Where the images are.
        labels: Class of each.
        transform: Turns each image into a tensor.
    """

    def __init__(self, paths: Paths, labels: Labels, transform: Transform) -> None:
        self.paths = paths
        self.labels = labels
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Tensor, int]:
        """Return one image, transformed, and its label; with a seed beside the index, by draws that follow from it."""
        if not isinstance(index, tuple):
            return self._read(index)
        index, seed = index
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # not those of GPUs, as torch.manual_seed does
            return self._read(index)

    def _read(self, index: int) -> tuple[Tensor, int]:
        path = os.fsdecode(self.paths[index])
        try:
            image = read_rgb(path)
        except BadFileError as fault:
            raise ZNormRuntimeError(f"{path} {fault}: convert, replace or remove it.") from fault
        return self.transform(image), int(self.labels[index])


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

    The images in ``val`` are the test set, for ImageNet's own test labels are not public; validation images are split
    off from those in ``train``, stratified by class. Classes are numbered in the order of their folders' names.

    Images are the files that end in torchvision's suffixes (jpg, jpeg, png, ppm, bmp, pgm, tif, tiff and webp, in upper
    or lower case), in folders inside the class folders and behind links too. Each file counts once: a further name of
    it in its class is skipped, and one in another class, or in ``val`` of what is in ``train``, is an error. One
    warning names what is skipped, but for hidden files, what systems leave in folders, and texts.

    Files are read as torchvision's loader reads them: converted to RGB, with the colours that are stored. Transparency,
    colour profiles, gamma and a camera's EXIF orientation are not applied (but Pillow turns TIFF files as they say).
    What that loader would cut or compute is an error: more than 8 bits for each channel, more channels than colours and
    transparency, more than one page or frame, colours multiplied by their transparency. Of a camera's JPEG file of
    several views (MPO) the first is read.

    Worker processes decode, crop and mirror as torchvision's reference recipe does: in training a random crop of 8 to
    100 % of the area, resized, and mirrored with probability 1/2; in evaluation the centre of the image after its
    shorter side is resized. Images travel as uint8 and are normalized on the device, with ImageNet's mean and standard
    deviation.

    Source:
        Russakovsky et al., "ImageNet Large Scale Visual Recognition Challenge", 2015, https://www.image-net.org (for
        non-commercial research and education).

    Args:
        root: Folder that holds ``train`` and ``val``.
        batch_size: Images per batch and process.
        num_workers: Worker processes per loader and process; they live as long as the training.
        image_size: Width and height of the images that the network is given.
        resize_size: Length of the shorter side before the centre is cut out, in evaluation.
        val_fraction: Share of the images in ``train`` that become validation images, between 0 and 1.
        seed: Draws the validation images, and nothing else.

    Raises:
        ValueError: If an argument is out of range, if ``val_fraction`` is too small for the classes or ``image_size``
            exceeds ``resize_size``, if ``train`` and ``val`` have different classes, or if a file is in two classes or
            in both.
        TypeError: If an argument is of another type.
        FileNotFoundError: If ``train``, ``val``, or the images of a class are missing.
        RuntimeError: When a batch is read, if an image cannot be read, or not as it is.

    Example:
        >>> data = ImageFolderDataModule(root="imagenet", batch_size=64, num_workers=12)
        >>> data.hparams.image_size
        224
    """

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
        check_number("image_size", image_size, int)
        check_number("resize_size", resize_size, int)
        if not 0 < image_size <= resize_size:
            raise ZNormValueError(
                f"image_size={image_size} must be at least 1 and at most resize_size={resize_size}, from whose centre "
                "the images for evaluation are cut."
            )
        self.root = checked_folder("root", root)
        self.image_size = image_size
        self.resize_size = resize_size

    @property
    def classes(self) -> list[str]:
        """Names of the class folders, in the order of their labels."""
        (train, faults), (val, faults_of_val) = (_class_folders(self.root / part) for part in ("train", "val"))
        refuse(faults + faults_of_val, self.root)
        if train != val:
            differences = [
                f"{some(names)} in {self.root / part} alone"
                for part, names in (("train", set(train) - set(val)), ("val", set(val) - set(train)))
                if names
            ]
            raise ZNormValueError(
                f"train and val have different classes ({', '.join(differences)}): both must hold the same folders."
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
    def sampler(self, dataset: Dataset[Any], num_replicas: int = 1, rank: int = 0, seed: int = 0) -> SeededShuffle:
        """Make what draws the order of the training images, and a seed for each of them."""
        return SeededShuffle(dataset, num_replicas, rank, seed)

    def _transforms(self) -> tuple[Transform, Transform]:
        from torchvision.transforms import v2

        names: Any = v2  # for mypy, which takes a module without __all__ to export nothing
        crop = [names.RandomResizedCrop(self.image_size), names.RandomHorizontalFlip()]
        centre = [names.Resize(self.resize_size), names.CenterCrop(self.image_size)]
        return names.Compose([*crop, names.PILToTensor()]), names.Compose([*centre, names.PILToTensor()])

    def _split(self, labels: Labels, classes: list[str]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        single = np.flatnonzero(np.bincount(labels) == 1)
        if len(single):
            raise ZNormValueError(
                f"{some(str(self.root / 'train' / classes[label]) for label in single)} holds one image alone, which "
                "cannot be both for training and for validation: add another."
            )
        try:
            return stratified_indices(labels, self.val_fraction, self.seed)
        except ValueError as error:
            raise ZNormValueError(
                f"val_fraction={self.val_fraction} of the {len(labels)} images in {self.root / 'train'} leaves less "
                f"than one image for each of the {len(classes)} classes, in training or validation: change it."
            ) from error


def _class_folders(folder: Path) -> tuple[list[str], list[str]]:
    """Return the names of the class folders, and what is wrong."""
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
    """Find the images in ``train`` and ``val``, in torchvision's order.

    Both are listed at every stage, for no image may be in both.
    """
    from torchvision.datasets.folder import IMG_EXTENSIONS

    found, empty = Listing(), []
    places: list[tuple[str, int]] = []
    for part in ("train", "val"):
        found.extend(list_subfolders(root / part, IMG_EXTENSIONS)[1])
        for label, name in enumerate(classes):
            images = list_files(root / part / name, IMG_EXTENSIONS)
            if not images.paths and not images.faults:
                empty.append(str(root / part / name))
            found.extend(images)
            places += [(part, label)] * len(images.paths)
    again = set()
    for first, other in same_files(found.paths, found.inodes):
        if places[first] == places[other]:
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
        kept = [index for index, (of, _) in enumerate(places) if of == part and index not in again]
        paths = np.array([os.fsencode(found.paths[index]) for index in kept])
        parts[part] = paths, np.array([places[index][1] for index in kept], dtype=np.int64)
    return parts
