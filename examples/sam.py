"""ZNorm with sharpness-aware minimization (SAM), in a plain loop and in a Lightning Trainer.

SAM (Foret et al., arXiv 2010.01412) takes a small step up along the gradient, and computes the gradient there. It goes
back to where it started, and descends along that second gradient. The climb uses the true gradient, divided by its
norm. ZNorm normalizes the gradient of the descent.

1. In a loop of your own, ``attach`` to the optimizer that descends. If a SAM optimizer has ``first_step`` and
   ``second_step``, that is the optimizer inside: ``attach(sam.base_optimizer)``.
2. In a Lightning Trainer, climb by hand, and give the descent to ``optimizer.step`` as a closure: ``ZNormCallback``
   normalizes the gradients that the closure computes.

Both take the same steps.

    python examples/sam.py
"""

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_znorm import ZNormCallback
from lightning_znorm.functional import attach

LEARNING_RATE = 0.004
RADIUS = 0.05


@torch.no_grad()
def climb(model: nn.Module) -> list[Tensor]:
    """Move the weights along the gradient by RADIUS, and return the moves, to go back."""
    params = list(model.parameters())
    norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(param.grad) for param in params]))
    way = [param.grad * (RADIUS / norm) for param in params]
    for param, step in zip(params, way, strict=True):
        param.add_(step)
    return way


@torch.no_grad()
def go_back(model: nn.Module, way: list[Tensor]) -> None:
    for param, step in zip(model.parameters(), way, strict=True):
        param.sub_(step)


def in_a_plain_loop(model: nn.Module, batches: Iterable[list[Tensor]]) -> None:
    optimizer = torch.optim.SGD(model.parameters(), lr=LEARNING_RATE)
    attach(optimizer)
    for images, labels in batches:
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        way = climb(model)  # by the gradient as it is
        optimizer.zero_grad()
        F.cross_entropy(model(images), labels).backward()
        go_back(model, way)
        optimizer.step()  # by its z-score


class Sharpness(LightningModule):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.model = model

    def training_step(self, batch: list[Tensor]) -> None:
        images, labels = batch
        optimizer = self.optimizers()

        def backward() -> None:
            optimizer.zero_grad()
            self.manual_backward(F.cross_entropy(self.model(images), labels))

        def closure() -> None:
            backward()
            go_back(self.model, way)

        backward()
        way = climb(self.model)
        optimizer.step(closure)  # ZNormCallback acts between the closure and the update

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=LEARNING_RATE)


def in_a_trainer(model: nn.Module, batches: Iterable[list[Tensor]]) -> None:
    trainer = Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ZNormCallback()],
    )
    trainer.fit(Sharpness(model), batches)


def main() -> None:
    pixels, digits = load_digits(return_X_y=True)
    split = train_test_split(pixels / 16, digits, test_size=0.2, stratify=digits, random_state=0)
    train_images, test_images = (torch.as_tensor(images, dtype=torch.float32) for images in split[:2])
    train_labels, test_labels = map(torch.as_tensor, split[2:])
    for train in (in_a_plain_loop, in_a_trainer):
        seed_everything(0, verbose=False)
        model = nn.Sequential(nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))
        train(model, DataLoader(TensorDataset(train_images, train_labels), batch_size=4, shuffle=True))
        accuracy = (model(test_images).argmax(dim=1) == test_labels).float().mean()
        print(f"{train.__name__}: test accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
