"""What ZNorm adds to a training step of ResNet-56 on a GPU: ``python -m benchmarks.training_step``.

Steps on images of CIFAR-10's size, with and without ``zscore_grads_``, run in turns of ten; a turn ends when the device
is done. "alone" is the time of the call by itself, repeated on the same gradients. Compiled steps run as CUDA graphs
(``mode="reduce-overhead"``).
"""

import argparse
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from benchmarks.timing import alternating_medians
from lightning_znorm.functional import zscore_grads_
from lightning_znorm.gradients.kernels import dispatch
from lightning_znorm.models import resnet56

STEPS = 10


def training_step(
    precision: str, compiled: bool, batch_size: int, device: str
) -> tuple[nn.Module, Callable[..., None]]:
    model = resnet56().to(device)
    forward = torch.compile(model, mode="reduce-overhead") if compiled else model
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    images = torch.randn(batch_size, 3, 32, 32, device=device)
    labels = torch.randint(10, (batch_size,), device=device)
    autocast = partial(torch.autocast, device, torch.bfloat16) if precision == "bf16-mixed" else nullcontext

    def steps(znorm: bool) -> None:
        for _ in range(STEPS):
            if compiled:
                torch.compiler.cudagraph_mark_step_begin()
            optimizer.zero_grad()
            with autocast():
                loss = cross_entropy(forward(images), labels)
            loss.backward()
            if znorm:
                zscore_grads_(model.parameters())
            optimizer.step()
        synchronize(device)

    return model, steps


def alone(model: nn.Module, device: str) -> None:
    for _ in range(STEPS):
        zscore_grads_(model.parameters())
    synchronize(device)


def synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def main() -> None:
    parser = argparse.ArgumentParser(description="What ZNorm adds to a training step of ResNet-56.")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=15, help=f"turns of {STEPS} steps of each row (default: 15)")
    parser.add_argument("--eager", action="store_true", help="no compiled steps")
    args = parser.parse_args()
    dispatch.DEVICE_TYPES = frozenset({"cuda"})

    name = torch.cuda.get_device_name() if args.device == "cuda" else "CPU"
    print(
        f"torch {torch.__version__}, {name}, ResNet-56, batches of {args.batch_size}, median of {args.rounds} turns\n"
    )
    header = f"{'ms a step':>9} | {'with ZNorm':>10} | {'added %':>7} | {'alone, ms':>9} | {'of a step %':>11} |"
    print(f"| {'precision':10} | {'step':8} | {header}")
    print(f"| {'-' * 10} | {'-' * 8} | {'-' * 8}: | {'-' * 9}: | {'-' * 6}: | {'-' * 8}: | {'-' * 10}: |")
    for precision in ("32-true", "bf16-mixed"):
        for compiled in (False,) if args.eager else (False, True):
            model, steps = training_step(precision, compiled, args.batch_size, args.device)
            turns = {
                "without": partial(steps, False),
                "with": partial(steps, True),
                "alone": partial(alone, model, args.device),
            }
            without, with_znorm, by_itself = (
                seconds / STEPS * 1e3 for seconds in alternating_medians(turns, args.rounds, warmup=1).values()
            )
            added, share = 100 * (with_znorm / without - 1), 100 * by_itself / without
            figures = f"{without:9.3f} | {with_znorm:10.3f} | {added:7.2f} | {by_itself:9.3f} | {share:11.2f}"
            print(f"| {precision:10} | {'compiled' if compiled else 'eager':8} | {figures} |", flush=True)


if __name__ == "__main__":
    main()
