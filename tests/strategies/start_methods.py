"""Trains under DDP in processes that Lightning starts, each of which writes down what it saw. Run by test_ddp.py.

python -m tests.strategies.start_methods DIRECTORY STRATEGY
"""

import sys
from pathlib import Path

import torch

from tests.strategies.training import Training, train

SCENARIO = "ddp-64-true"


class Written(Training):
    """Writes its record into a file, because another process does not return what it trained."""

    def __init__(self, name: str, directory: Path) -> None:
        super().__init__(name)
        self.directory = directory

    def on_train_end(self) -> None:
        torch.save(self.record, self.directory / f"{self.global_rank}.pt")


if __name__ == "__main__":
    folder = Path(sys.argv[1])
    train(SCENARIO, folder, Written(SCENARIO, folder), strategy=sys.argv[2])
