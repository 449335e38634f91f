"""Callback that draws chosen cases of a segmentation during validation and test: truth and prediction."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from typing_extensions import override

from lightning_znorm.batches import Cases, Matrix, cases_of, images_of
from lightning_znorm.callbacks.drawing import Case, grid, log_picture, picture_name
from lightning_znorm.callbacks.folders import run_folder
from lightning_znorm.callbacks.representation import represented
from lightning_znorm.callbacks.scores import masks_of, names_of_classes
from lightning_znorm.errors import ZNormValueError
from lightning_znorm.requirements import require


class MaskOverlay(Callback):
    """Draw chosen cases after each validation and test: image, true outline, predicted outline, Dice and Hausdorff.

    Each case is drawn three times: alone, with the true outline, and with the predicted outline (solid) and the true
    one (dashed). Its caption names patient and slice if the batch says them, else the image, else its number; of a long
    name the end. Several classes have several colours, with a legend of the module's ``class_names``.

    Of a volume, the plane with the largest true mask is drawn. If the batch says the ``affine`` matrix of the image
    (see :mod:`lightning_znorm.batches`), that is an axial plane: the volume is cut along the axis that is closest to
    the z axis of the scanner, and drawn as radiologists see it, anterior at the top and the patient's right at the
    image's left. The matrix leads to NIfTI's coordinates: x to the patient's right, y to anterior, z to superior.
    Voxels are not interpolated, so the plane of an oblique volume is oblique too. Without a matrix, the volume is cut
    along its first axis, and rows and columns are drawn as they are stored. If the spacing is known, from the matrix or
    as ``spacing``, images and volumes are drawn in their true proportions.

    The picture becomes a PNG file in ``masks`` beside the logs: ``val-epoch=N.png`` in training, ``val.png`` and
    ``test.png`` outside of training. It also goes to each logger of TensorBoard, Weights & Biases, MLflow and Comet.
    With several processes, rank 0 draws its own cases.

    It works with :class:`~lightning_znorm.tasks.SegmentationTask`, and with any module whose batches hold images (a
    tensor, a tuple or list that begins with them, or a dictionary with ``"image"``) and whose ``validation_step`` and
    ``test_step`` return a mapping with ``"preds"`` and ``"target"``: bool masks of each class, of shape ``(N, K, H,
    W)`` or ``(N, K, D, H, W)``.

    Source: the kind of picture is Figure 2 of Yun, "ZNorm: Z-Score Gradient Normalization", arXiv 2408.01215.

    Args:
        num_cases: Number of cases to draw. They are spread evenly over the cases whose true mask is not empty, because
            neighbours, such as the slices of one scan, look alike.
        cases: Numbers of the cases to draw instead, in the order of the loader, from 0. With several loaders the
            numbers continue from one to the next.
        every_n_epochs: In training, draw after the validation of every n-th epoch. Outside of training it always draws.

    Raises:
        ValueError: If ``num_cases`` or ``every_n_epochs`` is less than 1, or a case is negative. At the first batch, if
            the masks do not have the shape of the images.
        TypeError: At the first batch, if the module returns no masks, or the batch holds no images.
        ImportError: If Pillow or SciPy is missing.

    Example:
        >>> from lightning_znorm import MaskOverlay
        >>> overlay = MaskOverlay(num_cases=4, every_n_epochs=10)
    """

    def __init__(self, num_cases: int = 6, cases: Sequence[int] | None = None, every_n_epochs: int = 1) -> None:
        require(type(self).__name__, "PIL", "scipy")
        if num_cases < 1 or every_n_epochs < 1:
            raise ZNormValueError(
                f"num_cases and every_n_epochs must be at least 1, got {num_cases} and {every_n_epochs}: to draw "
                "nothing, leave the callback out"
            )
        if cases is not None and (not cases or min(cases) < 0):
            raise ZNormValueError(f"cases must hold numbers that are at least 0, got {list(cases)}")
        self.num_cases = num_cases
        self.cases = None if cases is None else set(cases)
        self.every_n_epochs = every_n_epochs
        self._folder = Path()
        self._begin()

    def __repr__(self) -> str:
        return represented(self, MaskOverlay, {name: name for name in ("num_cases", "cases", "every_n_epochs")})

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._folder = Path(run_folder(trainer)) / "masks"  # every process must call run_folder

    @override
    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin()

    @override
    def on_test_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._begin()

    @override
    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        due = (trainer.current_epoch + 1) % self.every_n_epochs == 0
        if not trainer.sanity_checking and (due or not _is_fitting(trainer)):
            self._collect(trainer, pl_module, outputs, batch)

    @override
    def on_test_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        self._collect(trainer, pl_module, outputs, batch)

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._draw(trainer, "val")

    @override
    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._draw(trainer, "test")

    def _begin(self) -> None:
        self._kept: list[Case] = []
        self._class_names: list[str] = []
        self._seen = 0
        # Of the cases whose true mask is not empty, every `_stride`-th is kept, and there were `_marked` so far.
        self._stride, self._marked = 1, 0

    def _collect(self, trainer: pl.Trainer, pl_module: pl.LightningModule, outputs: Any, batch: Any) -> None:
        """Keep the chosen cases of a batch."""
        if not trainer.is_global_zero:
            return
        images, cases = images_of(batch), cases_of(batch)
        preds, target = masks_of(outputs, len(images), "MaskOverlay draws what validation_step and test_step return")
        if images.shape[2:] != target.shape[2:]:
            raise ZNormValueError(
                f"MaskOverlay draws masks upon images of their size, and was given images of shape "
                f"{tuple(images.shape)} and masks of shape {tuple(target.shape)}: let the steps return masks in the "
                "size of the images"
            )
        count = target.shape[1]
        self._class_names = names_of_classes(getattr(pl_module, "class_names", None), count) if count > 1 else []
        first, self._seen = self._seen, self._seen + len(target)

        def keep(index: int) -> None:
            self._kept.append(_case(images[index], target[index], preds[index], cases, index, first + index))

        if self.cases is not None:
            for number in sorted(self.cases):
                if first <= number < self._seen:
                    keep(number - first)
            return
        for index in target.flatten(1).any(dim=1).nonzero().squeeze(1).tolist():
            if self._marked % self._stride == 0:
                keep(index)
            self._marked += 1
            # Their number is not known beforehand: whenever there are too many, every second one is dropped.
            if len(self._kept) == 2 * self.num_cases:
                self._kept, self._stride = self._kept[::2], 2 * self._stride

    def _drawn(self) -> list[Case]:
        """Return the kept cases that are drawn: one from the middle of each of ``num_cases`` equal parts."""
        count = len(self._kept)
        if self.cases is not None or count <= self.num_cases:
            return self._kept
        return [self._kept[(2 * part + 1) * count // (2 * self.num_cases)] for part in range(self.num_cases)]

    def _draw(self, trainer: pl.Trainer, stage: str) -> None:
        cases, class_names = self._drawn(), self._class_names
        self._begin()
        if not cases:
            return
        picture = grid(cases, class_names=class_names)
        self._folder.mkdir(parents=True, exist_ok=True)
        # Outside of training, the epoch of the checkpoint is not known.
        epoch = trainer.current_epoch if _is_fitting(trainer) else None
        picture.save(self._folder / picture_name(stage, epoch))
        log_picture(trainer, f"{stage}/masks", picture)


def _is_fitting(trainer: pl.Trainer) -> bool:
    return trainer.state.fn == TrainerFn.FITTING


def _case(image: Tensor, truth: Tensor, preds: Tensor, cases: Cases, index: int, number: int) -> Case:
    # Imported here, because they load torchmetrics, which the gradient callbacks do not need.
    from lightning_znorm.metrics import DiceScore, HausdorffDistance

    if not truth.any() and not preds.any():
        scores = "both empty"
    else:
        dice, hausdorff = (
            metric.to(truth.device)(preds.unsqueeze(0), truth.unsqueeze(0)).item()
            for metric in (DiceScore(), HausdorffDistance())
        )
        scores = f"Dice {dice:.3f}   Hausdorff {hausdorff:.1f} px"
    plane, steps = None, cases.spacing[index]
    if truth.ndim == 4:
        cut = _cut(cases.affine[index])
        size = truth.sum(dim=(0, 1 + cut.rows, 1 + cut.columns))
        depth = int(size.argmax())
        image, truth, preds = (cut.plane(part, depth) for part in (image, truth, preds))
        plane = f"{cut.name} {depth}"
        steps = None if steps is None else (steps[cut.rows], steps[cut.columns])
    known = steps is not None and len(steps) == 2 and all(0 < step < math.inf for step in steps)
    spacing = (steps[0], steps[1]) if steps is not None and known else (1.0, 1.0)
    # Copies: a view would keep its whole batch.
    image, truth, preds = (part.to("cpu", copy=True) for part in (image, truth, preds))
    title, path = _title(cases, index, number, plane)
    return Case(image, truth, preds, f"{title}   {scores}", path, spacing)


def _title(cases: Cases, index: int, number: int, plane: str | None) -> tuple[str, str]:
    """Return what an image is called, and the part of it that is a path, which may be long.

    It is called by patient and slice, or else by its name, or else by its number.
    """
    name, patient, number_of_slice = cases.name[index], cases.patient[index], cases.slice[index]
    parts = [patient, None if number_of_slice is None else f"slice {number_of_slice}"]
    path = name if name is not None and None in parts else ""
    if None in parts and name is None:
        parts.insert(1 if patient is not None else 0, f"case {number}")
    return "   ".join(part for part in [*parts, plane, path] if part), path


@dataclass(frozen=True)
class _Cut:
    """How a plane is cut out of a volume: numbers of its axes, from 0, and whether rows and columns are turned round.

    Args:
        name: What a caption calls the plane.
        depth: The axis that is cut.
        rows: The axis that runs from the top to the bottom of the picture.
        columns: The axis that runs from left to right.
        turned: Which of these two run the other way.
    """

    name: str = "plane"
    depth: int = 0
    rows: int = 1
    columns: int = 2
    turned: tuple[bool, bool] = (False, False)

    def plane(self, volume: Tensor, number: int) -> Tensor:
        """Return a plane of a volume of shape ``(C, D, H, W)``, with its rows and columns."""
        plane = volume.select(1 + self.depth, number)
        if self.rows > self.columns:
            plane = plane.transpose(1, 2)
        return plane.flip([axis for axis, turned in zip((1, 2), self.turned, strict=True) if turned])


def _cut(affine: Matrix | None) -> _Cut:
    """Return how the axial plane is cut out of a volume with an affine matrix, as radiologists see it."""
    if affine is None:
        return _Cut()
    lengths = [math.hypot(*(row[axis] for row in affine[:3])) for axis in range(3)]
    if not all(0 < length < math.inf for length in lengths):
        return _Cut()
    x, y, z = ([row[axis] / lengths[axis] for axis in range(3)] for row in affine[:3])
    depth = max(range(3), key=lambda axis: abs(z[axis]))
    first, second = (axis for axis in range(3) if axis != depth)
    rows, columns = max(((first, second), (second, first)), key=lambda axes: abs(y[axes[0]]) + abs(x[axes[1]]))
    # In NIfTI, x leads to the patient's right, which is the image's left, and y to anterior, which is its top.
    return _Cut("axial plane", depth, rows, columns, (y[rows] > 0, x[columns] > 0))
