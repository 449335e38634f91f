"""Callback that writes what a segmentation predicts: masks as files, and their scores."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import Any, Literal

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import BasePredictionWriter
from lightning.pytorch.utilities import rank_zero_warn
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch import Tensor
from typing_extensions import override

from lightning_znorm.arguments import checked_choice, checked_flag
from lightning_znorm.batches import Cases, Matrix, cases_of, has_targets, images_and_targets
from lightning_znorm.callbacks.drawing import is_picture
from lightning_znorm.callbacks.folders import run_folder
from lightning_znorm.callbacks.representation import represented
from lightning_znorm.callbacks.scores import CASE_COLUMNS, Row, ScoreTable, case_scores, names_of_classes, scores_file
from lightning_znorm.errors import ZNormTypeError, ZNormValueError
from lightning_znorm.requirements import require

_NAME_TYPES = (str, os.PathLike, NoneType)
_COLUMNS = ("image", "mask", "class", "pixels", "fraction", "max_probability", "mean_probability")
_SUFFIXES = {"png": ".png", "tif": ".tif", "nifti": ".nii.gz"}
_IDENTITY: Matrix = tuple(tuple(float(row == column) for column in range(4)) for row in range(4))
_SCANNER = 1  # NIfTI's code of an affine matrix that leads to the scanner's coordinates


class MaskWriter(BasePredictionWriter):
    """Write what a :class:`~lightning_znorm.tasks.SegmentationTask` predicts: a mask for each image, and their scores.

    Each mask is an image file of 0 and 255, named like its image with ``_mask`` at the end (``_mask_0``, ``_mask_1``
    and so on, if there are several classes). In NIfTI, masks are 0 and 1, and have the affine matrix that the batch
    names for the image.

    With ``label_map``, one file for each image holds class numbers in place of these masks. With softmax, a pixel's
    number is that of its class, and 0 is the background. With sigmoid, it is one more than that of its class, and 0
    means that the pixel belongs to none; of several classes, the most probable one counts.

    Images may have been resized. If a dictionary in the batch says the ``size`` of their files (height and width, shape
    ``(N, 2)``), as the data modules with ``image_size`` do, masks are written in that size. Each pixel gets the class
    of the nearest one, so a mask lies over its image.

    ``scores.csv`` has a row for each mask, or for each class of a label map in the order of their numbers: image, mask,
    class (as the module's ``class_names`` name it, softmax's first one ``background``; its number if there are no
    names), number and share of marked pixels of the written mask, the largest probability in the image and the mean
    probability over the marked pixels (empty if there are none). Probabilities and scores are in the size that the
    network saw. Overlapping classes are counted as they are marked, before a label map chooses one of them. Further
    columns appear where a batch says more:

    - ``patient`` and ``slice``.
    - If the batch holds true masks: the scores that :class:`~lightning_znorm.ScoreWriter` writes in a test, of the
      module's own metrics and ``dice``, ``tversky``, ``hausdorff``, ``hd95`` (distances in pixels); and
      ``predicted_pixels`` and ``true_pixels``, the sizes of the masks that are scored. They are empty for softmax's
      background, and a score is empty where a mask is left out of the mean, such as those that are empty in prediction
      and truth. Pixels of the module's ``ignore_index`` do not count.
    - If it also says the spacing of its images: ``hausdorff_mm`` and ``hd95_mm``, in the spacing's unit.

    With several processes, each writes the masks of its own images, and ``scores-RANK.csv``.

    Batches begin with images, followed by their paths or names, or by true masks and a dictionary with ``name`` (see
    :mod:`lightning_znorm.batches`). If something other than names follows the images, such as masks or metadata, the
    images are numbered.

    Args:
        dirpath: Folder for the files; by default ``masks`` beside the logs. It must be new or empty, because no file is
            overwritten; pictures of ``MaskOverlay`` may be in it.
        format: Type of the files, ``"png"``, ``"tif"`` or ``"nifti"`` (``.nii.gz``; needs nibabel). The axes of a NIfTI
            file are those of the tensor, so a volume that was read in the order of its file is written in that order.
            An affine matrix from a NIfTI file is written exactly; another one is rounded to float32, as NIfTI has it.
        label_map: Whether to write one file with class numbers for each image, instead of a mask for each class.

    Raises:
        ValueError: If the format is another one. During prediction, if the probabilities of an image hold NaN, or if
            its name is empty.
        TypeError: If ``label_map`` is neither ``True`` nor ``False``.
        ImportError: If the package that writes the format is missing: nibabel or Pillow.
        MisconfigurationException: Before the first prediction, if the folder is not empty, or if the module has no
            method ``marked``. At the first volume, if the format is ``"png"``.

    Example:
        >>> from lightning_znorm import MaskWriter
        >>> writer = MaskWriter(format="nifti", label_map=True)
    """

    def __init__(
        self,
        dirpath: str | Path | None = None,
        format: Literal["png", "tif", "nifti"] = "png",
        label_map: bool = False,
    ) -> None:
        super().__init__(write_interval="batch")
        self.dirpath = None if dirpath is None else Path(dirpath).expanduser()
        self.format = checked_choice("format", format, ("png", "tif", "nifti"))
        self.label_map = checked_flag("label_map", label_map)
        require(f"MaskWriter(format={self.format!r})", "nibabel" if self.format == "nifti" else "PIL")
        self._folder = Path()
        self._numbered = 0
        self._table: ScoreTable | None = None
        self._warned = False

    def __repr__(self) -> str:
        return represented(self, MaskWriter, {name: name for name in ("dirpath", "format", "label_map")})

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
        if self._folder.is_dir() and not all(is_picture(path) for path in self._folder.iterdir()):
            raise MisconfigurationException(
                f"MaskWriter overwrites nothing, and {self._folder} is not empty: give another dirpath, or empty it"
            )
        trainer.strategy.barrier()  # so that no process writes into the folder before all have seen it empty
        self._numbered = trainer.global_rank
        self._table = ScoreTable(self._folder / scores_file(trainer), _COLUMNS)

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
        module: Any = pl_module
        marked = module.marked(prediction)
        cases = _cases(batch, len(marked))
        names = _names(batch) or cases.name
        if marked.ndim == 5 and self.format == "png":
            raise MisconfigurationException(
                "MaskWriter writes volumes as TIFF files of several pages: set format='tif' (or 'nifti')"
            )
        masks, probabilities = marked.cpu(), prediction.cpu()
        for index in probabilities.flatten(1).isnan().any(dim=1).nonzero().flatten().tolist():
            image = f"image {index} of batch {batch_idx}" if names[index] is None else names[index]
            raise ZNormValueError(
                f"MaskWriter was given NaN for {image}, which is above no threshold: look for NaN or inf in the image "
                f"and in the weights. The masks before it are in {self._folder}"
            )
        for index, name in enumerate(names):
            if name is not None and not Path(name).name:
                raise ZNormValueError(
                    f"MaskWriter was given {name!r} as the name of image {index} of batch {batch_idx}, which is not "
                    "a file name: name every image, or none, so that they are numbered. The masks before it are in "
                    f"{self._folder}"
                )
        scores, sizes = _scores(module, prediction, batch, cases), _sizes(batch, masks)
        class_names = _class_names(module, marked.shape[1])
        rows: list[dict[str, object]] = []
        for index, (own_masks, own_probabilities) in enumerate(zip(masks, probabilities, strict=True)):
            ends = self._ends(len(own_masks))
            image, base = self._named(trainer, names[index], ends[0])
            files = [base.with_name(base.name + end) for end in ends]
            if self.label_map:
                arrays = [_label_map(own_masks, own_probabilities, _is_softmax(module))]
            else:
                arrays = list(own_masks)
            arrays = [_of_size(array, sizes[index]) for array in arrays]
            for array, file in zip(arrays, files, strict=True):
                self._write(array, cases.affine[index], self._folder / file)
            origin = {"patient": cases.patient[index], "slice": cases.slice[index]}
            for number, (mask, probability) in enumerate(zip(own_masks, own_probabilities, strict=True)):
                written_mask = _of_size(mask, sizes[index])
                pixels = int(written_mask.sum())
                rows.append(
                    {
                        "image": image,
                        "mask": files[0 if self.label_map else number].as_posix(),
                        "class": class_names[number],
                        "pixels": pixels,
                        "fraction": f"{pixels / written_mask.numel():.6f}",
                        "max_probability": f"{probability.max():.6f}",
                        "mean_probability": f"{probability[mask].double().mean():.6f}" if mask.any() else "",
                        **{column: value for column, value in origin.items() if value is not None},
                        **scores[index][number],
                    }
                )
        if self._table is not None:
            self._table.write(rows)

    @override
    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._table = None

    def _ends(self, classes: int) -> list[str]:
        """Return the ends of the names of an image's files."""
        single = classes == 1 or self.label_map
        numbers = [""] if single else [f"_{number}" for number in range(classes)]
        return [f"_mask{number}{_SUFFIXES[self.format]}" for number in numbers]

    def _named(self, trainer: pl.Trainer, name: Any, end: str) -> tuple[str, Path]:
        """Return an image's name, and the beginning of its masks' paths in the folder, which no other image has."""
        if name is None:
            name = f"{self._numbered:06d}"
            self._numbered += trainer.world_size
        path = Path(name)
        # Relative paths keep their folders, so that images of one name in several folders stay apart.
        path = Path(path.name) if path.is_absolute() or ".." in path.parts else path
        stem = path.stem.removesuffix(".nii") if path.suffix == ".gz" else path.stem
        base, count = path.with_name(stem), 1
        while not _claim(self._folder / base.with_name(base.name + end)):  # such as for a.tif beside a.png
            count += 1
            base = path.with_name(f"{stem}-{count}")
        return str(name), base

    def _write(self, mask: Tensor, affine: Matrix | None, path: Path) -> None:
        if self.format != "nifti":
            _write_pages(mask, path)
            return
        if affine is None and not self._warned:
            self._warned = True
            rank_zero_warn(
                f"A batch says no affine matrix for {path.name}, so it is written with the identity matrix: "
                "let a dictionary with 'affine' follow the images, as VolumeDataModule does."
            )
        _write_nifti(mask, affine or _IDENTITY, path)


def _cases(batch: Any, count: int) -> Cases:
    """Return what a batch says about its images; nothing, if it does not begin with images."""
    try:
        cases = cases_of(batch)
    except ZNormTypeError:  # another module's batches may be anything
        cases = None
    nothing: list[Any] = [None] * count
    return (
        cases if cases is not None and len(cases.name) == count else Cases(nothing, nothing, nothing, nothing, nothing)
    )


def _sizes(batch: Any, masks: Tensor) -> list[tuple[int, ...] | None]:
    """Return the sizes of the images before they were resized, where a dictionary in the batch says them."""
    count, axes = len(masks), masks.ndim - 2
    parts = [batch] if isinstance(batch, Mapping) else batch if isinstance(batch, (list, tuple)) else []
    sizes: Any = next((part["size"] for part in parts if isinstance(part, Mapping) and "size" in part), None)
    if hasattr(sizes, "tolist"):  # an array or a tensor
        sizes = sizes.tolist()
    if not isinstance(sizes, (list, tuple)) or len(sizes) != count:
        return [None] * count
    found = [tuple(size) if isinstance(size, (list, tuple)) else () for size in sizes]
    is_size = [len(size) == axes and all(isinstance(each, int) and each > 0 for each in size) for size in found]
    return [size if fits else None for size, fits in zip(found, is_size, strict=True)]


def _of_size(mask: Tensor, size: tuple[int, ...] | None) -> Tensor:
    """Return a mask, or a label map, in another size: each pixel gets the class of the nearest one.

    As `lightning_znorm.data.resizing.resized_mask` makes masks smaller, with whole numbers.
    """
    if size is None or size == tuple(mask.shape):
        return mask
    for axis, (old, new) in enumerate(zip(mask.shape, size, strict=True)):
        mask = mask.index_select(axis, (2 * torch.arange(new) + 1) * old // (2 * new))
    return mask


def _is_softmax(module: Any) -> bool:
    return getattr(module, "activation", None) == "softmax"


def _class_names(module: Any, count: int) -> list[str]:
    """Return what the table calls the channels of the masks: names, or their numbers from 0."""
    names = getattr(module, "class_names", None)
    if not _is_softmax(module):
        return names_of_classes(names, count)
    numbers = names_of_classes(None, count)
    scored = names_of_classes(names, count - 1)
    unnamed = scored in (numbers[1:], numbers[:-1])
    return numbers if unnamed else ["background", *scored]


def _scores(module: Any, prediction: Tensor, batch: Any, cases: Cases) -> list[list[Row]]:
    """Return the scores of each class of each image: empty where the truth is not known."""
    count, classes = prediction.shape[:2]
    scores: list[list[Row]] = [[{} for _ in range(classes)] for _ in range(count)]
    if not has_targets(batch) or not hasattr(module, "scored"):
        return scores
    _, masks = images_and_targets(batch, "masks")
    channels = 1 if _is_softmax(module) else classes
    if masks.shape != (count, channels, *prediction.shape[2:]):
        return scores  # labels of another kind
    preds, target = module.scored(prediction, masks.to(prediction.device))
    first = classes - target.shape[1]
    # Those that a test with the same metrics writes.
    logged = module.mask_scores(preds, target, cases) if hasattr(module, "mask_scores") else None
    for number, row in enumerate(case_scores(preds, target, cases, logged)):
        index, scored_class = divmod(number, target.shape[1])
        scores[index][first + scored_class] = {key: row[key] for key in row if key not in CASE_COLUMNS}
    return scores


def _names(batch: Any) -> Sequence[str | os.PathLike[str] | None] | None:
    """Return the names that follow the images in a batch, or None if something else follows."""
    follows: Any = batch[1] if isinstance(batch, Sequence) and len(batch) > 1 else None
    if hasattr(follows, "tolist") and not isinstance(follows, Tensor):  # of NumPy
        follows = follows.tolist()
    are_names = isinstance(follows, (list, tuple)) and all(isinstance(name, _NAME_TYPES) for name in follows)
    return follows if are_names else None


def _claim(path: Path) -> bool:
    """Make an empty file, and return whether it is new: another process may have made it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        path.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


def _label_map(masks: Tensor, probabilities: Tensor, softmax: bool) -> Tensor:
    """Return the class number of each pixel, from masks and probabilities of shape ``(K, ...)``."""
    if softmax:
        return masks.long().argmax(dim=0)
    most_probable = torch.where(masks, probabilities, -1.0).argmax(dim=0)
    return torch.where(masks.any(dim=0), most_probable + 1, 0)


def _pixels(mask: Tensor, marked: int) -> Any:
    """Return a mask as an array of 0 and ``marked``, or class numbers as an array, in the smallest type."""
    array: Any = mask.numpy()
    if mask.dtype == torch.bool:
        return array.astype("uint8") * marked
    return array.astype("uint8" if array.max() < 256 else "uint16")


def _write_pages(mask: Tensor, path: Path) -> None:
    """Write a mask as an image of 0 and 255, and a volume as a TIFF file of several pages. Class numbers stay."""
    from PIL import Image

    array = _pixels(mask, 255)
    pages = [Image.fromarray(page) for page in (array if mask.ndim == 3 else [array])]
    if len(pages) > 1:
        pages[0].save(path, save_all=True, append_images=pages[1:])
    else:
        pages[0].save(path)


def _write_nifti(mask: Tensor, affine: Matrix, path: Path) -> None:
    """Write a mask as a NIfTI file of 0 and 1, or class numbers, with an affine matrix."""
    nibabel = _nibabel()
    image = nibabel.Nifti1Image(_pixels(mask, 1), None)
    image.header.set_xyzt_units("mm")
    matrix = torch.tensor(affine, dtype=torch.float64).numpy()
    image.set_qform(matrix, code=_SCANNER)
    # Most files hold the matrix itself (sform), in float32. Where one holds a rotation (qform) only, its matrix is
    # computed in float64, and only the same rotation gives it back exactly.
    if image.header.get_qform().tolist() != matrix.tolist() or matrix.astype("float32").tolist() == matrix.tolist():
        image.set_sform(matrix, code=_SCANNER)
    nibabel.save(image, path)


def _nibabel() -> Any:  # not its module, whose functions have no types
    import nibabel

    return nibabel
