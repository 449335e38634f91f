"""What the study measures beside the loss: Dice of whole patients, probabilities, and the mean in a gradient."""

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_znorm.tasks import SegmentationTask


class Measure(Callback):
    """Log what a rare class does to a network with one sigmoid output, on a single device.

    - ``train/probability``: mean probability of the rare class in an epoch, over all pixels or images.
    - ``train/mean_share``: share of the mean in the squared gradient of the output weight, mean over the logged steps.
      It is measured before any method, as long as this callback stands before the method's in the list.
    - ``val/dice_per_patient`` and ``test/dice_per_patient``, of a segmentation: the slices of a patient are one volume,
      and patients without a tumour in both masks are left out. The data module names the patient of each slice.

    Args:
        output: Name of the output layer in the LightningModule.
    """

    def __init__(self, output: str) -> None:
        self.output = output
        self._sums: dict[str, list[Tensor]] = defaultdict(list)
        self._overlaps: dict[str, list[Tensor]] = {}
        self._handle: Any = None
        self._slice = 0

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Watch the network's output."""
        self._handle = pl_module.model.register_forward_hook(self._add_probability)

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Stop watching it."""
        self._handle.remove()

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the last epoch."""
        self._sums.clear()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Measure the gradient of the output weight."""
        if trainer.global_step % trainer.log_every_n_steps == 0:
            grad = pl_module.get_submodule(self.output).weight.grad.double()
            self._sums["train/mean_share"].append(grad.mean().square() / grad.square().mean())

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the epoch's means."""
        for name, values in self._sums.items():
            if values:
                pl_module.log(name, torch.stack(values).mean().float())

    def on_validation_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Forget the slices of the last epoch."""
        self._overlaps, self._slice = {}, 0

    on_test_epoch_start = on_validation_epoch_start

    def on_validation_batch_end(
        self,
        trainer: pl.Trainer,
        pl_module: pl.LightningModule,
        outputs: Mapping[str, Tensor] | None,
        batch: Any,
        batch_idx: int,
        dataloader_idx: int = 0,
    ) -> None:
        """Add the slices of a batch to their patients."""
        if not isinstance(pl_module, SegmentationTask):
            return
        data = trainer.datamodule
        rows = (data.test_set if trainer.testing else data.val_set).rows
        for preds, target in zip(outputs["preds"], outputs["target"], strict=True):
            counts = torch.stack([(preds & target).sum(), preds.sum() + target.sum()])
            patient = data.patient_of[rows[self._slice]]
            self._overlaps[patient] = self._overlaps.get(patient, 0) + counts
            self._slice += 1

    on_test_batch_end = on_validation_batch_end

    def on_validation_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the mean over the patients."""
        counts = [each for each in self._overlaps.values() if each[1] > 0]
        if counts:
            dice = torch.stack([2 * both / either for both, either in counts]).mean()
            pl_module.log(f"{'test' if trainer.testing else 'val'}/dice_per_patient", dice)

    on_test_epoch_end = on_validation_epoch_end

    @torch.no_grad()
    def _add_probability(self, network: nn.Module, inputs: Any, output: Any) -> None:
        if network.training:
            logits = output[-1] if isinstance(output, (list, tuple)) else output
            self._sums["train/probability"].append(logits.detach().float().sigmoid().mean())
