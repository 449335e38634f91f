"""A gradient method of your own, in about ten lines.

A method that is an affine map of the gradient, ``(g - shift) * scale``, only returns shift and scale, given the count,
mean and deviation of each tensor (or, with ``over = "row"``, of each output channel). It then works with half
precision, mixed precision, DDP, filters by name and everything else that ``ZNormCallback`` works with.

This example divides every layer's gradient by its norm (Yu et al., "Block-Normalized Gradient Method: An Empirical
Study for Training Deep Neural Network", arXiv 1707.04822).

    python examples/custom_method.py
"""

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor

from lightning_znorm import GradientTransform
from lightning_znorm.data import DigitsDataModule
from lightning_znorm.gradients import AffineMethod, Statistics
from lightning_znorm.tasks import ClassificationTask


class UnitNorm(AffineMethod):
    """A method that divides each gradient by its norm."""

    def affine(self, stats: Statistics) -> tuple[Tensor | None, Tensor | None]:
        mean_square = stats.std.square() + stats.mean.abs().square()
        norm = (stats.count * mean_square).sqrt()
        return None, 1 / (norm + 1e-10)


class Task(ClassificationTask):
    """A classification task that prints the norms of the gradients of its first step."""

    def on_before_optimizer_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self.global_step == 0:
            norms = torch.stack([parameter.grad.norm() for parameter in self.parameters() if parameter.grad.ndim > 1])
            print(f"norms of the gradients: {norms.min():.6f} to {norms.max():.6f}")


def main() -> None:
    seed_everything(0)
    digits, task = DigitsDataModule(), Task("resnet20", num_classes=10, in_chans=1)
    callback = GradientTransform(UnitNorm(), min_ndim=2)  # biases and normalization scales keep their gradients
    trainer = Trainer(max_epochs=4, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[callback])
    trainer.fit(task, digits)
    print(f"validation accuracy {trainer.callback_metrics['val/accuracy']:.3f}")


if __name__ == "__main__":
    main()
