"""`Trainer.fit` with our parts beside the best loop by hand, in every setting: ``python -m benchmarks.fit``.

It runs on the CPU, from data to update. A setting is a precision, a memory format and eager or compiled. In each, the
same network, loss and optimizer are trained by a loop written by hand, by a Trainer with our task and data module, and
by that with ``ZNormCallback`` as well. The loop has the same setting, and gets ready batches of normalized tensors; for
the others, batches are picked and normalized from the images of the data set.

The three take turns of a few steps each; another one begins each round. The first turn of each, in which networks are
compiled, does not count. The time of a step is the median of a turn, without the first two: the CPU time of the process
on all cores, which other programs on the machine disturb least, and the time on the wall. Times are medians over the
rounds. So are ratios, each of two turns of one round, with their quartiles.

A CPU without native bfloat16 emulates it, many times slower. There, bf16-mixed is left out unless ``--precisions``
names it: a small ``--batch-size`` is advised.
"""

import argparse
import itertools
import logging
import re
import statistics
import warnings
from collections.abc import Callable
from copy import deepcopy
from functools import partial
from pathlib import Path

import lightning
import torch

from benchmarks.data import training_images
from benchmarks.lightning_step import Batch, Stopwatch, fit, ratio, ready_batches
from lightning_znorm import ZNormCallback
from lightning_znorm.data import CIFAR10DataModule, LGGDataModule
from lightning_znorm.data.base import ImageDataModule
from lightning_znorm.tasks import ClassificationTask, SegmentationTask
from lightning_znorm.tasks.base import Task

MEMORY_FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SGD = partial(torch.optim.SGD, lr=0.01, momentum=0.9)


def has_native_bfloat16() -> bool:
    """Return whether Linux names instructions for bfloat16 among the features of the CPU."""
    features = Path("/proc/cpuinfo")
    return features.exists() and re.search(r"\b(avx512_bf16|amx_bf16|bf16)\b", features.read_text()) is not None


def by_hand(
    task: Task, batches: list[Batch], precision: str, memory_format: torch.memory_format, watch: Stopwatch
) -> None:
    # The network and the loss of a task, which are plain modules. Its weights have the memory format already.
    network, criterion = task.model.train(), task.criterion
    optimizer = SGD(network.parameters())
    for images, target in batches:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16-mixed"):
            logits = network(images.to(memory_format=memory_format))
        outputs = logits if isinstance(logits, (list, tuple)) else [logits]
        loss = torch.stack([criterion(output.float(), target) for output in outputs]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        watch.tick()


def main() -> None:
    parser = argparse.ArgumentParser(description="fit with our parts beside the best loop by hand, in every setting.")
    parser.add_argument("--cifar10", help="root of CIFAR-10 (default: random images of its size)")
    parser.add_argument("--lgg", help="root of the LGG slices: a small Attention U-Net on them, in place of CIFAR-10")
    parser.add_argument("--batch-size", type=int, default=128, help="(default: 128; a sixteenth of it for LGG)")
    parser.add_argument("--steps", type=int, default=8, help="steps of each turn (default: 8)")
    parser.add_argument("--rounds", type=int, default=8, help="turns of each row (default: 8)")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads (default: 1)")
    parser.add_argument("--precisions", nargs="+", choices=["32-true", "bf16-mixed"], help="(default: see above)")
    parser.add_argument("--memory-formats", nargs="+", choices=list(MEMORY_FORMATS), default=list(MEMORY_FORMATS))
    parser.add_argument("--modes", nargs="+", choices=["eager", "compiled"], default=["eager", "compiled"])
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning.pytorch")  # its advice on workers

    if args.lgg:
        workload = "small Attention U-Net, LGG"
        small = {"channels": [8, 16, 32], "strides": [2, 2]}
        make: Callable[..., Task] = partial(SegmentationTask, "attention_unet", model_kwargs=small)
        data: ImageDataModule = LGGDataModule(args.lgg, max(1, args.batch_size // 16))
    else:
        workload = "ResNet-20, CIFAR-10"
        images = training_images(args.cifar10, max(5_000, args.batch_size * args.steps))
        make = partial(ClassificationTask, "resnet20", num_classes=10)
        data = CIFAR10DataModule(batch_size=args.batch_size)
        data.load = lambda train: images
    data.prepare_data()
    data.setup("fit")
    batches = ready_batches(data, args.steps)

    native = has_native_bfloat16()
    precisions = args.precisions or (["32-true", "bf16-mixed"] if native else ["32-true"])
    capability = torch.backends.cpu.get_cpu_capability()
    print(
        f"torch {torch.__version__}, lightning {lightning.__version__}, CPU ({capability}, bfloat16 "
        f"{'native' if native else 'emulated'}), {args.threads} threads"
    )
    print(f"medians of {args.rounds} turns of {args.steps} steps")
    if "bf16-mixed" not in precisions:
        print(f"bf16-mixed is left out{'' if native else ': this CPU would emulate bfloat16'}.")
    print()
    header = f"{'CPU ms a step':>13} | {'of loop by hand':>23} | {'wall ms a step':>14} | {'images/CPU s':>12} |"
    print(f"| {'workload':26} | {'batch':>5} | {'setting':37} | {'step':22} | {header}")
    print(
        f"| {'-' * 26} | {'-' * 4}: | {'-' * 37} | {'-' * 22} | {'-' * 12}: | {'-' * 22}: | {'-' * 13}: | {'-' * 11}: |"
    )
    for precision, name, mode in itertools.product(precisions, args.memory_formats, args.modes):
        memory_format = MEMORY_FORMATS[name]
        torch.manual_seed(0)
        task = make(optimizer=SGD, channels_last=memory_format is torch.channels_last)
        tasks = [deepcopy(task) for _ in range(3)]
        if mode == "compiled":
            for task in tasks:
                task.model.compile()
        rows: dict[str, Callable[[Stopwatch], None]] = {
            "loop by hand": partial(by_hand, tasks[0], batches, precision, memory_format),
            "fit": partial(fit, tasks[1], data, args.steps, precision=precision),
            "fit with ZNormCallback": lambda watch, precision=precision, task=tasks[2]: fit(
                task, data, args.steps, watch, ZNormCallback(), precision=precision
            ),
        }
        watches = measured(rows, args.rounds)
        setting = f"{precision}, {name}, {mode}"
        for step, watch in watches.items():
            batch_size = data.hparams["batch_size"]
            process, wall = statistics.median(watch.process), statistics.median(watch.wall)
            figures = f"{process:13.2f} | {ratio(watch.process, watches['loop by hand'].process)} | {wall:14.2f}"
            figures += f" | {1e3 * batch_size / process:12.1f}"
            print(f"| {workload:26} | {batch_size:5} | {setting:37} | {step:22} | {figures} |", flush=True)


def measured(rows: dict[str, Callable[[Stopwatch], None]], rounds: int) -> dict[str, Stopwatch]:
    """Return what each row has taken, over rounds in which all take turns."""
    for turn in rows.values():
        turn(Stopwatch())
    watches = {name: Stopwatch() for name in rows}
    order = list(rows)
    for _ in range(rounds):
        for name in order:
            rows[name](watches[name])
            watches[name].stop()
        order.append(order.pop(0))
    return watches


if __name__ == "__main__":
    main()
