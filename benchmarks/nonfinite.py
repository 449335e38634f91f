"""What ``error_if_nonfinite=True`` costs: ``python -m benchmarks.nonfinite``.

``zscore_grads_`` and ``torch.nn.utils.clip_grad_norm_``, with and without it, take turns on gradients of the same
sizes: twenty matrices of a million elements and sixty vectors of 64. It runs on the CPU. On a GPU, a wait is added, in
which the device finishes what it has still to do.
"""

import argparse

import torch
from torch import nn
from torch.nn.utils import clip_grad_norm_

from benchmarks.timing import alternating_medians
from lightning_znorm.functional import zscore_grads_


def parameters_of(numel: int) -> list[nn.Parameter]:
    shapes = [(numel // 1024, 1024)] * 20 + [(64,)] * 60
    parameters = [nn.Parameter(torch.zeros(shape)) for shape in shapes]
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return parameters


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=30)
    parser.add_argument("--numel", type=int, default=2**20, help="elements of each matrix")
    args = parser.parse_args()
    normalized, clipped = parameters_of(args.numel), parameters_of(args.numel)
    medians = alternating_medians(
        {
            "zscore_grads_": lambda: zscore_grads_(normalized),
            "zscore_grads_, error_if_nonfinite": lambda: zscore_grads_(normalized, error_if_nonfinite=True),
            "clip_grad_norm_": lambda: clip_grad_norm_(clipped, 1.0),
            "clip_grad_norm_, error_if_nonfinite": lambda: clip_grad_norm_(clipped, 1.0, error_if_nonfinite=True),
        },
        args.rounds,
    )
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads, median of {args.rounds} turns\n")
    print("| | ms | of zscore_grads_ |\n| --- | ---: | ---: |")
    for name, seconds in medians.items():
        print(f"| {name} | {seconds * 1e3:.1f} | {seconds / medians['zscore_grads_']:.2f} |")


if __name__ == "__main__":
    main()
