"""Callbacks for segmentation: draw masks during validation and test, and write predicted masks as files."""

import csv
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TextIO

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BasePredictionWriter, Callback
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lightning_znorm.callbacks.drawing import Case, grid, log_picture
from lightning_znorm.callbacks.folders import run_folder
from lightning_znorm.errors import ZNormTypeError, ZNormValueError

_NAME_TYPES = (str, os.PathLike, NoneType)
_COLUMNS = ["image", "mask", "class", "pixels", "fraction", "max_probability", "mean_probability"]


class MaskOverlay(Callback):
    """Draw chosen cases after each validation and test: image, true outline, predicted outline, Dice and Hausdorff.

    The picture goes to each TensorBoard or Weights & Biases logger. Without such a logger it becomes a PNG file in
    ``masks`` beside the logs: ``val-epoch=N.png`` in training, ``val.png`` and ``test.png`` outside of training. With
    several processes, rank 0 draws its own cases. Of a volume, the slice with the largest true mask is drawn.

    It works with :class:`~lightning_znorm.tasks.SegmentationTask`, and with any module whose batches begin with the
    images and whose ``validation_step`` and ``test_step`` return a mapping with ``"preds"`` and ``"target"``: bool
    masks of each class, of shape ``(N, K, H, W)`` or ``(N, K, D, H, W)``.

    Source: the kind of picture is Figure 2 of Yun, "ZNorm: Z-Score Gradient Normalization", arXiv 2408.01215.

    Args:
        num_cases: Number of cases to draw. They are spread evenly over the cases whose true mask is not empty, because
            neighbours, such as the slices of one scan, look alike.
        cases: Numbers of the cases to draw instead, in the order of the loader, from 0. With several loaders the
            numbers continue from one to the next.
        every_n_epochs: In training, draw after the validation of every n-th epoch. Outside of training it always draws.

    Raises:
        ValueError: If ``num_cases`` or ``every_n_epochs`` is less than 1, or a case is negative.
        TypeError: During validation, if the module returns no masks, or a batch does not begin with images.

    Example:
        >>> from lightning_znorm import MaskOverlay
        >>> overlay = MaskOverlay(num_cases=4, every_n_epochs=10)
    """

    def __init__(self, num_cases: int = 6, cases: Sequence[int] | None = None, every_n_epochs: int = 1) -> None:
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
            self._collect(trainer, outputs, batch)

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
        self._collect(trainer, outputs, batch)

    @override
    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._draw(trainer, "val")

    @override
    def on_test_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._draw(trainer, "test")

    def _begin(self) -> None:
        self._kept: list[Case] = []
        self._seen = 0
        # Of the cases whose true mask is not empty, every `_stride`-th is kept, and there were `_marked` so far.
        self._stride, self._marked = 1, 0

    def _collect(self, trainer: pl.Trainer, outputs: Any, batch: Any) -> None:
        """Keep the chosen cases of a batch."""
        if not trainer.is_global_zero:
            return
        if not isinstance(outputs, Mapping) or not {"preds", "target"} <= outputs.keys():
            raise ZNormTypeError(
                "MaskOverlay draws what validation_step and test_step return, a mapping with 'preds' and 'target' "
                f"(masks of shape (N, K, H, W)), and was given {type(outputs).__name__}"
            )
        if not isinstance(batch, Sequence) or not batch or not isinstance(batch[0], Tensor):
            raise ZNormTypeError(
                "MaskOverlay draws the images that a batch begins with, and was given a batch that is a "
                f"{type(batch).__name__}: let the dataset or its collate_fn return a tuple or list, images first"
            )
        images, preds, target = batch[0], outputs["preds"], outputs["target"]
        first, self._seen = self._seen, self._seen + len(target)

        def keep(index: int) -> None:
            self._kept.append(_case(images[index], target[index], preds[index], first + index))

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
        cases = self._drawn()
        self._begin()
        if not cases:
            return
        name = f"{stage}/masks"
        picture = grid(cases)
        if not log_picture(trainer, name, picture):
            self._folder.mkdir(parents=True, exist_ok=True)
            # Outside of training, the epoch of the checkpoint is not known.
            epoch = f"-epoch={trainer.current_epoch}" if _is_fitting(trainer) else ""
            picture.save(self._folder / f"{stage}{epoch}.png")


class MaskWriter(BasePredictionWriter):
    """Write what a :class:`~lightning_znorm.tasks.SegmentationTask` predicts: a mask for each image, and their scores.

    Each mask is an image file of 0 and 255, named like its image with ``_mask`` at the end (``_mask_0``, ``_mask_1``
    and so on, if there are several classes). ``scores.csv`` has a row for each mask: image, mask, class, number and
    share of marked pixels, the largest probability in the image and the mean probability over the marked pixels (empty
    if there are none). With several processes, each writes the masks of its own images, and ``scores-RANK.csv``.

    Batches begin with images and their paths or names, as ``LGGDataModule(predict_root=...)`` makes them. If something
    other than names follows the images, such as masks or metadata, the images are numbered.

    Args:
        dirpath: Folder for the files; by default ``masks`` beside the logs. It must be new or empty, because no file is
            overwritten.
        format: Of the files, ``"png"`` or ``"tif"``.

    Raises:
        ValueError: If the format is another one. During prediction, if the probabilities of an image hold NaN, or if
            its name is empty.
        MisconfigurationException: Before the first prediction, if the folder is not empty, or if the module has no
            method ``marked``. At the first volume, if the format is ``"png"``.

    Example:
        >>> from lightning_znorm import MaskWriter
        >>> writer = MaskWriter(format="tif")
    """

    def __init__(self, dirpath: str | Path | None = None, format: Literal["png", "tif"] = "png") -> None:
        super().__init__(write_interval="batch")
        if format not in ("png", "tif"):
            raise ZNormValueError(f"format must be 'png' or 'tif', got {format!r}")
        self.dirpath = None if dirpath is None else Path(dirpath).expanduser()
        self.format = format
        self._folder = Path()
        self._numbered = 0

    @override
    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        if not hasattr(pl_module, "marked"):
            raise MisconfigurationException(
                f"MaskWriter writes the masks of a SegmentationTask, and {type(pl_module).__name__} has no method "
                "`marked` that turns probabilities into masks"
            )
        if self.dirpath is None:
            self._folder = Path(run_folder(trainer)) / "masks"
        else:
            self._folder = trainer.strategy.broadcast(self.dirpath)
        if self._folder.is_dir() and any(self._folder.iterdir()):
            raise MisconfigurationException(
                f"MaskWriter overwrites nothing, and {self._folder} is not empty: give another dirpath, or empty it"
            )
        trainer.strategy.barrier()  # so that no process writes into the folder before all have seen it empty
        self._folder.mkdir(parents=True, exist_ok=True)
        self._numbered = trainer.global_rank
        with _opened(self._scores(trainer), "w") as file:
            csv.writer(file).writerow(_COLUMNS)

    @override
    def write_on_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        prediction: Any,
        batch_indices: Sequence[int] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int,
    ) -> None:
        names = _names(batch)
        module: Any = pl_module
        masks = module.marked(prediction).cpu()
        if masks.ndim == 5 and self.format == "png":
            raise MisconfigurationException(
                "MaskWriter writes volumes as TIFF files of several pages: set format='tif'"
            )
        probabilities = prediction.cpu()
        for index in probabilities.flatten(1).isnan().any(dim=1).nonzero().flatten().tolist():
            image = f"image {index} of batch {batch_idx}" if names is None else names[index]
            raise ZNormValueError(
                f"MaskWriter was given NaN for {image}, which is above no threshold: look for NaN or inf in the image "
                f"and in the weights. The masks before it are in {self._folder}"
            )
        for index, name in enumerate([] if names is None else names):
            if name is not None and not Path(name).name:
                raise ZNormValueError(
                    f"MaskWriter was given {name!r} as the name of image {index} of batch {batch_idx}, which is not "
                    "a file name: name every image, or none, so that they are numbered. The masks before it are in "
                    f"{self._folder}"
                )
        rows = []
        for index in range(len(masks)):
            numbers = [f"_{number}" for number in range(len(masks[index]))] if len(masks[index]) > 1 else [""]
            ends = [f"_mask{number}.{self.format}" for number in numbers]
            image, base = self._named(trainer, None if names is None else names[index], ends[0])
            for number, (mask, probability) in enumerate(zip(masks[index], probabilities[index], strict=True)):
                file = base.with_name(base.name + ends[number])
                _write(mask, self._folder / file)
                marked = int(mask.sum())
                rows.append(
                    [
                        image,
                        file.as_posix(),
                        number,
                        marked,
                        f"{marked / mask.numel():.6f}",
                        f"{probability.max():.6f}",
                        f"{probability[mask].double().mean():.6f}" if marked else "",
                    ]
                )
        with _opened(self._scores(trainer), "a") as file_of_scores:
            csv.writer(file_of_scores).writerows(rows)

    def _scores(self, trainer: pl.Trainer) -> Path:
        return self._folder / ("scores.csv" if trainer.world_size == 1 else f"scores-{trainer.global_rank}.csv")

    def _named(self, trainer: pl.Trainer, name: Any, end: str) -> tuple[str, Path]:
        """Return an image's name, and the beginning of its masks' paths in the folder, which no other image has."""
        if name is None:
            name = f"{self._numbered:06d}"
            self._numbered += trainer.world_size
        path = Path(name)
        # Relative paths keep their folders, so that images of one name in several folders stay apart.
        path = Path(path.name) if path.is_absolute() or ".." in path.parts else path
        base, count = path.with_suffix(""), 1
        while not _claim(self._folder / base.with_name(base.name + end)):  # such as for a.tif beside a.png
            count += 1
            base = path.with_name(f"{path.stem}-{count}")
        return str(name), base


def _is_fitting(trainer: pl.Trainer) -> bool:
    return trainer.state.fn == TrainerFn.FITTING


def _case(image: Tensor, truth: Tensor, preds: Tensor, number: int) -> Case:
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
    if truth.ndim == 4:
        depth = int(truth.sum(dim=(0, 2, 3)).argmax())
        image, truth, preds = image[:, depth], truth[:, depth], preds[:, depth]
    # Copies: a view would keep its whole batch.
    image, truth, preds = (part.to("cpu", copy=True) for part in (image, truth.bool(), preds.bool()))
    return Case(image, truth, preds, f"case {number}   {scores}")


def _names(batch: Any) -> Sequence[str | os.PathLike[str] | None] | None:
    """Return the names that follow the images in a batch, or None if something else follows."""
    follows: Any = batch[1] if isinstance(batch, Sequence) and len(batch) > 1 else None
    if hasattr(follows, "tolist") and not isinstance(follows, Tensor):  # of NumPy
        follows = follows.tolist()
    are_names = isinstance(follows, (list, tuple)) and all(isinstance(name, _NAME_TYPES) for name in follows)
    return follows if are_names else None


def _opened(path: Path, mode: Literal["a", "w"]) -> TextIO:
    """Open a CSV file. File names that are not UTF-8 are written byte by byte as they are."""
    return path.open(mode, newline="", encoding="utf-8", errors="surrogateescape")


def _claim(path: Path) -> bool:
    """Make an empty file, and return whether it is new: another process may have made it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _write(mask: Tensor, path: Path) -> None:
    """Write a mask as an image of 0 and 255, and a volume as a TIFF file of several pages."""
    from PIL import Image

    pages = [Image.fromarray(page.numpy().astype("uint8") * 255) for page in (mask if mask.ndim == 3 else [mask])]
    if len(pages) > 1:
        pages[0].save(path, save_all=True, append_images=pages[1:])
    else:
        pages[0].save(path)
