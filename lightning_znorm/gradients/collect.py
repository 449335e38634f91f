"""The parameters of an optimizer, and gradients checked before any of them is touched."""

import sys
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor
from torch.optim import Optimizer


class UnsupportedGradientError(RuntimeError):
    """A gradient that cannot be normalized where and as it is."""


def optimizer_parameters(optimizer: Optimizer) -> Iterator[tuple[str, Tensor]]:
    """The optimizer's parameters, named by their places."""
    for group_index, group in enumerate(optimizer.param_groups):
        for index, parameter in enumerate(group["params"]):
            yield f"parameter {index} of group {group_index}", parameter


def collect_grads(named_parameters: Iterable[tuple[str, Tensor]]) -> list[Tensor]:
    """Gathers the gradients to transform in place; parameters without one, and empty ones, are left out.

    A gradient whose elements share memory (an expanded one) is replaced by a copy, since it cannot be written to.

    Args:
        named_parameters: Names, for messages, and parameters. One that occurs twice counts once.

    Returns:
        Dense gradients in the order of their parameters.

    Raises:
        TypeError: If something is given that is not a tensor.
        UnsupportedGradientError: If a gradient is sparse, or sharded over processes. None has been changed then.
    """
    grads = []
    seen = set()
    for name, parameter in named_parameters:
        if not isinstance(parameter, Tensor):
            raise TypeError(f"{name} is not a tensor but a {type(parameter).__name__}: give model.parameters()")
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
        if _is_sharded(parameter):
            raise UnsupportedGradientError(
                f"the gradient of {name} is sharded over processes (FSDP, DeepSpeed or tensor parallelism), and the "
                "statistics of this process' part are not those of the whole: use a single device or DDP"
            )
        if grad.numel() == 0:
            continue
        if not grad.is_contiguous() and 0 in grad.stride():
            grad = parameter.grad = grad.clone(memory_format=torch.contiguous_format)
        grads.append(grad)
    return grads


def _is_sharded(parameter: Tensor) -> bool:
    # Marks of FSDP1 and of DeepSpeed's ZeRO-3, whose shards are plain tensors. Looked up where they are kept, because
    # a tensor takes its time to say that it has no such attribute.
    attributes = vars(parameter)
    if attributes and ("_fsdp_flattened" in attributes or "ds_id" in attributes):
        return True
    if type(parameter.grad) is Tensor:
        return False
    # A program that has DTensors has loaded them; one that has not need not.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(parameter.grad, module.DTensor)
