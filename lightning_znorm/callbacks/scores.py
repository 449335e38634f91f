"""Callback that writes the scores of each tested case as a table, and what other tables of scores are made of."""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TextIO, TypeAlias

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from torch import Tensor
from typing_extensions import override

from lightning_znorm.batches import Cases, cases_of, kind_of, plain
from lightning_znorm.callbacks.folders import run_folder
from lightning_znorm.callbacks.representation import represented
from lightning_znorm.errors import ZNormTypeError, ZNormValueError
from lightning_znorm.requirements import require

if TYPE_CHECKING:
    from lightning_znorm.metrics.mask_metric import MaskMetric

Row: TypeAlias = dict[str, str | int | float | None]

# What a line is about, the same in each table.
CASE_COLUMNS = ("image", "patient", "slice", "class")
_PIXELS = ("predicted_pixels", "true_pixels")


class ScoreWriter(Callback):
    """Write ``scores.csv`` beside the logs during a test: a line for each case, and for each class if there are more.

    The columns, in this order:

    - ``loader``, the number of the loader, if there are several.
    - ``image``, ``patient`` and ``slice`` as the batch names them. An image without a name gets its number in the order
      of the loaders, from 0, which :class:`~lightning_znorm.MaskOverlay` takes as one of its ``cases``.
    - ``class``, as the module's ``class_names`` name it, and its number if there are none.
    - every score that the module returns, under the name that it has in the logs.
    - those of ``dice``, ``tversky``, ``hausdorff`` and ``hd95`` that the module does not return. Distances are in
      pixels.
    - ``hausdorff_mm`` and ``hd95_mm``, if the batch says the spacing of each of its images: distances in its unit.
    - ``predicted_pixels`` and ``true_pixels``, the sizes of the masks.

    A cell is empty where nothing is known, and where a mask is left out of the mean that is logged, because it is empty
    in prediction and truth. So the mean of a column is the score that is logged.

    The table grows with each batch. A second test of the same run replaces it, and ``fast_dev_run`` writes none. With
    several processes, each writes its own cases into ``scores-RANK.csv``; Lightning then gives a few cases to two
    processes, so that all have as many.

    It works with :class:`~lightning_znorm.tasks.SegmentationTask`, and with any module whose batches begin with the
    images and whose ``test_step`` returns a mapping with ``"preds"`` and ``"target"``: bool masks of each class, of
    shape ``(N, K, H, W)`` or ``(N, K, D, H, W)``. The mapping may hold ``"scores"``: a mapping of names to tensors of
    shape ``(N, K)``, with NaN where a mask is left out.

    Raises:
        TypeError: At the first batch, if the module does not return these.
        ValueError: At the first batch, if their shapes differ, or a score has the name of another column.
        ImportError: If SciPy, which computes the distances, is missing.

    Example:
        >>> from lightning_znorm import ScoreWriter
        >>> writer = ScoreWriter()
    """

    def __init__(self) -> None:
        require(type(self).__name__, "scipy")  # for the distances
        self._table: ScoreTable | None = None
        self._several = False  # loaders
        self._seen = 0

    def __repr__(self) -> str:
        return represented(self, ScoreWriter, {})

    @override
    def on_test_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        folder = Path(run_folder(trainer))  # every process must call run_folder
        self._several = len(trainer.num_test_batches) > 1
        columns = ["loader", *CASE_COLUMNS] if self._several else CASE_COLUMNS
        typed: Any = trainer  # Lightning does not declare this attribute
        self._table = None if typed.fast_dev_run else ScoreTable(folder / scores_file(trainer), columns)
        self._seen = 0

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
        cases = cases_of(batch)
        preds, target = masks_of(outputs, len(cases.name), "ScoreWriter scores what test_step returns")
        # The processes take turns at the cases of a loader.
        numbers = [trainer.global_rank + (self._seen + index) * trainer.world_size for index in range(len(target))]
        self._seen += len(target)
        names = [str(number) if name is None else name for number, name in zip(numbers, cases.name, strict=True)]
        rows = case_scores(
            preds,
            target,
            replace(cases, name=list(names)),
            logged=outputs.get("scores"),
            class_names=getattr(pl_module, "class_names", None),
        )
        if self._table is not None:
            self._table.write([{"loader": dataloader_idx, **row} for row in rows] if self._several else rows)

    @override
    def on_test_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self._table = None


def case_scores(
    preds: Tensor,
    target: Tensor,
    cases: Cases,
    logged: Mapping[str, Tensor] | None = None,
    class_names: Sequence[str] | None = None,
) -> list[Row]:
    """Return the scores of predicted masks as lines of a table: for each case one, or one for each of its classes.

    Args:
        preds: Predicted masks, shape ``(N, K, H, W)`` or ``(N, K, D, H, W)``, bool.
        target: True masks, of the same shape and dtype.
        cases: What the batch says about its ``N`` images, as :func:`~lightning_znorm.batches.cases_of` returns it.
        logged: Scores that are known already, by name: tensors of shape ``(N, K)``, NaN where a mask is left out.
        class_names: Names of the ``K`` classes. If there are not as many, the classes are numbered from 0.

    Returns:
        ``N * K`` dictionaries with the same keys, in the order of the columns: ``image``, ``patient``, ``slice``,
        ``class``, the names in ``logged``, those of ``dice``, ``tversky``, ``hausdorff`` and ``hd95`` (in pixels) that
        ``logged`` does not hold, ``hausdorff_mm`` and ``hd95_mm`` if each case has a spacing, ``predicted_pixels`` and
        ``true_pixels``. None stands for what is not known, and for a mask that is left out.

    Raises:
        TypeError: If ``logged`` does not hold tensors by name.
        ValueError: If one of them has another shape, or the name of another column.

    Example:
        >>> import torch
        >>> from lightning_znorm.batches import cases_of
        >>> masks = torch.tensor([[[[True, True], [False, False]]]])
        >>> cases = cases_of((torch.zeros(1, 3, 2, 2), {"name": ["a.tif"], "patient": ["anna"]}))
        >>> rows = case_scores(masks, masks, cases, class_names=["tumour"])
        >>> [rows[0][column] for column in ("image", "patient", "slice", "class", "dice", "true_pixels")]
        ['a.tif', 'anna', None, 'tumour', 1.0, 2]
    """
    # Imported here, because it loads torchmetrics, which the gradient callbacks do not need.
    from lightning_znorm.metrics import DiceScore, HausdorffDistance, TverskyIndex

    count, classes = target.shape[:2]
    scores = dict(_checked(logged, (count, classes)))
    in_pixels: dict[str, MaskMetric] = {
        "dice": DiceScore(),
        "tversky": TverskyIndex(),
        "hausdorff": HausdorffDistance(),
        "hd95": HausdorffDistance(percentile=95),
    }
    for name, metric in in_pixels.items():
        if name not in scores:
            scores[name] = metric.score_each(preds, target)
    if count and all(steps is not None and all(0 < step < math.inf for step in steps) for steps in cases.spacing):
        for name, percentile in (("hausdorff_mm", None), ("hd95_mm", 95)):
            if name not in scores:
                distance = HausdorffDistance(percentile=percentile, spacing="image")
                scores[name] = distance.score_each(preds, target, spacing=cases.spacing)
    sizes = {name: masks.flatten(2).sum(dim=2).tolist() for name, masks in zip(_PIXELS, (preds, target), strict=True)}
    values = {name: score.tolist() for name, score in scores.items()}
    return [
        {
            "image": cases.name[index],
            "patient": cases.patient[index],
            "slice": cases.slice[index],
            "class": class_name,
            **{name: _cell(value[index][number]) for name, value in values.items()},
            **{name: size[index][number] for name, size in sizes.items()},
        }
        for index in range(count)
        for number, class_name in enumerate(names_of_classes(class_names, classes))
    ]


class ScoreTable:
    """A CSV file that grows line by line, and whose columns grow too: cells that are not known are empty.

    A float is written with all its digits, so that a mean over the file is that of the scores.

    Args:
        path: The file. It is replaced, and its folder is made.
        columns: The first columns. Further ones appear with the first line that has them.
    """

    def __init__(self, path: Path, columns: Sequence[str] = CASE_COLUMNS) -> None:
        self.path = path
        self.columns = list(columns)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._put([], "w")

    def write(self, rows: Iterable[Mapping[str, object]]) -> None:
        """Append lines, and the columns that they have and the file does not."""
        rows = list(rows)
        new = [name for name in dict.fromkeys(name for row in rows for name in row) if name not in self.columns]
        if new:
            with opened(self.path, "r") as file:
                rows = [*csv.DictReader(file), *rows]
            self.columns += new
        self._put(rows, "w" if new else "a")

    def _put(self, rows: Iterable[Mapping[str, object]], mode: Literal["a", "w"]) -> None:
        with opened(self.path, mode) as file:
            table = csv.DictWriter(file, self.columns)
            if mode == "w":
                table.writeheader()
            table.writerows(rows)


def opened(path: Path, mode: Literal["a", "r", "w"]) -> TextIO:
    """Open a CSV file. File names that are not UTF-8 are written byte by byte as they are."""
    return path.open(mode, newline="", encoding="utf-8", errors="surrogateescape")


def scores_file(trainer: pl.Trainer) -> str:
    """Return the name of a process's table of scores."""
    return "scores.csv" if trainer.world_size == 1 else f"scores-{trainer.global_rank}.csv"


def names_of_classes(names: Any, count: int) -> list[str]:
    """Return the names of classes, and their numbers from 0 if there are not as many names."""
    fits = isinstance(names, Sequence) and not isinstance(names, str) and len(names) == count
    return [str(name) for name in (names if fits else range(count))]


def masks_of(outputs: Any, count: int, sentence: str) -> tuple[Tensor, Tensor]:
    """Return the predicted and the true masks that a step returned, bool.

    Args:
        outputs: What the step returned.
        count: Number of images in the batch.
        sentence: Who needs the masks for what: the beginning of messages.

    Raises:
        TypeError: If there are no masks.
        ValueError: If there is not one for each image, or the shapes differ.
    """
    expected = (
        f"{sentence}, a mapping with 'preds' and 'target' (bool masks of each class, of shape (N, K, H, W) or "
        "(N, K, D, H, W))"
    )
    found = [outputs.get(key) for key in ("preds", "target")] if isinstance(outputs, Mapping) else []
    masks = [plain(mask) for mask in found if isinstance(mask, Tensor)]
    if len(masks) < 2:
        raise ZNormTypeError(f"{expected}, and was given {kind_of(outputs)}")
    if any(mask.is_floating_point() for mask in masks):
        raise ZNormTypeError(
            f"{expected}, and was given {masks[0].dtype} and {masks[1].dtype}: compare probabilities with a threshold"
        )
    preds, target = masks
    if preds.shape != target.shape or preds.ndim not in (4, 5) or len(preds) != count:
        raise ZNormValueError(
            f"{expected}, and was given shapes {tuple(preds.shape)} and {tuple(target.shape)} for {count} images"
        )
    return preds.bool(), target.bool()


def _checked(logged: Any, shape: tuple[int, int]) -> Mapping[str, Tensor]:
    if logged is None:
        return {}
    if not isinstance(logged, Mapping) or not all(isinstance(score, Tensor) for score in logged.values()):
        raise ZNormTypeError(
            "'scores' beside 'preds' and 'target' must be a mapping of names to tensors of shape (N, K), and is "
            f"{kind_of(logged)}"
        )
    for name, score in logged.items():
        if score.shape != shape:
            raise ZNormValueError(
                f"The scores {name!r} have shape {tuple(score.shape)}, and the masks ask for {shape}: a score for each "
                "image and class, with NaN where a mask is left out"
            )
        if name in ("loader", *CASE_COLUMNS, *_PIXELS):
            raise ZNormValueError(f"A score is called {name!r}, which is another column of the table: rename it")
    return logged


def _cell(score: float) -> float | None:
    return None if math.isnan(score) else score
