"""The data module of NIfTI volumes: patches for training, and whole volumes for everything else."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from lightning.pytorch.trainer.states import TrainerFn
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from typing_extensions import override

from lightning_znorm.arguments import (
    checked_choice,
    checked_flag,
    checked_folder,
    checked_integer,
    checked_number,
    shown,
)
from lightning_znorm.data.datasets import IGNORED
from lightning_znorm.data.decoding import BadFileError, read_all, refuse
from lightning_znorm.data.listing import some
from lightning_znorm.data.patients import PatientDataModule
from lightning_znorm.data.samplers import SeededSampler
from lightning_znorm.data.splits import checked_pattern
from lightning_znorm.data.transforms import CaseTransforms, Described, built, hyperparameter
from lightning_znorm.data.volume_files import (
    REORIENT,
    Intensities,
    MaskValues,
    StoredVolume,
    Volume,
    VolumeCase,
    bytes_of,
    count_values,
    faults_of_images,
    find_cases,
    find_images,
    read_image,
    read_mask,
    stored,
)
from lightning_znorm.errors import ZNormRuntimeError, ZNormTypeError, ZNormValueError
from lightning_znorm.hyperparameters import plain_values

Voxels: TypeAlias = NDArray[np.int64]
"""Numbers of voxels in a flattened volume, shape ``(M,)``."""

# Memory that decoding a volume takes, in units of its decoded size. Measured: 2 to 5 by type of file and normalization,
# and 6 to 13 with "zscore_nonzero".
_PEAK = 13
_CENTRES = 10_000  # voxels of a class that a patch may be centred on; nnU-Net keeps as many
_STAGES = {TrainerFn.VALIDATING: "validate", TrainerFn.TESTING: "test", TrainerFn.PREDICTING: "predict"}
# The sets that a stage needs; all other stages need the test set.
_SETS: dict[str, tuple[str, ...]] = {"fit": ("train", "val"), "validate": ("val",)}


class VolumeDataModule(PatientDataModule):
    """Scans in 3-D, such as CT and MRI, and masks of structures in them, as NIfTI files.

    Laid out like this::

        root/
          images/                    (or imagesTr, as in nnU-Net and the Medical Segmentation Decathlon)
            CASE.nii.gz              or .nii; channels on a fourth axis
            ...
          labels/                    (or labelsTr)
            CASE.nii.gz              the class of each voxel: 0 (background) to num_classes - 1
            ...

    With ``channel_files``, each channel has a file of its own, ``CASE_0000.nii.gz``, ``CASE_0001.nii.gz`` and so on, as
    nnU-Net has them. Needs nibabel, which the extra ``volumes`` installs.

    Training batches are random patches, ``(N, C, *patch_size)``, and their masks. Batches for validation and test are
    whole volumes in the order of the file's axes, one at a time, with their masks and a dictionary that holds the
    ``name`` of the image (its path below ``root``), the ``patient`` and the ``affine`` matrix, a NumPy array of float64
    and shape ``(1, 4, 4)``. Batches for prediction are the same for the test set, and have no masks with
    ``predict_root``. Masks have the shape ``(N, 1, ...)``: 0.0 and 1.0 for one class, otherwise class numbers in int64,
    for ``activation="softmax"``. Give the network whole volumes by a sliding window.

    Nothing is resampled or turned: a prediction fits its file voxel by voxel. So the axes of all images must point to
    the same sides of the body, such as right, anterior and superior (RAS). Other images are refused, because patches
    would mix axes and sides. A checkpoint knows the sides, and refuses images whose axes point to others. If the
    largest spacing along an axis is more than 1.5 times the smallest, a warning asks to resample the files first.

    A patch is drawn from its image's number, the epoch and a number that torch's generator draws when a training
    begins. So patches differ from epoch to epoch, and are the same with the same seed and any number of workers. A
    training that is resumed from a checkpoint, in the middle of an epoch too, continues with the patches that it would
    have drawn. Along axes on which a volume is smaller than the patch, the patch is filled up with zeros, and the mask
    with ``ignore_index``, or with zeros without it.

    No patient is in two sets. Each set gets its share of the patients with small structures and of those with large
    ones (measured by the share of the voxels that are not background). The lists of patients are in `patients`, in the
    log, in the hyperparameters and in every checkpoint. A checkpoint is refused if it was trained on patients that it
    would be validated or tested on.

    Before the first step, the headers and labels of all cases are read, and the images of the sets that are needed.
    These volumes are decoded into memory, or into files of ``cache_dir`` if they take more than ``max_memory_gb``. All
    processes of a machine share these files, and later runs find them again. Each run still reads all labels, to draw
    the sets, and reads those of the volumes that it decodes into files a second time. Images in ``predict_root`` are
    read when their turn comes, after their headers were checked.

    Source:
        Patches around voxels of a class and elsewhere: Isensee et al., "nnU-Net: a self-configuring method for deep
        learning-based biomedical image segmentation", Nature Methods, 2021. Reader and scaling: MONAI's ``LoadImage``
        with ``NibabelReader``, ``ScaleIntensityRange`` and ``NormalizeIntensity``.

    Args:
        root: Folder that holds ``images`` and ``labels``.
        batch_size: Patches per batch and process.
        patch_size: Voxels of a patch along each axis of the files.
        patches_per_volume: Patches that each volume gives in an epoch.
        foreground_fraction: Share of the patches whose centre is a voxel of a class (a random one of the classes that
            the volume has, without the background), as far as the volume's edge allows. The others lie anywhere.
        num_classes: 1 for one structure, with labels of 0 and 1; otherwise the number of classes with the background,
            at most 255.
        ignore_index: A further value of labels, for voxels that do not count. The task must have the same one, and the
            same ``num_classes``.
        channel_files: Whether each channel has a file of its own.
        patient_pattern: Regular expression that finds the patient in a case's path below ``images``, without
            ``.nii.gz``: its first group, or all that it matches. Without it, each case is a patient.
        val_fraction: Share of the patients to validate on.
        test_fraction: Share of the patients to test on.
        seed: Draws the patients to validate and test on, and nothing else.
        normalization: Of each channel of a volume: ``"zscore"`` for zero mean and unit standard deviation,
            ``"zscore_nonzero"`` for the same over the voxels that are not 0 in the file (scans of a brain without
            the skull), which sets the others to 0, and ``"none"``.
        intensity_range: The lowest and highest intensity of a window, such as ``[-160, 240]`` in CT. They become 0 and
            1 before the normalization, and what lies outside is clipped. For CT, set ``normalization="none"`` beside
            it: after z-scores, a Hounsfield unit would be another number in each scan.
        train_transform: Random changes of the training patches: a transform of MONAI for dictionaries with ``image``
            and ``label``, a list of these, or any callable that takes and returns such a dictionary. In YAML by
            ``class_path`` and ``init_args``. Patches must keep their size, and labels their values: let the label be
            interpolated by ``nearest``. Images are normalized already, and ignored voxels have the value 255.
        num_workers: Worker processes per loader and process. On Windows and macOS each of them gets a copy of the
            volumes in memory, but not of those in files.
        predict_root: Folder of images to predict for, also in folders inside it. Masks beside their image (``_mask``)
            are left out. Without it, the test set.
        max_memory_gb: Size of the decoded volumes, in GB, up to which each process holds them in memory. Decoding takes
            up to as much again: each core decodes a volume, which may take 13 times its decoded size meanwhile, and
            only as many cores decode as that allows (at least one).
        cache_dir: Folder for larger ones, by default ``~/.cache/lightning_znorm``. What is in it may be deleted.

    Raises:
        ValueError: If an argument is out of range, or leaves a set without patients. Before volumes are decoded, if the
            task has another ``num_classes`` or ``ignore_index``. Before training, if files are damaged or missing, if
            image and label of a case differ in shape or place (by more than a tenth of a voxel), if images differ in
            their channels or in the sides that their axes point to, if an image holds NaN, or a label other values: one
            error names them. If a checkpoint was trained on patients that it would be judged by, or on images whose
            axes point to other sides. If predictions are asked of more processes than there are volumes.
        TypeError: If an argument is of another type.
        FileNotFoundError: If there are no volumes.
        ImportError: If nibabel or another package that it needs is missing.
        RuntimeError: When an image in ``predict_root`` is read, if it is damaged.

    Example:
        >>> data = VolumeDataModule(root="data", patch_size=[32, 96, 96], num_classes=3)
        >>> data.num_classes, data.hparams.patches_per_volume
        (3, 4)
    """

    _packages = ("monai", "nibabel", "rich")

    def __init__(
        self,
        root: str | Path = "data",
        batch_size: int = 2,
        patch_size: Sequence[int] = (96, 96, 96),
        patches_per_volume: int = 4,
        foreground_fraction: float = 0.5,
        num_classes: int = 1,
        ignore_index: int | None = None,
        channel_files: bool = False,
        patient_pattern: str | None = None,
        val_fraction: float = 0.1,
        test_fraction: float = 0.2,
        seed: int = 0,
        normalization: Literal["zscore", "zscore_nonzero", "none"] = "zscore",
        intensity_range: Sequence[float] | None = None,
        train_transform: Described = None,
        num_workers: int = 4,
        predict_root: str | Path | None = None,
        max_memory_gb: float = 16.0,
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
        root, patch_size, patches_per_volume, foreground_fraction, num_classes, ignore_index, channel_files = (
            plain_values(
                root=root,
                patch_size=patch_size,
                patches_per_volume=patches_per_volume,
                foreground_fraction=foreground_fraction,
                num_classes=num_classes,
                ignore_index=ignore_index,
                channel_files=channel_files,
            )
        )
        patient_pattern, normalization, intensity_range = plain_values(
            patient_pattern=patient_pattern, normalization=normalization, intensity_range=intensity_range
        )
        train_transform = hyperparameter(self.train_transform)
        self.save_hyperparameters()
        self.patch_size = _checked_size(patch_size)
        self.patches_per_volume = checked_integer("patches_per_volume", patches_per_volume, minimum=1, bits=31)
        self.foreground_fraction = checked_number("foreground_fraction", foreground_fraction)
        if not 0 <= foreground_fraction <= 1:
            raise ZNormValueError(f"foreground_fraction is a share of the patches, in [0, 1]: {foreground_fraction}.")
        self.num_classes = checked_integer("num_classes", num_classes, minimum=1, bits=8)
        if self.num_classes > IGNORED:
            raise ZNormValueError(f"num_classes must be at most {IGNORED}, got {num_classes}.")
        values = max(self.num_classes, 2)
        if ignore_index is not None and 0 <= checked_integer("ignore_index", ignore_index) < values:
            raise ZNormValueError(
                f"ignore_index={ignore_index} is the number of a class (0 to {values - 1}): give voxels that do not "
                "count another value, such as 255."
            )
        self.ignore_index = ignore_index
        self.channel_files = checked_flag("channel_files", channel_files)
        self.patient_pattern = checked_pattern(patient_pattern)
        normalization = checked_choice("normalization", normalization, ("zscore", "zscore_nonzero", "none"))
        self._intensities = Intensities(normalization, _checked_window(intensity_range))
        self._values = MaskValues(values, ignore_index)
        self.root = checked_folder("root", root)
        self._cases: list[VolumeCase] = []
        self._counts: list[list[int]] = []
        self._masks: dict[str, NDArray[np.uint8]] = {}  # of volumes that are not decoded yet
        self._volumes: dict[str, Volume | StoredVolume] = {}
        self._axes: str | None = None  # of the images of the training, or of `root`

    @override
    def prepare_data(self) -> None:
        """Decode volumes that do not fit in memory. One process per machine runs this."""
        self.refuse_other_settings("num_classes", "ignore_index")
        function = None if self.trainer is None else self.trainer.state.fn
        stage = "fit" if function is None else _STAGES.get(function, "fit")
        if stage == "predict" and self.predict_root is not None:
            return
        cases = self._cases_of(stage)
        if not self._fit(cases):
            self._decode(cases)

    @override
    def setup(self, stage: str) -> None:
        """Find the cases, draw the sets, and decode those that the stage needs."""
        super().setup(stage)
        self.refuse_other_settings("num_classes", "ignore_index")
        if stage == "predict" and self.predict_root is not None:
            cases, faults = find_images(self.predict_root, self.channel_files)
            refuse(sorted(faults), self.predict_root)
            _refuse_other_axes(cases, self._axes)
            self.refuse_idle_processes(len(cases), "volume")
            self.predict_set = WholeVolumes(cases, self._intensities)
            return
        # Built to train alone: a checkpoint of a stranger may name any class.
        steps = built("train_transform", self.train_transform) if stage == "fit" else []
        self._decode(self._cases_of(stage))
        sets = {name: self._cases_of_set(name) for name in self._sets_of(stage)}
        for name, cases in sets.items():
            volumes = [self._volumes[case.name] for case in cases]
            if name != "train":
                setattr(self, f"{name}_set", WholeVolumes(cases, self._intensities, volumes))
                continue
            self.train_set = Patches(
                volumes,
                self.patch_size,
                self.patches_per_volume,
                self.foreground_fraction,
                padding=0 if self.ignore_index is None else IGNORED,
                transform=CaseTransforms("train_transform", steps, self._values.count, 1) if steps else None,
            )
        if stage == "predict":
            self.predict_set = self.test_set

    @override
    def state_dict(self) -> dict[str, Any]:
        """Return the sides that the images' axes point to, the lists of patients, and the seed of the orders."""
        return {"axes": self._axes, **super().state_dict()}

    @override
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Refuse a checkpoint of images whose axes point to other sides, or of the patients that would judge it."""
        super().load_state_dict(state_dict)
        axes = state_dict.get("axes", self._axes)
        cases = self._cases
        if self.trainer is not None and self.trainer.state.fn == TrainerFn.PREDICTING and self.predict_root is not None:
            assert isinstance(self.predict_set, WholeVolumes)
            cases = self.predict_set.cases
        _refuse_other_axes(cases, axes)
        self._axes = axes

    @override
    def class_frequencies(self) -> list[float]:
        """Return the share of each class among the voxels of the training labels that count, after ``setup("fit")``.

        Returns:
            One share with ``num_classes=1``, that of the marked voxels, and otherwise ``num_classes`` of them.

        Raises:
            RuntimeError: Before ``setup("fit")``.
            ValueError: If no voxel counts.
        """
        self.require_train_set()
        train = {case.name for case in self._cases_of_set("train")}
        rows = [counts for case, counts in zip(self._cases, self._counts, strict=True) if case.name in train]
        total = np.sum(rows, axis=0, dtype=np.float64)
        if not total.any():
            raise ZNormValueError(f"No voxel of the {len(rows)} training labels counts: all are {self.ignore_index}.")
        shares: list[float] = (total / total.sum()).tolist()
        return shares[1:] if self.num_classes == 1 else shares

    @override
    def sampler(self, dataset: Dataset[Any], num_replicas: int = 1, rank: int = 0, seed: int = 0) -> SeededSampler:
        """Return the sampler of the training patches, which gives a seed with each of them."""
        return SeededSampler(dataset, num_replicas, rank, seed)

    @override
    def val_dataloader(self) -> DataLoader[Any]:
        """Return the loader of whole volumes to validate on, one at a time."""
        return self.loader(self.val_set, shuffle=False, batch_size=1)

    @override
    def test_dataloader(self) -> DataLoader[Any]:
        """Return the loader of whole volumes to test on, one at a time."""
        return self.loader(self.test_set, shuffle=False, batch_size=1)

    @override
    def predict_dataloader(self) -> DataLoader[Any]:
        """Return the loader of whole volumes to predict for, one at a time."""
        return self.loader(self.predict_set, shuffle=False, batch_size=1)

    @override
    def on_after_batch_transfer(self, batch: Sequence[Any], dataloader_idx: int) -> Any:
        """Convert images and masks to the types that the network and the loss take, on the device."""
        images, *others = batch
        if isinstance(others[0], Tensor):
            # Class numbers stay integers, because half precision does not hold all of them.
            masks = others[0].float() if self.num_classes == 1 else others[0].long()
            if self.ignore_index not in (None, IGNORED):
                masks = masks.masked_fill(masks == IGNORED, float(self.ignore_index or 0))
            others[0] = self.in_precision(masks) if self.num_classes == 1 else masks
        return self.in_precision(images), *others

    @override
    def normalized(self, images: Tensor) -> Tensor:
        """Return what the network sees of volumes as their files have them, in the precision of its input.

        Batches of the loaders are normalized already.

        Args:
            images: Voxels of any type of numbers, shape ``(N, C, X, Y, Z)``, whose axes point to the sides to which
                those of the training point. They stay as they are.

        Returns:
            Same shape.

        Example:
            >>> voxels = torch.tensor([-500, 40, 60, 900]).reshape(1, 1, 1, 2, 2)
            >>> VolumeDataModule(intensity_range=[-160, 240], normalization="none").normalized(voxels).flatten()
            tensor([0.0000, 0.5000, 0.5500, 1.0000])
        """
        return self.in_precision(torch.stack([self._intensities.scaled(image) for image in images.float()]))

    def _sets_of(self, stage: str) -> tuple[str, ...]:
        return _SETS.get(stage, ("test",))

    def _cases_of_set(self, name: str) -> list[VolumeCase]:
        patients = {*self.patients[name]}
        return [case for case in self._cases if case.patient in patients]

    def _cases_of(self, stage: str) -> list[VolumeCase]:
        """Return the cases that a stage needs. The first call reads all labels, and draws the sets."""
        if not self.patients:
            self._cases, self._counts = self._find()
            _refuse_other_axes(self._cases, self._axes)
            self._axes = self._cases[0].axes
            shares: dict[str, list[float]] = {}
            for case, counts in zip(self._cases, self._counts, strict=True):
                shares.setdefault(case.patient, []).append(sum(counts[1:]) / (sum(counts) or 1))
            self.draw_patients({patient: sum(values) / len(values) for patient, values in shares.items()})
        cases = [case for name in self._sets_of(stage) for case in self._cases_of_set(name)]
        if stage == "predict":
            self.refuse_idle_processes(len(cases), "volume")
        return cases

    def _find(self) -> tuple[list[VolumeCase], list[list[int]]]:
        """Return all cases, and how many voxels of each have each value."""
        cases, faults = find_cases(self.root, self.channel_files, self.patient_pattern)
        counts: list[list[int]] = [[]] * len(cases)
        are_kept = sum(map(bytes_of, cases)) <= self.max_memory

        def read_label(index: int) -> list[str]:
            if cases[index].label is not None:
                try:
                    mask = read_mask(cases[index], self._values)
                except BadFileError as fault:
                    return [str(fault)]
                counts[index] = count_values(mask, self._values)
                if are_kept:
                    self._masks[cases[index].name] = mask
            return []

        threads = self._threads(cases)
        faults += read_all(read_label, len(cases), "labels", threads)
        if faults:  # name what is wrong with the images at the same time
            faults += read_all(lambda index: faults_of_images(cases[index]), len(cases), "images", threads)
        refuse(sorted({*faults}), self.root)
        return cases, counts

    def _fit(self, cases: Sequence[VolumeCase]) -> bool:
        """Return whether cases fit into memory, beside those that are there already."""
        held = {name for name, volume in self._volumes.items() if isinstance(volume, Volume)}
        held |= {case.name for case in cases}
        return sum(bytes_of(case) for case in self._cases if case.name in held) <= self.max_memory

    def _threads(self, cases: Sequence[VolumeCase]) -> int:
        """Return how many cases may be read at once."""
        largest = max((bytes_of(case) for case in cases), default=1)
        return max(1, int(self.max_memory / (_PEAK * largest)))

    def _decode(self, cases: Sequence[VolumeCase]) -> None:
        """Decode the cases that are not decoded yet."""
        new = [case for case in cases if case.name not in self._volumes]
        in_memory = self._fit(new)

        def decode(index: int) -> list[str]:
            case = new[index]
            try:
                if in_memory:
                    image, mask = read_image(case, self._intensities), self._masks.pop(case.name, None)
                    volume: Volume | StoredVolume = Volume(
                        image, read_mask(case, self._values) if mask is None else mask
                    )
                else:
                    volume = stored(case, self._intensities, self._values, self.cache)
            except BadFileError as fault:
                return [str(fault)]
            self._volumes[case.name] = volume
            return []

        if new:
            refuse(read_all(decode, len(new), "volumes", self._threads(new)), self.root)


class Patches(Dataset[tuple[Tensor, Tensor]]):
    """Random patches of volumes.

    Each volume has ``per_volume`` numbers. An index of this dataset is a pair of such a number and a seed, from which
    the patch follows; a number alone always gives the same patch.

    Args:
        volumes: The volumes.
        size: Voxels of a patch along each axis.
        per_volume: Patches of each volume.
        foreground_fraction: Share of the patches that are centred on a voxel of a class.
        padding: What fills up a mask where the volume is smaller than the patch. The image is filled up with 0.
        transform: Changes images and masks, given seeds.

    Example:
        >>> volume = Volume(np.ones((1, 8, 8, 4), np.float32), np.zeros((1, 8, 8, 4), np.uint8))
        >>> patches = Patches([volume], size=(4, 4, 6), per_volume=3, foreground_fraction=0.5)
        >>> image, mask = patches[2, 12345]
        >>> len(patches), image.shape, mask.shape
        (3, torch.Size([1, 4, 4, 6]), torch.Size([1, 4, 4, 6]))
    """

    def __init__(
        self,
        volumes: Sequence[Volume | StoredVolume],
        size: Sequence[int],
        per_volume: int,
        foreground_fraction: float,
        padding: int = 0,
        transform: CaseTransforms | None = None,
    ) -> None:
        self.volumes = list(volumes)
        self.size = tuple(size)
        self.per_volume = per_volume
        self.foreground_fraction = foreground_fraction
        self.padding = padding
        self.transform = transform
        self._centres = [_centres(volume.load().mask) for volume in self.volumes] if foreground_fraction else []

    def __len__(self) -> int:
        return len(self.volumes) * self.per_volume

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Tensor, Tensor]:
        """Return a patch of shape ``(C, *size)``, float32, and its mask of shape ``(1, *size)``, uint8."""
        index, seed = index if isinstance(index, tuple) else (index, index)
        number = index // self.per_volume
        volume = self.volumes[number].load()
        rng = np.random.default_rng(seed)
        start = self._start(number, volume.mask.shape[1:], rng)
        image = torch.from_numpy(self._cut(volume.image, start, 0))
        mask = torch.from_numpy(self._cut(volume.mask, start, self.padding))
        if self.transform is not None:
            images, masks = self.transform(image[None], mask[None], [int(rng.integers(2**63))])
            image, mask = images[0], masks[0]
            if image.shape[1:] != self.size:
                raise ZNormValueError(
                    f"train_transform made a patch of {tuple(image.shape[1:])} voxels, and patch_size is {self.size}: "
                    "leave out what crops or resizes, or let it end with a crop to patch_size."
                )
        return image, mask

    def _start(self, number: int, shape: tuple[int, ...], rng: np.random.Generator) -> list[int]:
        """Draw where the patch of a volume begins; below 0 where the volume is smaller, so that it is in the middle."""
        # All numbers are drawn for each patch, so that patches elsewhere do not depend on what has classes.
        is_centred = rng.random() < self.foreground_fraction
        anywhere = [
            int(rng.integers(axis - size + 1)) if axis >= size else (axis - size) // 2
            for axis, size in zip(shape, self.size, strict=True)
        ]
        if not is_centred or not self._centres[number]:
            return anywhere
        of_class = self._centres[number][rng.integers(len(self._centres[number]))]
        centre = np.unravel_index(of_class[rng.integers(len(of_class))], shape)
        return [
            min(max(int(middle) - size // 2, 0), axis - size) if axis >= size else start
            for middle, size, axis, start in zip(centre, self.size, shape, anywhere, strict=True)
        ]

    def _cut(self, volume: NDArray[Any], start: Sequence[int], padding: int) -> NDArray[Any]:
        patch = np.full((len(volume), *self.size), padding, volume.dtype)
        source, target = [slice(None)], [slice(None)]
        for first, size, axis in zip(start, self.size, volume.shape[1:], strict=True):
            source.append(slice(max(first, 0), min(first + size, axis)))
            target.append(slice(max(-first, 0), max(-first, 0) + min(size, axis)))
        patch[tuple(target)] = volume[tuple(source)]
        return patch


class WholeVolumes(Dataset[Any]):
    """Whole volumes, with what is known about them; a batch is a single one.

    Args:
        cases: Whose volumes they are.
        intensities: How those that are not decoded are scaled when they are read.
        volumes: The decoded volumes. Without them, the images are read one by one, and there are no masks.
    """

    def __init__(
        self,
        cases: Sequence[VolumeCase],
        intensities: Intensities,
        volumes: Sequence[Volume | StoredVolume] | None = None,
    ) -> None:
        self.cases = list(cases)
        self.intensities = intensities
        self.volumes = volumes

    def __len__(self) -> int:
        return len(self.cases)

    def __getitem__(self, index: int) -> tuple[Any, ...]:
        """Return an image, ``(1, C, X, Y, Z)``, its mask, ``(1, 1, X, Y, Z)``, if it is known, and the case."""
        case = self.cases[index]
        said: dict[str, Any] = {"name": [case.name], "affine": np.array([case.affine], dtype=np.float64)}
        if self.volumes is None:
            try:
                image = read_image(case, self.intensities)
            except BadFileError as fault:
                raise ZNormRuntimeError(f"{fault}: convert, replace or remove it.") from fault
            return torch.from_numpy(image[None]), said
        volume = self.volumes[index].load()
        # Copies: what is in the cache must stay as it is.
        images, masks = (torch.from_numpy(np.array(part[None])) for part in (volume.image, volume.mask))
        return images, masks, {"name": said["name"], "patient": [case.patient], "affine": said["affine"]}

    def collate(self, batch: list[tuple[Any, ...]]) -> tuple[Any, ...]:
        """Return the single item of a batch. The affine matrix stays an array: Lightning would convert a tensor."""
        (item,) = batch
        return item


def _centres(mask: NDArray[np.uint8]) -> list[Voxels]:
    """Return, for each class that a mask has besides the background, numbers of some of its voxels."""
    flat = mask.ravel()
    marked = np.flatnonzero((flat != 0) & (flat != IGNORED))
    rng = np.random.default_rng(0)  # the same voxels in each process and run
    found = []
    for number in np.unique(flat[marked]):
        voxels = marked[flat[marked] == number]
        if len(voxels) > _CENTRES:
            voxels = np.sort(rng.choice(voxels, _CENTRES, replace=False))
        found.append(voxels)
    return found


def _refuse_other_axes(cases: Sequence[VolumeCase], trained: str | None) -> None:
    """Refuse cases, all with the same axes, of which a network that was trained on other axes would mix up sides."""
    if trained is not None and cases and (axes := cases[0].axes) != trained:
        raise ZNormValueError(
            f"The axes of {len(cases)} images ({some(case.name for case in cases)}) point towards {axes}, and the "
            f"network was trained on axes towards {trained}: {REORIENT}, as those of the training are."
        )


def _checked_size(patch_size: Any) -> tuple[int, ...]:
    if not isinstance(patch_size, Sequence) or isinstance(patch_size, str) or len(patch_size) != 3:
        raise ZNormTypeError(
            f"patch_size must be three numbers of voxels, such as [32, 96, 96], got {shown(patch_size)}."
        )
    return tuple(checked_integer("patch_size", size, minimum=1, bits=31) for size in patch_size)


def _checked_window(intensity_range: Any) -> tuple[float, float] | None:
    if intensity_range is None:
        return None
    if not isinstance(intensity_range, Sequence) or isinstance(intensity_range, str) or len(intensity_range) != 2:
        raise ZNormTypeError(f"intensity_range must be two numbers, such as [-160, 240], got {shown(intensity_range)}.")
    low, high = (float(checked_number("intensity_range", each, finite=True)) for each in intensity_range)
    if low >= high:
        raise ZNormValueError(f"intensity_range must begin with the lower number, got {shown(intensity_range)}.")
    return low, high
