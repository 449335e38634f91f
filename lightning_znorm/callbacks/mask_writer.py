"""Predicted masks as image files."""

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal, TextIO

import lightning.pytorch as pl
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lightning_znorm.callbacks.folders import run_folder
from lightning_znorm.errors import ZNormValueError

_NAME = (str, os.PathLike, NoneType)
_COLUMNS = ["image", "mask", "class", "pixels", "fraction", "max_probability", "mean_probability"]


class MaskWriter(BasePredictionWriter):
    """Writes what a :class:`~lightning_znorm.tasks.SegmentationTask` predicts: a mask for each image, and their scores.

    Each mask is an image file of 0 and 255, named like its image with ``_mask`` at the end (``_mask_1`` and so on, if
    there are several classes). ``scores.csv`` has a row for each mask: image, mask, class, number and share of marked
    pixels, the largest probability in the image and the mean probability over the marked pixels (empty if there are
    none). Every process writes its own images, and ``scores-RANK.csv`` if there are several.

    Batches begin with images and their paths or names, as ``LGGDataModule(predict_root=...)`` makes them; images
    without names, such as those that masks or metadata follow, are numbered.

    Args:
        dirpath: Folder for the files; ``masks`` beside the logs by default. It must be new or empty: no file is
            overwritten.
        format: Of the files, ``"png"`` or ``"tif"``.

    Raises:
        ValueError: If the format is neither; during prediction, if the probabilities of an image hold NaN, or if its
            name is empty.
        MisconfigurationException: Before the first prediction, if the folder holds anything, or if the module does not
            turn probabilities into masks; at the first volume, if the format is ``"png"``.

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
        trainer.strategy.barrier()  # before any process fills it
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
                f"MaskWriter was given NaN for {image}, which no threshold finds: look for NaN or inf in the image and "
                f"in the weights. The masks before it are in {self._folder}"
            )
        for index, name in enumerate([] if names is None else names):
            if name is not None and not Path(name).name:
                raise ZNormValueError(
                    f"MaskWriter was given {name!r} as the name of image {index} of batch {batch_idx}, which is no "
                    "file's name: name every image, or none, and they are numbered. The masks before it are in "
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
        """An image's name, and what the paths of its masks begin with, in the folder: no two alike."""
        if name is None:
            name = f"{self._numbered:06d}"
            self._numbered += trainer.world_size
        path = Path(name)
        # Relative paths keep their folders, so that images of one name in several folders stay apart.
        path = Path(path.name) if path.is_absolute() or ".." in path.parts else path
        base, count = path.with_suffix(""), 1
        while not _claim(self._folder / base.with_name(base.name + end)):  # a.tif beside a.png
            count += 1
            base = path.with_name(f"{path.stem}-{count}")
        return str(name), base


def _names(batch: Any) -> Sequence[str | os.PathLike[str] | None] | None:
    """The names that follow the images in a batch, if it is names that follow."""
    follows: Any = batch[1] if isinstance(batch, Sequence) and len(batch) > 1 else None
    if hasattr(follows, "tolist") and not isinstance(follows, Tensor):  # NumPy's
        follows = follows.tolist()
    are_names = isinstance(follows, (list, tuple)) and all(isinstance(name, _NAME) for name in follows)
    return follows if are_names else None


def _opened(path: Path, mode: Literal["a", "w"]) -> TextIO:
    """Opens a CSV file. Names of files that are no UTF-8 are written byte by byte as they are."""
    return path.open(mode, newline="", encoding="utf-8", errors="surrogateescape")


def _claim(path: Path) -> bool:
    """Makes an empty file; False if there is one already, of this process or another."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _write(mask: Tensor, path: Path) -> None:
    """Writes a mask as an image of 0 and 255; a volume as a TIFF file of several pages."""
    from PIL import Image

    pages = [Image.fromarray(page.numpy().astype("uint8") * 255) for page in (mask if mask.ndim == 3 else [mask])]
    if len(pages) > 1:
        pages[0].save(path, save_all=True, append_images=pages[1:])
    else:
        pages[0].save(path)
