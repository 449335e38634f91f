"""Trains in two processes with gradients that cannot be transformed in some of them. Run by test_ddp.py.

python ddp_failure.py sparse | rank_0 | rank_1
"""

import sys

import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_znorm import GradientTransform, ZNormCallback


class Words(LightningModule):
    """Guesses a number from a word."""

    def __init__(self, sparse: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(16, 3, sparse=sparse)
        self.head = nn.Linear(3, 1)

    def training_step(self, words: Tensor) -> Tensor:
        return (self.head(self.embedding(words)) - words.unsqueeze(1)).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


def fail_on(rank: int, grad: Tensor) -> Tensor:
    """A gradient method of another shape, in one process only."""
    return grad[:0] if dist.get_rank() == rank else grad


if __name__ == "__main__":
    where = sys.argv[1]
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        max_epochs=1,
        callbacks=[
            ZNormCallback() if where == "sparse" else GradientTransform(lambda grad: fail_on(int(where[-1]), grad))
        ],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(Words(sparse=where == "sparse"), DataLoader(torch.arange(16), batch_size=2))
    print("trained")
