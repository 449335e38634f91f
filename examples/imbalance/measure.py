"""What the study measures beside loss and scores: probabilities, and the mean in a gradient."""

from collections import defaultdict
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import Optimizer


class Measure(Callback):
    """Log what a rare class does to a network with one sigmoid output, on a single device.

    - ``train/probability``: mean probability of the rare class in an epoch, over all pixels or images.
    - ``train/mean_share``: share of the mean in the squared gradient of the output weight, mean over the logged steps.
      It is measured before any method, as long as this callback stands before the method's in the list.

    Args:
        output: Name of the output layer in the LightningModule.
    """

    def __init__(self, output: str) -> None:
        self.output = output
        self._sums: dict[str, list[Tensor]] = defaultdict(list)
        self._handle: Any = None

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

    @torch.no_grad()
    def _add_probability(self, network: nn.Module, inputs: Any, output: Any) -> None:
        if network.training:
            logits = output[-1] if isinstance(output, (list, tuple)) else output
            self._sums["train/probability"].append(logits.detach().float().sigmoid().mean())
