"""Two processes meet labels that cannot be. Called by test_targets.py."""

import os
from typing import Any

import torch
from lightning.pytorch import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_znorm.tasks import ClassificationTask
from tests.trainers import trainer


def mixed_on_one(rank: int) -> DataLoader:
    """Batches of which Mixup has made class probabilities in the first process alone."""
    labels = torch.tensor([[0.3, 0.7], [1.0, 0.0]]) if rank == 0 else torch.tensor([0, 1])
    return DataLoader([(torch.randn(2, 4), labels) for _ in range(3)], batch_size=None)


def batches(rank: int, wrong: dict[tuple[int, int], int], counts: tuple[int, int] = (3, 3)) -> DataLoader:
    """Batches of each process, with a wrong value in those given by rank and number."""

    def batch(number: int) -> tuple[Tensor, Tensor]:
        return torch.randn(2, 4), torch.tensor([0, wrong.get((rank, number), 1)])

    return DataLoader([batch(number) for number in range(counts[rank])], batch_size=None)


class Steps(Callback):
    count = 0

    def on_train_batch_end(self, *_: Any) -> None:
        self.count += 1


def meet_wrong_labels() -> dict[str, tuple[int, str | None]]:
    """Return how many steps one of two processes trained in each scenario, and what it was told."""
    rank = int(os.environ["RANK"])
    good = batches(rank, {})
    scenarios = {
        "training, later": ("fit", batches(rank, {(1, 2): 7})),
        "training, first": ("fit", batches(rank, {(0, 0): -3})),
        "validation, of uneven batches": ("validate", batches(rank, {(0, 1): 2, (0, 2): 9}, (3, 1))),
        "good": ("fit", good),
        "mixed": ("fit", mixed_on_one(rank)),
    }
    record = {}
    for name, (method, data) in scenarios.items():
        steps, said = Steps(), None
        # The bar of rank 0 reduces metrics at an epoch's end, before the other rank gets there.
        bar = {"enable_progress_bar": name == "good", "callbacks": [steps]}
        run = trainer(strategy="ddp", devices=2, use_distributed_sampler=False, **bar)
        classes = 2 if name == "mixed" else 1
        task = ClassificationTask(nn.Linear(4, classes), num_classes=classes)
        try:
            getattr(run, method)(task, data, *([good] if method == "fit" else []))
        except ValueError as error:
            said = str(error)
        record[name] = (steps.count, said)
    torch.distributed.barrier()  # gloo aborts a process whose partner has left in mid-talk
    return record
