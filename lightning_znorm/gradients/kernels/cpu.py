"""The affine kernels for whole gradients on a CPU, and which of them is whose."""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_znorm.gradients.kernels import one_pass, segments
from lightning_znorm.gradients.methods import AffineMethod, ZScore


def affine_(tensors: Iterable[Tensor], method: AffineMethod, loss_scale: Tensor | None = None) -> list[Tensor]:
    """Applies a method to the tensors that a kernel for the CPU can transform, each with one entry of the statistics.

    Args:
        tensors: On any devices; those of less than two elements stay as they are.
        method: As for :func:`~lightning_znorm.gradients.kernels.affine_`.
        loss_scale: As there.

    Returns:
        The tensors that are left for other kernels, as they were: on other devices, not contiguous, of other types.
    """
    tiny: defaultdict[torch.dtype, list[Tensor]] = defaultdict(list)
    singles: defaultdict[torch.dtype, list[Tensor]] = defaultdict(list)
    left: list[Tensor] = []
    needs_std, max_tiny = method.needs_std, segments.MAX_NUMEL
    for tensor in tensors:
        numel, dtype = tensor.numel(), tensor.dtype
        if numel < 2:
            continue
        # Subclasses of Tensor have their own ways, which inference mode need not suit.
        if type(tensor) is not Tensor or not tensor.is_cpu or not tensor.is_contiguous() or tensor.is_neg():
            left.append(tensor)
        elif numel <= max_tiny and dtype in segments.TYPES:
            tiny[dtype].append(tensor)
        elif needs_std and dtype in one_pass.TYPES:
            singles[dtype].append(tensor)
        else:
            left.append(tensor)
    # In inference mode an operation costs a tenth less than with no_grad. A method of somebody else's may keep what it
    # is given, though, and tensors of inference mode are good for less.
    with torch.inference_mode() if type(method) is ZScore else torch.no_grad():
        for alike in tiny.values():
            segments.affine_(alike, method, loss_scale)
        for alike in singles.values():
            one_pass.affine_(alike, method, loss_scale)
    return left
