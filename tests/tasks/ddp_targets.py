"""Two processes meet labels that cannot be, and write down what is said to each. Run by test_targets.py."""

import json
import os
import socket
import sys
from pathlib import Path
from typing import Any

import torch
import torch.multiprocessing
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


def process(rank: int, folder: Path, port: int) -> None:
    torch.set_num_threads(1)
    # As torchrun does.
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "1"}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "GROUP_RANK": "0"}
    os.environ |= {"LOCAL_WORLD_SIZE": "2"}
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
        record[name] = [steps.count, said]
    (folder / f"{rank}.json").write_text(json.dumps(record))
    torch.distributed.barrier()  # gloo aborts a process whose partner has left in mid-talk


if __name__ == "__main__":
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        number = free.getsockname()[1]
    # Forked, so that torch is imported once.
    torch.multiprocessing.start_processes(process, (Path(sys.argv[1]), number), nprocs=2, start_method="fork")
