"""How the memory of gradients is read: the type of statistics, and the order of dimensions."""

import torch
from torch import Tensor

# Statistics are not taken in these: the usual eps is zero in float16, and a bfloat16 mean has three digits.
UPCAST = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.complex32: torch.complex64}


def in_memory_order(tensor: Tensor, outermost: int) -> Tensor:
    """Permute the dimensions after the first ``outermost`` ones into the order in which they lie in memory."""
    strides = tensor.stride()
    # A dimension of size one may have any stride.
    inner = sorted(range(outermost, tensor.ndim), key=lambda dim: (tensor.shape[dim] == 1, -strides[dim]))
    return tensor.permute(*range(outermost), *inner)
