"""NIfTI volumes of a folder: which files belong to a case, what their headers say, and their voxels."""

import os
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.utilities import rank_zero_warn
from numpy.typing import NDArray

from lightning_znorm.data.array_file import ArrayFile, cached_array
from lightning_znorm.data.case_files import by
from lightning_znorm.data.datasets import IGNORED
from lightning_znorm.data.decoding import BadFileError, read_all
from lightning_znorm.data.listing import AGAIN, OTHER_TYPES, Listing, list_files, same_files, warn_of_skipped
from lightning_znorm.data.splits import patient_of
from lightning_znorm.errors import ZNormFileNotFoundError

VERSION = 2
"""Version of what `read_image` and `read_mask` return. Volumes that another version has cached are decoded again."""
FOLDERS = (("images", "labels"), ("imagesTr", "labelsTr"))
"""Names of the folders of images and labels. The second ones are nnU-Net's and the Medical Segmentation Decathlon's."""
_SUFFIXES = (".nii.gz", ".nii")
_CHANNEL = re.compile(r"_(\d{4})$")
_MASK = re.compile(r"_mask(_\d+)?$", re.IGNORECASE)
_MASKS = "masks beside their image"
_SHIFT = 0.1  # voxels by which a label may lie beside its image
_ROUNDING = 1e-4  # by which a label may differ from a whole number: scaled files hold 0.9999999
_SPACINGS = 1.5  # times that the largest spacing along an axis may be the smallest, without a warning
REORIENT = "store all images and labels alike, such as by nibabel.as_closest_canonical"
"""What to do where axes point to other sides of the body."""


@dataclass(frozen=True, eq=False)
class VolumeCase:
    """A scan, and its label if there is one.

    Args:
        name: Path of the image, relative to the root. Of several channel files, the path without the channel's number.
        images: The image's file, or one file for each channel.
        label: The label's file.
        patient: Who was scanned.
        shape: Voxels along each axis, in the order of the file.
        channels: Number of channels.
        affine: Matrix from voxel numbers to millimetres, 4 x 4, as the file has it.
    """

    name: str
    images: tuple[Path, ...]
    label: Path | None = None
    patient: str = ""
    shape: tuple[int, ...] = ()
    channels: int = 0
    affine: NDArray[np.float64] | None = None

    @property
    def axes(self) -> str:
        """The sides of the body that the axes point to, such as RAS: right, anterior, superior."""
        return "".join(_nibabel().aff2axcodes(self.affine))


@dataclass(frozen=True)
class Intensities:
    """How the intensities of a volume are scaled, by MONAI's transforms.

    Args:
        normalization: ``"zscore"`` gives each channel zero mean and unit standard deviation, ``"zscore_nonzero"`` does
            so over the voxels that are not 0 (before the window) and sets the others to 0, ``"none"`` does nothing.
        window: Intensities that become 0 and 1, before that; others are clipped.
    """

    normalization: str = "zscore"
    window: tuple[float, float] | None = None

    def scaled(self, image: Any) -> Any:
        """Return an array or a tensor of shape ``(C, X, Y, Z)`` as a tensor with scaled intensities."""
        from monai.transforms import NormalizeIntensity, ScaleIntensityRange, ToTensor

        plain = ToTensor(track_meta=False)
        image = plain(image)
        nonzero = self.normalization == "zscore_nonzero"
        if self.window is not None:
            # From 1 to 2 where MONAI is to find the voxels that were not 0: the z-scores are those of 0 to 1.
            low, outside = float(nonzero), image == 0
            image = ScaleIntensityRange(*self.window, b_min=low, b_max=low + 1, clip=True)(image)
            if nonzero:
                image[outside] = 0
        if self.normalization != "none":
            image = NormalizeIntensity(nonzero=nonzero, channel_wise=True)(image)
        return plain(image)


@dataclass(frozen=True)
class MaskValues:
    """Which values a label may have.

    Args:
        count: Values from 0 to ``count - 1`` are allowed.
        ignored: Another value that is allowed.
    """

    count: int
    ignored: int | None = None


@dataclass(frozen=True, eq=False)
class Volume:
    """Voxels of a case.

    Args:
        image: Shape ``(C, X, Y, Z)``, float32, scaled.
        mask: Shape ``(1, X, Y, Z)``, uint8: class numbers, and `IGNORED`.
    """

    image: NDArray[np.float32]
    mask: NDArray[np.uint8]

    def load(self) -> "Volume":
        """Return the voxels."""
        return self


@dataclass(frozen=True)
class StoredVolume:
    """Voxels of a case in a file of the cache.

    Args:
        file: Holds the bytes of the image, and then those of the mask.
        shape: Of the image, ``(C, X, Y, Z)``.
    """

    file: ArrayFile
    shape: tuple[int, ...]

    def load(self) -> Volume:
        """Return the voxels, which the system reads from the file as they are used."""
        content, _ = self.file.map()
        split = 4 * prod(self.shape)
        image = content[:split].view(np.float32).reshape(self.shape)
        return Volume(image, content[split:].reshape(1, *self.shape[1:]))


def find_cases(
    root: Path, channel_files: bool, patient_pattern: re.Pattern[str] | None
) -> tuple[list[VolumeCase], list[str]]:
    """Find the images and labels of a data set, and read their headers. One warning names what is skipped.

    Args:
        root: Folder that holds ``images`` and ``labels``, or ``imagesTr`` and ``labelsTr``.
        channel_files: Whether the channels of an image are in files of their own, ``CASE_0000.nii.gz`` and so on.
        patient_pattern: Finds the patient in the path of a case below the folder of images, without the suffix. Its
            first group is the patient, or all that it matches. Without it, each case is a patient.

    Returns:
        The cases by name, and what is wrong, in sentences that begin with a path.

    Raises:
        FileNotFoundError: If there are none.
    """
    found = next(((root / images, root / labels) for images, labels in FOLDERS if (root / images).is_dir()), None)
    if found is None or not found[1].is_dir():
        raise ZNormFileNotFoundError(
            f"No volumes at {root}: let root name the folder that holds images/CASE.nii.gz and labels/CASE.nii.gz "
            "(or imagesTr and labelsTr)."
        )
    images, labels = (_list_volumes(folder) for folder in found)
    faults = [*images.faults, *labels.faults]
    files, labelled = _by_case(images, found[0], channel_files, faults), _by_case(labels, found[1], False, faults)
    _refuse_same_files(images, faults)
    # As nnU-Net names the files of channels, and no labels.
    are_channels = not channel_files and all(_CHANNEL.search(key) for key in files)
    cases = []
    for key, paths in files.items():
        patient = patient_of(key, patient_pattern)
        if not patient:
            faults.append(f"{paths[0]}: patient_pattern finds no patient in {key!r}")
        label = labelled.pop(key, [None])[0]
        if label is None:
            way_out = f" (set channel_files: true if {key[-4:]} is a channel)" if are_channels else ""
            faults.append(f"{paths[0]}: has no label, {found[1] / key}.nii.gz{way_out}")
        cases.append(VolumeCase(_name(root, found[0], key, paths), tuple(paths), label, patient))
    faults += [f"{path}: has no image, {found[0] / key}.nii.gz" for key, (path, *_) in labelled.items()]
    for listing, folder in zip((images, labels), found, strict=True):
        warn_of_skipped(folder, listing)
    if not cases and not faults:
        raise ZNormFileNotFoundError(f"No volumes in {found[0]}, files that end in .nii.gz or .nii.")
    return _with_headers(cases, faults), faults


def find_images(folder: Path, channel_files: bool) -> tuple[list[VolumeCase], list[str]]:
    """Find images to predict for, also in folders inside a folder, and read their headers.

    Masks beside their image are left out: files named like it with ``_mask`` at the end, as `MaskWriter` names them.

    Args:
        folder: Where the images are.
        channel_files: Whether the channels of an image are in files of their own.

    Returns:
        The cases by name, and what is wrong, in sentences that begin with a path.

    Raises:
        FileNotFoundError: If there are none.
    """
    listing = _list_volumes(folder) if folder.is_dir() else Listing()
    stems = {_stem(path) for path in listing.paths}
    stems |= {_CHANNEL.sub("", stem) for stem in stems} if channel_files else set()
    masks = [path for path in listing.paths if (stem := _stem(path)) != (of := _MASK.sub("", stem)) and of in stems]
    listing.skip(_MASKS, masks)
    numbers = dict(zip(listing.paths, listing.inodes, strict=True))
    listing.paths = [path for path in listing.paths if path not in {*masks}]
    again = {other for _, other in same_files(listing.paths, [numbers[path] for path in listing.paths])}
    listing.skip(AGAIN, [listing.paths[index] for index in again])
    listing.paths = [path for index, path in enumerate(listing.paths) if index not in again]
    faults = [*listing.faults]
    files = _by_case(listing, folder, channel_files, faults)
    warn_of_skipped(folder, listing)
    if not files and not faults:
        raise ZNormFileNotFoundError(
            f"No images at {folder}, files that end in .nii.gz or .nii and are not masks (*_mask)."
        )
    cases = [VolumeCase(_name(folder, folder, key, paths), tuple(paths), patient=key) for key, paths in files.items()]
    return _with_headers(cases, faults), faults


def read_image(case: VolumeCase, intensities: Intensities) -> NDArray[np.float32]:
    """Read the image of a case by MONAI's reader, and scale its intensities.

    Returns:
        Shape ``(C, X, Y, Z)``.

    Raises:
        BadFileError: If a file cannot be read to its end, or holds NaN or infinity. The sentence begins with its path.
    """
    image = np.concatenate([_read_finite(path) for path in case.images])
    return np.ascontiguousarray(intensities.scaled(image).numpy(), dtype=np.float32)


def faults_of_images(case: VolumeCase) -> list[str]:
    """Return what is wrong with each of the files of a case's image, without the headers."""
    faults = []
    for path in case.images:
        try:
            _read_finite(path)
        except BadFileError as fault:
            faults.append(str(fault))
    return faults


def read_mask(case: VolumeCase, values: MaskValues) -> NDArray[np.uint8]:
    """Read the label of a case, whose values may differ by 1e-4 from whole numbers.

    Returns:
        Shape ``(1, X, Y, Z)``: class numbers, and `IGNORED` for the ignored value.

    Raises:
        BadFileError: If the file cannot be read to its end, or has other values. The sentence begins with its path.
    """
    assert case.label is not None
    voxels = _read(case.label)
    nearest = np.rint(voxels)
    if wrong := _other_values(voxels, nearest, values):
        allowed = f"0 to {values.count - 1}" + ("" if values.ignored is None else f" and {values.ignored}")
        raise BadFileError(f"{case.label}: is a label with the values {wrong} besides {allowed}")
    if values.ignored is not None:
        nearest[nearest == values.ignored] = IGNORED
    return np.ascontiguousarray(nearest, dtype=np.uint8)


def bytes_of(case: VolumeCase) -> int:
    """Return how many bytes a decoded case takes."""
    return (4 * case.channels + 1) * prod(case.shape)


def count_values(mask: NDArray[np.uint8], values: MaskValues) -> list[int]:
    """Return how many voxels of a mask have each value from 0 to ``values.count - 1``."""
    counts: list[int] = np.bincount(mask.ravel(), minlength=values.count)[: values.count].tolist()
    return counts


def stored(case: VolumeCase, intensities: Intensities, values: MaskValues, folder: Path) -> StoredVolume:
    """Return the voxels of a case in a file, which is made unless an earlier run has made it.

    Raises:
        BadFileError: As `read_image` and `read_mask`.
        OSError: If there is no room for the file.
    """
    shape = (case.channels, *case.shape)
    split = 4 * prod(shape)

    def fill(content: NDArray[np.uint8]) -> None:
        content[:split] = read_image(case, intensities).reshape(-1).view(np.uint8)
        content[split:] = read_mask(case, values).reshape(-1)

    assert case.label is not None
    window = "" if intensities.window is None else "-{}-{}".format(*intensities.window)
    ignored = "" if values.ignored is None else f"-{values.ignored}"
    name = f"volume-{VERSION}-{values.count}{ignored}-{intensities.normalization}{window}"
    file = cached_array(name, [*case.images, case.label], (split + prod(case.shape),), fill, folder)
    return StoredVolume(file, shape)


def _list_volumes(folder: Path) -> Listing:
    listing = list_files(folder, {".gz", ".nii"})
    kept = [index for index, path in enumerate(listing.paths) if path.lower().endswith(_SUFFIXES)]
    listing.skip(OTHER_TYPES, [path for index, path in enumerate(listing.paths) if index not in {*kept}])
    listing.inodes = [listing.inodes[index] for index in kept]
    listing.paths = [listing.paths[index] for index in kept]
    return listing


def _stem(path: str | Path) -> str:
    """Return a path without ``.nii`` or ``.nii.gz``."""
    text = os.fspath(path)
    return next((text[: -len(suffix)] for suffix in _SUFFIXES if text.lower().endswith(suffix)), text)


def _by_case(listing: Listing, folder: Path, channel_files: bool, faults: list[str]) -> dict[str, list[Path]]:
    """Return the files of each case, by the path of the case below the folder, and add what is wrong to the faults."""
    by_channel: dict[str, dict[int, Path]] = defaultdict(dict)
    for path in listing.paths:
        key, channel = Path(os.path.relpath(_stem(path), folder)).as_posix(), 0
        if channel_files:
            number = _CHANNEL.search(key)
            if number is None:
                faults.append(f"{path}: has no number of a channel at the end, such as {key}_0000.nii.gz")
                continue
            key, channel = key[: number.start()], int(number.group(1))
        if (other := by_channel[key].setdefault(channel, Path(path))) != Path(path):
            faults.append(f"{path}: differs from {other.name} only in the suffix")
    for key, files in by_channel.items():
        if missing := sorted(set(range(max(files))) - set(files)):
            numbers = ", ".join(f"{number:04d}" for number in missing)
            faults.append(f"{folder / key}: has no file for channel {numbers}")
    return {key: [files[channel] for channel in sorted(files)] for key, files in sorted(by_channel.items())}


def _refuse_same_files(listing: Listing, faults: list[str]) -> None:
    for first, other in same_files(listing.paths, listing.inodes):
        faults.append(f"{listing.paths[other]}: is the same file as {listing.paths[first]} (delete one)")


def _name(root: Path, folder: Path, key: str, paths: Sequence[Path]) -> str:
    """Return the path of a case relative to the root, with the suffix of its file."""
    suffix = str(paths[0])[len(_stem(paths[0])) :]
    return Path(os.path.relpath(folder / f"{key}{suffix}", root)).as_posix()


def _with_headers(cases: list[VolumeCase], faults: list[str]) -> list[VolumeCase]:
    """Return the cases with what their headers say, and add what is wrong to the faults."""
    completed = list(cases)

    def read(index: int) -> list[str]:
        try:
            completed[index] = _with_header(cases[index])
        except BadFileError as fault:
            return [str(fault)]
        return []

    faults += read_all(read, len(cases), "headers")
    counts = Counter(case.channels for case in completed if case.channels)
    if len(counts) > 1:
        usual = counts.most_common(1)[0][0]
        faults += [
            f"{case.images[0]}: has {case.channels} channels, and other images have {usual}"
            for case in completed
            if case.channels not in (0, usual)
        ]
    known = [case for case in completed if case.affine is not None]
    axes = [case.axes for case in known]
    if len({*axes}) > 1:
        most = Counter(axes).most_common(1)[0][0]
        faults += [
            f"{case.images[0]}: has its axes towards {towards}, and other images towards {most} ({REORIENT})"
            for case, towards in zip(known, axes, strict=True)
            if towards != most
        ]
    else:
        _warn_of_spacings(known)
    return completed


def _warn_of_spacings(cases: Sequence[VolumeCase]) -> None:
    spacings = [np.linalg.norm(case.affine[:3, :3], axis=0) for case in cases if case.affine is not None]
    differences = []
    for axis in range(3) if spacings else ():
        along = [spacing[axis] for spacing in spacings]
        low, high = int(np.argmin(along)), int(np.argmax(along))
        if along[high] > _SPACINGS * along[low]:
            differences.append(
                f"along axis {axis} from {along[low]:.3g} mm ({cases[low].images[0].name}) to {along[high]:.3g} mm "
                f"({cases[high].images[0].name})"
            )
    if differences:
        rank_zero_warn(
            f"The spacing of the images differs: {', '.join(differences)}. So one structure has several sizes in "
            "voxels, which is all that a network sees: resample images and labels to one spacing first."
        )


def _with_header(case: VolumeCase) -> VolumeCase:
    first, *others = case.images
    shape, affine = _header(first)
    if others and len(shape) == 4 and shape[3] > 1:
        raise BadFileError(f"{first}: has {shape[3]} channels, and is the file of one")
    for path in [*others, *([case.label] if case.label else [])]:
        found, found_affine = _header(path)
        spatial = found[:3] if len(found) == 3 or found[3] == 1 else found
        if spatial != shape[:3]:
            raise BadFileError(f"{path}: has {by(spatial)} voxels, and {first.name} has {by(shape[:3])}")
        if (shift := _shift(affine, found_affine, shape[:3])) > _SHIFT:
            raise BadFileError(
                f"{path}: lies up to {shift:.2g} voxels beside {first.name}, because their affine matrices differ"
            )
    channels = len(case.images) if others else (shape[3] if len(shape) == 4 else 1)
    return replace(case, shape=shape[:3], channels=channels, affine=affine)


def _header(path: Path) -> tuple[tuple[int, ...], NDArray[np.float64]]:
    """Return the shape and the affine matrix of a file."""
    image: Any = _opened(path)
    shape, affine = tuple(map(int, image.shape)), np.array(image.affine, dtype=np.float64)
    if len(shape) not in (3, 4) or 0 in shape:
        raise BadFileError(f"{path}: has the shape {by(shape)}, and a volume has three axes, or a fourth of channels")
    if not np.isfinite(affine).all() or np.linalg.matrix_rank(affine[:3, :3]) < 3:
        raise BadFileError(f"{path}: has an affine matrix that is no map to millimetres: {affine.tolist()}")
    return shape, affine


def _opened(path: Path) -> Any:
    nibabel = _nibabel()
    try:
        return nibabel.load(path)
    except Exception as error:  # nibabel's, zlib's and others have no common base
        raise BadFileError(_unreadable(path, error)) from error


def _read(path: Path) -> NDArray[np.float32]:
    """Read a file as MONAI's `LoadImaged` and `EnsureChannelFirstd` do, shape ``(C, X, Y, Z)``."""
    try:
        voxels = _loader()(path, reader=_reader())
    except Exception as error:  # nibabel's, zlib's and others have no common base
        raise BadFileError(_unreadable(path, error)) from error
    voxels_of_file: NDArray[np.float32] = voxels.numpy()
    return voxels_of_file


def _read_finite(path: Path) -> NDArray[np.float32]:
    voxels = _read(path)
    if not np.isfinite(voxels).all():
        raise BadFileError(f"{path}: holds NaN or infinity")
    return voxels


@lru_cache(maxsize=1)
def _loader() -> Any:
    from monai.transforms import LoadImage

    return LoadImage(image_only=True, ensure_channel_first=True)


def _reader() -> Any:
    """Return a new reader: MONAI's keeps the names of its files, and several threads read."""
    from monai.data import NibabelReader

    return NibabelReader()


def _nibabel() -> Any:  # not its module, whose functions have no types
    import nibabel

    return nibabel


def _unreadable(path: Path, error: Exception) -> str:
    reason = " ".join(str(error).split())
    return f"{path}: cannot be read as a NIfTI volume ({type(error).__name__}: {reason[:200]})"


def _shift(affine: NDArray[np.float64], other: NDArray[np.float64], shape: tuple[int, ...]) -> float:
    """Return how far, in voxels, a corner of the volume lies from where another affine matrix puts it."""
    corners = np.array([[*corner, 1] for corner in np.ndindex(2, 2, 2)]) * [*(n - 1 for n in shape), 1]
    away = np.linalg.solve(affine, (other - affine) @ corners.T.astype(np.float64))
    return float(np.abs(away[:3]).max())


def _other_values(voxels: NDArray[np.float32], nearest: NDArray[np.float32], values: MaskValues) -> str:
    """Return the values that are not allowed, the first five of them.

    Args:
        voxels: Values of a label.
        nearest: The nearest whole numbers.
        values: Which are allowed.
    """
    allowed = (nearest >= 0) & (nearest < values.count)
    if values.ignored is not None:
        allowed |= nearest == values.ignored
    with np.errstate(invalid="ignore"):  # infinity
        allowed &= np.abs(voxels - nearest) <= _ROUNDING
    if allowed.all():
        return ""
    found = np.unique(voxels[~allowed])
    listed = ", ".join(str(value).removesuffix(".0") for value in found[:5])  # as many digits as float32 has
    return listed + (" and others" if len(found) > 5 else "")
