"""Pictures of what a segmentation network marks."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.callbacks import Callback
from lightning.pytorch.trainer.states import TrainerFn
from torch import Tensor
from typing_extensions import override

from lightning_znorm.callbacks.drawing import Case, grid
from lightning_znorm.callbacks.folders import run_folder
from lightning_znorm.callbacks.pictures import log_picture
from lightning_znorm.errors import ZNormTypeError, ZNormValueError


class MaskOverlay(Callback):
    """Draws chosen cases after each validation and test: image, true outline, predicted outline, Dice and Hausdorff.

    The picture goes to each TensorBoard or Weights & Biases logger there is, and otherwise to a PNG file in ``masks``
    beside the logs: ``val-epoch=N.png`` in training, ``val.png`` and ``test.png`` outside of it. Of several processes,
    the first draws cases of its own. Of a volume, the slice with most of the true structure is drawn.

    Works with :class:`~lightning_znorm.tasks.SegmentationTask`, and with any module whose ``validation_step`` and
    ``test_step`` return a mapping with ``"preds"`` and ``"target"``: masks of shape ``(N, K, H, W)`` or
    ``(N, K, D, H, W)``, bool, of each class, and whose batches begin with the images.

    Source: the kind of picture is Figure 2 of Yun, "ZNorm: Z-Score Gradient Normalization", arXiv 2408.01215.

    Args:
        num_cases: Number of cases to draw, spread evenly over those whose true mask is not empty: neighbours, such as
            the slices of one scan, look alike.
        cases: Numbers of the cases to draw instead, in the order of the loader, from 0. Of several loaders they go on
            from one to the next.
        every_n_epochs: In training, draws after the validation of every n-th epoch; outside of it, always.

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
            raise ZNormValueError(f"cases must be numbers from 0 on, got {list(cases)}")
        self.num_cases = num_cases
        self.cases = None if cases is None else set(cases)
        self.every_n_epochs = every_n_epochs
        self._folder = Path()
        self._begin()

    @override
    def setup(self, trainer: pl.Trainer, pl_module: pl.LightningModule, stage: str) -> None:
        self._folder = Path(run_folder(trainer)) / "masks"  # here, where every process is

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
        if not trainer.sanity_checking and (due or not _fitting(trainer)):
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
        # Every how many-th of the cases whose mask is not empty is kept, and how many of those there were.
        self._stride, self._marked = 1, 0

    def _collect(self, trainer: pl.Trainer, outputs: Any, batch: Any) -> None:
        """Keeps the chosen cases of a batch."""
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
            # How many there will be is not known: whenever there are too many, every second one is dropped.
            if len(self._kept) == 2 * self.num_cases:
                self._kept, self._stride = self._kept[::2], 2 * self._stride

    def _drawn(self) -> list[Case]:
        """The kept cases that are drawn, from the middle of as many equal parts."""
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
            # A checkpoint that is judged outside of training does not say of which epoch it is.
            epoch = f"-epoch={trainer.current_epoch}" if _fitting(trainer) else ""
            picture.save(self._folder / f"{stage}{epoch}.png")


def _fitting(trainer: pl.Trainer) -> bool:
    return trainer.state.fn == TrainerFn.FITTING


def _case(image: Tensor, truth: Tensor, preds: Tensor, number: int) -> Case:
    # Here, because they load torchmetrics, which the gradient callbacks do without.
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
