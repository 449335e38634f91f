"""ZNorm for a LightningModule of your own: one line in the Trainer, none in the module.

The program trains a small convolutional network on the 1,797 handwritten digits that come with scikit-learn.

    python examples/own_lightning_module.py
"""

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningModule, Trainer, seed_everything
from torch import Tensor, nn

from lightning_znorm import ZNormCallback
from lightning_znorm.data import DigitsDataModule


class DigitClassifier(LightningModule):
    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(
            nn.Conv2d(1, 32, kernel_size=3, padding=1),
            nn.ReLU(),
            nn.Conv2d(32, 32, kernel_size=3, stride=2),
            nn.ReLU(),
            nn.Flatten(),
            nn.Linear(32 * 3 * 3, 10),
        )

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        images, labels = batch
        return F.cross_entropy(self.network(images), labels)

    def test_step(self, batch: tuple[Tensor, Tensor]) -> None:
        images, labels = batch
        correct = self.network(images).argmax(dim=1) == labels
        self.log("test accuracy", correct.float().mean(), batch_size=len(labels))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


def main() -> None:
    seed_everything(0)
    digits, classifier = DigitsDataModule(batch_size=64), DigitClassifier()
    trainer = Trainer(
        max_epochs=10, accelerator="cpu", logger=False, enable_checkpointing=False, callbacks=[ZNormCallback()]
    )
    trainer.fit(classifier, digits)
    trainer.test(classifier, digits)


if __name__ == "__main__":
    main()
