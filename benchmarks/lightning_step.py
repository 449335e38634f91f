"""A training step through Lightning beside the same without our parts: ``python -m benchmarks.lightning_step``.

It runs on the CPU, from data to update: the same network, loss and optimizer in a loop written by hand, in a Trainer
with the smallest LightningModule, in a Trainer with our task and data module, and with ``ZNormCallback`` as well. The
first two get ready batches of normalized tensors; for the others, batches are picked and normalized from the images of
the data set.

The four take turns of a few steps each, with a fresh network; another one begins each round. The time of a turn is the
median of its steps, without the first two: the CPU time of the process on all cores, which other programs on the
machine disturb least, and the time on the wall. Times are medians over the rounds. So are ratios, each of two turns of
one round, with their quartiles.

``--profile`` also prints what Lightning's profiler tells about a step with all our parts: medians of the calls that
every step makes once. A call may contain others.
"""

import argparse
import itertools
import logging
import re
import statistics
import time
import warnings
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import lightning
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.profilers import SimpleProfiler
from torch import Tensor, nn
from torch.utils.data import DataLoader

from benchmarks.data import training_images
from lightning_znorm import ZNormCallback
from lightning_znorm.data import CIFAR10DataModule, LGGDataModule
from lightning_znorm.data.base import ImageDataModule
from lightning_znorm.tasks import ClassificationTask, SegmentationTask
from lightning_znorm.tasks.base import Task

Batch = tuple[Tensor, Tensor]
WARMUP = 2


class Stopwatch(Callback):
    """Measures milliseconds from the end of a step to the end of the next: for each turn, the median of its steps."""

    def __init__(self) -> None:
        self.process: list[float] = []
        self.wall: list[float] = []
        self._ends: list[tuple[float, float]] = []

    def tick(self) -> None:
        """End a step."""
        self._ends.append((time.process_time(), time.perf_counter()))

    def on_train_batch_end(self, *_: Any) -> None:
        self.tick()

    def stop(self) -> None:
        """End a turn."""
        steps = list(itertools.pairwise(self._ends[WARMUP - 1 :]))
        for clock, medians in enumerate((self.process, self.wall)):
            medians.append(1e3 * statistics.median(end[clock] - start[clock] for start, end in steps))
        self._ends = []


class Plain(LightningModule):
    """The smallest module that a Trainer trains."""

    def __init__(self, network: nn.Module, criterion: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.criterion = criterion

    def training_step(self, batch: Batch, batch_idx: int) -> Tensor:
        loss: Tensor = self.criterion(self.network(batch[0]), batch[1])
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters())


def by_hand(network: nn.Module, criterion: nn.Module, batches: list[Batch], stopwatch: Stopwatch) -> None:
    optimizer = torch.optim.Adam(network.parameters())
    for images, target in batches:
        optimizer.zero_grad()
        criterion(network(images), target).backward()
        optimizer.step()
        stopwatch.tick()


def fit(
    module: LightningModule,
    data: ImageDataModule | list[Batch],
    steps: int,
    *callbacks: Callback,
    profiler: SimpleProfiler | None = None,
    precision: Any = "32-true",
) -> None:
    trainer = Trainer(
        accelerator="cpu",
        precision=precision,
        max_steps=steps,
        limit_val_batches=0,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        profiler=profiler,
    )
    trainer.fit(module, data if isinstance(data, ImageDataModule) else DataLoader(data, batch_size=None))


def ready_batches(data: ImageDataModule, steps: int) -> list[Batch]:
    """Return the first batches of a data module, as the network gets them."""
    loader = iter(data.train_dataloader())
    return [data.on_after_batch_transfer(next(loader), 0) for _ in range(steps)]


def turns(task: Task, data: ImageDataModule, steps: int) -> dict[str, Callable[[Stopwatch], None]]:
    network, criterion = task.model, task.criterion
    batches = ready_batches(data, steps)
    return {
        "loop by hand": lambda watch: by_hand(deepcopy(network), criterion, batches, watch),
        "Trainer without our parts": lambda watch: fit(Plain(deepcopy(network), criterion), batches, steps, watch),
        "Trainer with our task and data": lambda watch: fit(deepcopy(task), data, steps, watch),
        "and with ZNormCallback": lambda watch: fit(deepcopy(task), data, steps, watch, ZNormCallback()),
    }


def ratio(milliseconds: list[float], of: list[float]) -> str:
    """Format median and quartiles of the ratios."""
    ratios = [mine / other for mine, other in zip(milliseconds, of, strict=True)]
    low, median, high = statistics.quantiles(ratios, n=4, method="inclusive") if len(ratios) > 1 else 3 * ratios
    return f"{median:6.3f} ({low:.3f} to {high:.3f})"


def profile(task: Task, data: ImageDataModule, steps: int) -> dict[str, float]:
    """Return the median milliseconds of each call that every step makes once, if above ten microseconds."""
    profiler = SimpleProfiler()
    fit(deepcopy(task), data, steps, ZNormCallback(), profiler=profiler)
    medians = {
        re.sub(r"\{.*\}", "", name): 1e3 * statistics.median(seconds[WARMUP:])
        for name, seconds in profiler.recorded_durations.items()
        if len(seconds) == steps
    }
    return {name: ms for name, ms in sorted(medians.items(), key=lambda item: -item[1]) if ms > 0.01}


def main() -> None:
    parser = argparse.ArgumentParser(description="A training step through Lightning, with and without our parts.")
    parser.add_argument("--cifar10", help="root of CIFAR-10 (default: random images of its size)")
    parser.add_argument("--lgg", help="root of the LGG slices, for rows of an Attention U-Net on them")
    parser.add_argument("--batch-size", type=int, default=64, help="(default: 64; an eighth of it for LGG)")
    parser.add_argument("--steps", type=int, default=12, help="steps of each turn (default: 12)")
    parser.add_argument("--rounds", type=int, default=8, help="turns of each row (default: 8)")
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--profile", action="store_true", help="print the calls of a step, too")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.pytorch")  # its advice on workers

    images = training_images(args.cifar10, max(5_000, 2 * args.batch_size * args.steps))
    cifar10 = CIFAR10DataModule(batch_size=args.batch_size)
    cifar10.load = lambda train: images  # type: ignore[method-assign]
    workloads: dict[str, tuple[Task, ImageDataModule]] = {
        "ResNet-56, CIFAR-10": (ClassificationTask("resnet56", num_classes=10), cifar10)
    }
    if args.lgg:
        lgg = LGGDataModule(args.lgg, batch_size=max(1, args.batch_size // 8))
        workloads["Attention U-Net, LGG"] = (SegmentationTask("attention_unet"), lgg)

    print(f"torch {torch.__version__}, lightning {lightning.__version__}, CPU, {args.threads} threads")
    print(f"medians of {args.rounds} turns of {args.steps} steps\n")
    header = f"{'CPU ms a step':>13} | {'of plain Trainer':>23} | {'wall ms a step':>14} | {'of plain Trainer':>23} |"
    print(f"| {'workload':20} | {'batch':>5} | {'step':30} | {header}")
    print(f"| {'-' * 20} | {'-' * 4}: | {'-' * 30} | {'-' * 12}: | {'-' * 22}: | {'-' * 13}: | {'-' * 22}: |")
    for workload, (task, data) in workloads.items():
        data.prepare_data()
        data.setup("fit")
        rows = {name: (turn, Stopwatch()) for name, turn in turns(task, data, args.steps).items()}
        order = list(rows.values())
        for _ in range(args.rounds):
            for turn, watch in order:
                turn(watch)
                watch.stop()
            order.append(order.pop(0))
        _, plain = rows["Trainer without our parts"]
        for name, (_, watch) in rows.items():
            figures = f"{statistics.median(watch.process):13.2f} | {ratio(watch.process, plain.process)}"
            figures += f" | {statistics.median(watch.wall):14.2f} | {ratio(watch.wall, plain.wall)}"
            print(f"| {workload:20} | {data.hparams['batch_size']:5} | {name:30} | {figures} |", flush=True)
    for workload, (task, data) in workloads.items() if args.profile else ():
        medians = profile(task, data, args.steps)
        print(f"\n| {workload + ', calls of a step':70} | {'ms':>9} | {'of the step':>11} |")
        print(f"| {'-' * 70} | {'-' * 8}: | {'-' * 10}: |")
        for name, ms in medians.items():
            print(f"| {name:70} | {ms:9.3f} | {ms / medians['run_training_batch']:11.4f} |")


if __name__ == "__main__":
    main()
