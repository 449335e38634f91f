"""Time of ``zscore_grads_`` beside ``clip_grad_norm_`` and other ways to write it: ``python -m benchmarks.kernels``.

Every row works on the same gradients in the same process, each in its turn; the ratio is that of the medians. All rows
normalize in place, so each finds the gradients that the row before it left: of the same size, in the same memory.
"""

import argparse
import importlib.util
from collections.abc import Callable

import timm
import torch
from torch import Tensor, nn
from torch.nn.utils import clip_grad_norm_

from benchmarks.timing import alternating_medians
from lightning_znorm.functional import centralize_grads_, zscore_grads_
from lightning_znorm.models import resnet56

MODELS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-56": resnet56,
    "DenseNet-121": lambda: timm.create_model("densenet121", num_classes=10),
    "ResNet-152": lambda: timm.create_model("resnet152", num_classes=10),
}


def tensor_by_tensor_(parameters: list[Tensor], eps: float = 1e-10) -> None:
    """The obvious loop."""
    for parameter in parameters:
        grad = parameter.grad
        assert grad is not None
        grad.copy_((grad - grad.mean()) / (grad.std(correction=0) + eps))


def rows(parameters: list[Tensor]) -> dict[str, Callable[[], object]]:
    functions: dict[str, Callable[[], object]] = {
        "clip_grad_norm_": lambda: clip_grad_norm_(parameters, 1.0),
        "zscore_grads_": lambda: zscore_grads_(parameters),
        "centralize_grads_": lambda: centralize_grads_(parameters),
        "obvious loop": lambda: tensor_by_tensor_(parameters),
    }
    if importlib.util.find_spec("pytorch_optimizer"):
        from pytorch_optimizer.optimizer.gradient_centralization import centralize_gradient
        from pytorch_optimizer.optimizer.utils import normalize_gradient

        def normalize() -> None:
            for parameter in parameters:
                normalize_gradient(parameter.grad)

        functions["pytorch_optimizer normalize_gradient"] = normalize
        functions["pytorch_optimizer centralize_gradient"] = lambda: centralize_gradient([p.grad for p in parameters])
    return functions


def main() -> None:
    parser = argparse.ArgumentParser(description="Time of zscore_grads_ beside clip_grad_norm_.")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--threads", type=int, default=2, help="CPU threads (default: 2)")
    parser.add_argument("--rounds", type=int, default=15, help="timed calls of each row (default: 15)")
    args = parser.parse_args()

    torch.set_num_threads(args.threads)
    print(f"torch {torch.__version__}, CPU, {args.threads} threads, float32, median of {args.rounds} calls\n")
    print(f"| {'model':12} | {'function':37} | {'ms':>8} | {'of clip_grad_norm_':>18} |")
    print(f"| {'-' * 12} | {'-' * 37} | {'-' * 7}: | {'-' * 17}: |")
    for model in args.models:
        parameters: list[Tensor] = list(MODELS[model]().parameters())
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter) * 1e-3
        medians = alternating_medians(rows(parameters), args.rounds)
        for name, seconds in medians.items():
            print(f"| {model:12} | {name:37} | {seconds * 1e3:8.2f} | {seconds / medians['clip_grad_norm_']:18.2f} |")


if __name__ == "__main__":
    main()
