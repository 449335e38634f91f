"""The gradients of some parameters, checked before any of them is touched."""

import sys
from collections.abc import Iterable

import torch
from torch import Tensor


class UnsupportedGradientError(RuntimeError):
    """A gradient that cannot be normalized where and as it is."""


def collect_grads(named_parameters: Iterable[tuple[str, Tensor]]) -> list[Tensor]:
    """Gathers the gradients to transform in place; parameters without one, and empty ones, are left out.

    A gradient whose elements share memory (an expanded one) is replaced by a copy, since it cannot be written to.

    Args:
        named_parameters: Names, for messages, and parameters. One that occurs twice counts once.

    Returns:
        Dense gradients in the order of their parameters.

    Raises:
        UnsupportedGradientError: If a gradient is sparse, or a DTensor. No gradient has been changed then.
    """
    grads = []
    seen = set()
    for name, parameter in named_parameters:
        grad = parameter.grad
        if grad is None or id(parameter) in seen:
            continue
        seen.add(id(parameter))
        if grad.layout != torch.strided:
            raise UnsupportedGradientError(
                f"the gradient of {name} is sparse ({grad.layout}, shape {tuple(grad.shape)}), and a sparse tensor has "
                "no mean over all its elements that would leave it sparse: use dense gradients (`sparse=False` in "
                "torch.nn.Embedding), or leave this parameter out"
            )
        if _is_dtensor(grad):
            raise UnsupportedGradientError(
                f"the gradient of {name} is a DTensor, of which this process holds a part, and the statistics of a "
                "part are not those of the whole: use single-device or DDP training"
            )
        if grad.numel() == 0:
            continue
        if 0 in grad.stride() and not grad.is_contiguous():
            grad = parameter.grad = grad.clone(memory_format=torch.contiguous_format)
        grads.append(grad)
    return grads


def _is_dtensor(tensor: Tensor) -> bool:
    # A program that has DTensors has loaded them; one that has not need not.
    module = sys.modules.get("torch.distributed.tensor")
    return type(tensor) is not Tensor and module is not None and isinstance(tensor, module.DTensor)
