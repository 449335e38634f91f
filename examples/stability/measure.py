"""Measurements of a run near convergence: deviations of gradients, and how far those of different batches agree."""

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.optim import Optimizer


class Measure(Callback):
    """Logs measurements of gradients at the end of some epochs.

    - ``sigma/NAME``: standard deviation of a weight's gradient before any method, mean over the epoch's steps.
    - ``cosine/NAME``: cosine between a weight's gradient on a batch and its gradient on all training images, mean over
      batches. The weights are those at the end of the epoch; batch normalization uses the statistics of each batch.
    - ``full/loss``: the loss over all training images, with the same weights and statistics.

    Biases and normalization scales are left out. It works on a single device.

    Args:
        epochs: The epochs, from 0, at whose end it logs.
    """

    def __init__(self, epochs: Sequence[int]) -> None:
        self.epochs = set(epochs)
        self._sigmas: dict[str, list[Tensor]] = defaultdict(list)

    def on_train_epoch_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Clear the deviations of the last epoch."""
        self._sigmas.clear()

    def on_before_optimizer_step(
        self, trainer: pl.Trainer, pl_module: pl.LightningModule, optimizer: Optimizer
    ) -> None:
        """Add the deviations of this step; the method's callback runs after this one."""
        if trainer.current_epoch in self.epochs:
            for name, weight in _weights(pl_module):
                self._sigmas[name].append(weight.grad.std(correction=0))

    def on_train_epoch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Log the measurements, if the epoch is one of ``epochs``."""
        if trainer.current_epoch not in self.epochs:
            return
        values: dict[str, Any] = {f"sigma/{name}": torch.stack(own).mean() for name, own in self._sigmas.items()}
        losses, gradients = _per_batch(trainer, pl_module)
        for name, own in gradients.items():
            batches = torch.stack(own)
            values[f"cosine/{name}"] = torch.cosine_similarity(batches, batches.mean(0, keepdim=True)).mean()
        pl_module.log_dict({**values, "full/loss": torch.stack(losses).mean()})


def _per_batch(trainer: pl.Trainer, module: pl.LightningModule) -> tuple[list[Tensor], dict[str, list[Tensor]]]:
    """Return the losses of all training batches, and the flattened gradients of the weights, at the same weights."""
    data = trainer.datamodule
    norms = [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.momentum = 0.0  # the running statistics do not change
    losses: list[Tensor] = []
    gradients: dict[str, list[Tensor]] = defaultdict(list)
    names, weights = zip(*_weights(module), strict=True)
    with torch.enable_grad():
        for start in range(0, len(data.train_set), data.batch_size):
            numbers = list(range(start, min(start + data.batch_size, len(data.train_set))))
            images, labels = data.on_after_batch_transfer(data.train_set.__getitems__(numbers), 0)
            loss = module.criterion(module(images), labels)
            losses.append(loss.detach())
            for name, grad in zip(names, torch.autograd.grad(loss, weights), strict=True):
                gradients[name].append(grad.flatten())
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum
    return losses, gradients


def _weights(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [
        (name.removeprefix("model."), parameter) for name, parameter in module.named_parameters() if parameter.ndim > 1
    ]
