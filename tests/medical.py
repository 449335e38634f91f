"""LGG, PatchCamelyon and folders of masks for tests: small artificial data sets in their formats, and real data."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

PCAM = "camelyonpatch_level_2_split_{split}_{what}.h5"


def write_lgg(
    root: Path, patients: int = 5, slices: int = 4, size: int = 32, seed: int = 0, **save: Any
) -> dict[str, tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """Write slices in the format of Kaggle's ``kaggle_3m``: a grey disc in noise, some with a bright tumour and a mask.

    Patient i of n has tumour in the share (i + 1) / (n + 1) of its slices.

    Args:
        root: Folder that will hold ``kaggle_3m``.
        patients: Number of patients.
        slices: Number of slices of each patient.
        size: Width and height.
        seed: Seed of the noise.
        **save: Arguments for Pillow's ``Image.save``, such as ``compression="tiff_lzw"``.

    Returns:
        Image, (H, W, 3), and mask, (H, W), by the image's path, from ``kaggle_3m`` on.
    """
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:size, :size] / size - 0.5
    written = {}
    for patient in range(patients):
        name = f"TCGA_CS_{4900 + patient}_1996{patient + 101:04d}"
        folder = root / "kaggle_3m" / name
        folder.mkdir(parents=True)
        for number in range(1, slices + 1):
            image = rng.integers(0, 20, (size, size, 3)) + 60 * (rows**2 + columns**2 < 0.2)[..., None]
            mask = np.zeros((size, size), dtype=bool)
            if number <= slices * (patient + 1) / (patients + 1):
                y, x = rng.uniform(-0.2, 0.2, 2)
                mask = (rows - y) ** 2 + (columns - x) ** 2 < 0.02
                image[mask] += np.array([60, 120, 90])
            pixels = image.astype(np.uint8), mask.astype(np.uint8) * 255
            Image.fromarray(pixels[0]).save(folder / f"{name}_{number}.tif", **save)
            Image.fromarray(pixels[1]).save(folder / f"{name}_{number}_mask.tif", **save)
            written[f"{name}/{name}_{number}.tif"] = pixels
    return written


def write_mask_folder(
    root: Path,
    patients: int = 6,
    images: int = 3,
    size: int = 32,
    values: tuple[int, ...] = (0, 128, 255),
    colours: bool = True,
    suffix: str = ".png",
    seed: int = 0,
) -> dict[str, tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """Write images and masks into two folders: a bright nucleus in noise, within a border of medium brightness.

    Args:
        root: Folder that will hold ``images`` and ``masks``.
        patients: Number of patients; the files of patient 0 are called p0_0, p0_1 and so on.
        images: Number of images of each patient.
        size: Width and height.
        values: Values of the masks: of the background, the nucleus and, if there are three, its border.
        colours: Whether images are RGB; otherwise grey.
        suffix: Of the files, which Pillow writes.
        seed: Seed of the noise.

    Returns:
        Image, (H, W, 3) or (H, W), and mask, (H, W), by the image's name.
    """
    rng = np.random.default_rng(seed)
    rows, columns = np.mgrid[:size, :size] / size - 0.5
    (root / "images").mkdir(parents=True)
    (root / "masks").mkdir()
    written = {}
    for patient in range(patients):
        for number in range(images):
            y, x = rng.uniform(-0.15, 0.15, 2)
            distance = np.hypot(rows - y, columns - x) * (1 + patient / patients)
            classes = (distance < 0.3).astype(int) + (distance < 0.2)  # 0 outside, 1 border, 2 nucleus
            image = (
                rng.integers(0, 40, (size, size, 3)) + np.array([[20, 30, 40], [90, 40, 60], [120, 200, 150]])[classes]
            )
            stored = np.array([values[0], values[-1], values[1]], np.uint8)[classes]
            pixels = (image if colours else image[..., 0]).astype(np.uint8), stored
            name = f"p{patient}_{number}{suffix}"
            Image.fromarray(pixels[0]).save(root / "images" / name)
            Image.fromarray(pixels[1]).save(root / "masks" / name)
            written[name] = pixels
    return written


def patches(count: int, seed: int) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Make patches of 96x96 pixels in shades of pink; every second patch has class 1 and a dark centre."""
    rng = np.random.default_rng(seed)
    images = rng.integers(-30, 31, (count, 96, 96, 3)) + np.array([180, 140, 178])
    labels = (np.arange(count) % 2).astype(np.uint8)
    images[labels == 1, 32:64, 32:64] -= 80
    return images.astype(np.uint8), labels


def write_pcam(
    root: Path, counts: tuple[int, int, int] = (40, 10, 12), seed: int = 0, **dataset: Any
) -> dict[str, tuple[NDArray[np.uint8], NDArray[np.uint8]]]:
    """Write patches in the format of PatchCamelyon's HDF5 files.

    Args:
        root: Folder that will hold ``pcam``.
        counts: Numbers of images of train, valid and test.
        seed: Seed of the noise.
        **dataset: Arguments for h5py's ``create_dataset`` of the images, such as ``compression="gzip"``.

    Returns:
        Images and labels of ``train``, ``valid`` and ``test``.
    """
    import h5py

    folder = root / "pcam"
    folder.mkdir(parents=True)
    written = {}
    for i, (split, count) in enumerate(zip(("train", "valid", "test"), counts, strict=True)):
        images, labels = written[split] = patches(count, seed + i)
        with h5py.File(folder / PCAM.format(split=split, what="x"), "w") as file:
            file.create_dataset("x", data=images, **dataset)
        with h5py.File(folder / PCAM.format(split=split, what="y"), "w") as file:
            file["y"] = labels.reshape(-1, 1, 1, 1)
    return written


def write_kaggle_pcam(root: Path, count: int = 60, seed: int = 0) -> dict[str, tuple[NDArray[np.uint8], int]]:
    """Write patches in the format of Kaggle's ``histopathologic-cancer-detection``; labels have another order.

    Returns:
        Image and label by name.
    """
    folder = root / "histopathologic-cancer-detection"
    (folder / "train").mkdir(parents=True)
    (folder / "test").mkdir()
    rng = np.random.default_rng(seed)
    written = {}
    for image, label in zip(*patches(count, seed), strict=True):
        name = rng.bytes(20).hex()
        Image.fromarray(image).save(folder / "train" / f"{name}.tif")
        written[name] = image, int(label)
    Image.fromarray(image).save(folder / "test" / f"{rng.bytes(20).hex()}.tif")
    with (folder / "train_labels.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("id", "label"), *((name, written[name][1]) for name in written)])
    return written


def rotated_affine(spacing: Sequence[float] = (3.0, 0.8, 0.8), seed: int = 0) -> NDArray[np.float64]:
    """Return a matrix from voxels to millimetres with a rotation, in float32's numbers, as NIfTI files hold them."""
    from scipy.spatial.transform import Rotation

    rng = np.random.default_rng(seed)
    affine = np.eye(4)
    affine[:3, :3] = Rotation.from_euler("xyz", rng.uniform(-0.4, 0.4, 3)).as_matrix() * np.array(spacing)
    affine[:3, 3] = rng.uniform(-80, 80, 3)
    return affine.astype(np.float32).astype(np.float64)


def write_volumes(
    root: Path,
    cases: int = 6,
    shape: tuple[int, int, int] = (24, 40, 36),
    channels: int = 1,
    classes: int = 1,
    folders: tuple[str, str] = ("images", "labels"),
    channel_files: bool = False,
    seed: int = 0,
) -> dict[str, tuple[NDArray[np.float32], NDArray[np.uint8], NDArray[np.float64]]]:
    """Write NIfTI volumes of noise with a bright ball for each class, and labels of 1 for the first, 2 for the next.

    Case i is larger by i voxels along the last axis, and its balls are larger too. Its name is ``PATIENT_SCAN``, with
    two scans of each patient.

    Args:
        root: Folder that will hold the folders of images and labels.
        cases: Number of cases.
        shape: Voxels of the first case.
        channels: Number of channels.
        classes: Number of balls in each case.
        folders: Names of the folders.
        channel_files: Whether each channel gets a file of its own.
        seed: Seed of the noise.

    Returns:
        Image of shape (C, X, Y, Z), label of shape (X, Y, Z) and affine matrix by the case's name.
    """
    import nibabel

    rng = np.random.default_rng(seed)
    for folder in folders:
        (root / folder).mkdir(parents=True)
    written = {}
    for case in range(cases):
        name = f"p{case // 2}_{case % 2}"
        size = (*shape[:2], shape[2] + case)
        affine = rotated_affine(seed=case)
        image = rng.normal(100, 10, (channels, *size)).astype(np.float32)
        label = np.zeros(size, np.uint8)
        grid = np.stack(np.mgrid[: size[0], : size[1], : size[2]], axis=-1) * np.array([3.0, 0.8, 0.8])
        for number in range(classes):
            middle = grid[-1, -1, -1] * (number + 1) / (classes + 1) + rng.uniform(-1, 1, 3)
            label[np.linalg.norm(grid - middle, axis=-1) < 5 + 0.5 * case] = number + 1
        image += 60 * label
        for channel in range(channels) if channel_files else [None]:
            end = "" if channel is None else f"_{channel:04d}"
            voxels = (
                image[channel] if channel is not None else image[0] if channels == 1 else image.transpose(1, 2, 3, 0)
            )
            nibabel.save(nibabel.Nifti1Image(voxels, affine), root / folders[0] / f"{name}{end}.nii.gz")
        nibabel.save(nibabel.Nifti1Image(label, affine), root / folders[1] / f"{name}.nii.gz")
        written[name] = image, label, affine
    return written


@pytest.fixture
def fake_lgg(tmp_path) -> Path:
    """Root folder of 5 patients with 4 slices of 32x32 pixels each."""
    write_lgg(tmp_path / "my data")
    return tmp_path / "my data"


@pytest.fixture
def fake_pcam(tmp_path) -> Path:
    """Root folder of 40, 10 and 12 patches in HDF5 files."""
    write_pcam(tmp_path / "my data")
    return tmp_path / "my data"


def _real(name: str) -> Path:
    if "ZNORM_DATA" not in os.environ:
        pytest.skip("needs real data: ZNORM_DATA names no folder with it (CONTRIBUTING.md)")
    return Path(os.environ["ZNORM_DATA"]) / name


@pytest.fixture(scope="session")
def real_lgg() -> Path:
    return _real("lgg-mri-segmentation")


@pytest.fixture(scope="session")
def real_pcam() -> Path:
    return _real("pcam")
