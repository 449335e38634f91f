"""Gradients that cannot be transformed, in some of several processes: all of them end, and none trains on."""

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_znorm import GradientTransform, ZNormCallback
from tests.distributed import ProcessesError, is_running, run_distributed
from tests.processes import run_python

SPARSE = "the gradient of embedding.weight is sparse"
SHAPES = "made a tensor of shape (0, 3) from a gradient of shape (16, 3)"


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


def train(where: str) -> None:
    """Train as one of two processes, of which one makes an error in its first step, or both do."""
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


def train_and_leave_pid(where: str, folder: Path) -> None:
    (folder / os.environ["RANK"]).write_text(str(os.getpid()))
    train(where)


@pytest.mark.parametrize(
    ("where", "message", "failing"),
    [
        ("sparse", SPARSE, [0, 1]),
        ("rank_0", SHAPES, [0]),
        ("rank_1", SHAPES, [1]),
    ],
)
def test_ends_all_processes(tmp_path: Path, where: str, message: str, failing: list[int]) -> None:
    with pytest.raises(ProcessesError) as caught:
        run_distributed(train_and_leave_pid, where, tmp_path)
    summary, *outputs = str(caught.value).split("--- rank ")
    for rank in failing:
        assert f"rank {rank} ended with exit code 1" in summary
    assert "still ran" not in summary  # no process waited for ever for one that had failed
    assert [int(output[0]) for output in outputs if message in output] == failing
    assert "trained" not in str(caught.value)
    assert not any(is_running(int((tmp_path / str(rank)).read_text())) for rank in range(2))


@pytest.mark.full
@pytest.mark.parametrize(("where", "message"), [("sparse", SPARSE), ("rank_0", SHAPES), ("rank_1", SHAPES)])
def test_ends_all_processes_that_lightning_starts(where: str, message: str) -> None:
    finished = run_python(__file__, where, timeout=60)
    assert finished.returncode != 0
    assert message in finished.stdout
    assert "trained" not in finished.stdout


if __name__ == "__main__":
    train(sys.argv[1])
