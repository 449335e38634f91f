"""Train for many steps in two processes under DDP with ZNorm, and report memory and what is left behind.

``python -m benchmarks.soak --steps 1000``, and ``--tensors 10000`` for a network of many parameters.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import lightning.pytorch as pl
import torch
from lightning.pytorch.callbacks import Callback
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_znorm import ZNormCallback


class ManyTensors(pl.LightningModule):
    """A network with a given number of weight tensors, of 64 elements each."""

    def __init__(self, tensors: int) -> None:
        super().__init__()
        self.weights = nn.ParameterList(torch.randn(64) / 8 for _ in range(tensors))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        (inputs,) = batch
        return (torch.stack(list(self.weights)) @ inputs.T).tanh().square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=1e-3)


class Memory(Callback):
    """Records memory and open files after every step, and prints at the end how they changed."""

    def __init__(self) -> None:
        self.resident: list[int] = []
        self.descriptors: list[int] = []

    def on_train_batch_end(self, trainer: pl.Trainer, *_: object) -> None:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        self.resident.append(pages * os.sysconf("SC_PAGESIZE"))
        self.descriptors.append(len(os.listdir("/proc/self/fd")))

    def on_train_end(self, trainer: pl.Trainer, *_: object) -> None:
        part = len(self.resident) // 5  # the first fifth warms up
        early = statistics.median(self.resident[part : 2 * part]) / 2**20
        late = statistics.median(self.resident[-part:]) / 2**20
        change = f"{100 * (late / early - 1):+.2f}"
        files = f"{self.descriptors[part]}, {self.descriptors[-1]}"
        row = (trainer.global_rank, len(self.resident), f"{early:.1f}", f"{late:.1f}", change, files)
        print("| " + " | ".join(map(str, row)) + " |\n", end="", flush=True)


def train(steps: int, tensors: int) -> None:
    torch.set_num_threads(1)
    pl.seed_everything(0, verbose=False)
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        devices=2,
        strategy="ddp",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[ZNormCallback(), Memory()],
    )
    loader = DataLoader(TensorDataset(torch.randn(2048, 64)), batch_size=16)
    trainer.fit(ManyTensors(tensors), loader)


def main(steps: int, tensors: int) -> int:
    header = (
        "process",
        "steps",
        "MiB, second fifth",
        "MiB, last fifth",
        "change, %",
        "files open",
        "at the end",
        "threads",
    )
    print("| " + " | ".join(header) + " |\n|" + " --: |" * len(header), flush=True)
    arguments = ["--train", "--steps", str(steps), "--tensors", str(tensors)]
    with tempfile.TemporaryDirectory() as folder:
        process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.soak", *arguments],
            env={**os.environ, "TMPDIR": folder, "OMP_NUM_THREADS": "1"},
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        code = process.wait()
        files = [path.name for path in Path(folder).rglob("*")]
        for _ in range(50):  # the first process does not wait for the other one, which ends about then
            processes = [path for path in Path("/proc").glob("[0-9]*/stat") if _session(path) == process.pid]
            if not processes:
                break
            time.sleep(0.2)
    print(f"\n{tensors} tensors. Left behind: {len(files)} files, {len(processes)} processes.")
    return code


def _session(stat: Path) -> int:
    try:
        return int(stat.read_text().rpartition(")")[2].split()[3])
    except OSError:
        return 0


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--tensors", type=int, default=100)
    parser.add_argument("--train", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.train:
        train(options.steps, options.tensors)
    else:
        sys.exit(main(options.steps, options.tensors))
