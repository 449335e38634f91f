"""The affine kernels for whole gradients on a CPU, and which of them is whose."""

from collections import defaultdict
from collections.abc import Iterable
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from lightning_znorm.gradients.kernels import blockwise, one_pass, segments
from lightning_znorm.gradients.methods import AffineMethod, Centralization, ZScore


def affine_(tensors: Iterable[Tensor], method: AffineMethod, loss_scale: Tensor | None = None) -> list[Tensor]:
    """Applies a method to the tensors that a kernel for the CPU can transform, each with one entry of the statistics.

    Args:
        tensors: On any devices; those of less than two elements stay as they are.
        method: As for :func:`~lightning_znorm.gradients.kernels.affine_`.
        loss_scale: As there.

    Returns:
        The tensors that are left for other kernels, as they were: on other devices, not contiguous, of other types.
    """
    left: list[Tensor] = []
    tiny: defaultdict[torch.dtype, list[Tensor]] = defaultdict(list)
    singles: defaultdict[torch.dtype, list[Tensor]] = defaultdict(list)
    needs_std, max_tiny = method.needs_std, segments.MAX_NUMEL
    for tensor in tensors:
        numel, dtype = tensor.numel(), tensor.dtype
        if numel < 2:
            continue
        if not _is_plain(tensor):
            left.append(tensor)
        elif numel <= max_tiny and dtype in segments.TYPES:
            tiny[dtype].append(tensor)
        elif needs_std and dtype in one_pass.TYPES:
            singles[dtype].append(tensor)
        else:
            left.append(tensor)
    with _without_autograd(method):
        for alike in tiny.values():
            segments.affine_(alike, method, loss_scale)
        for alike in singles.values():
            one_pass.affine_(alike, method, loss_scale)
    return left


def affine_rows_(tensors: Iterable[Tensor], method: AffineMethod, loss_scale: Tensor | None = None) -> list[Tensor]:
    """Applies a method to each row of the tensors that need no other workspace than their own memory.

    Args:
        tensors: On any devices; those without rows of several elements stay as they are.
        method: As for :func:`affine_`.
        loss_scale: As there.

    Returns:
        As there.
    """
    left: list[Tensor] = []
    matrices: defaultdict[torch.dtype, list[Tensor]] = defaultdict(list)
    for tensor in tensors:
        ndim = tensor.ndim
        if ndim < 2 or tensor.numel() <= (length := tensor.size(0)):
            continue
        if _is_plain(tensor) and tensor.dtype in one_pass.TYPES:
            matrices[tensor.dtype].append(tensor if ndim == 2 else tensor.view(length, -1))
        else:
            left.append(tensor)
    with _without_autograd(method):
        for alike in matrices.values():
            blockwise.transform_(alike, method, loss_scale)
    return left


def _is_plain(tensor: Tensor) -> bool:
    """Whether a tensor's elements lie in the memory of a CPU, one after the other, as they are."""
    # Subclasses of Tensor have their own ways, which inference mode need not suit.
    return type(tensor) is Tensor and tensor.is_cpu and tensor.is_contiguous() and not tensor.is_neg()


def _without_autograd(method: AffineMethod) -> AbstractContextManager[object]:
    """Inference mode, in which an operation costs a tenth less than with ``no_grad``, for our own methods.

    A method of somebody else's may keep what it is given, and tensors of inference mode are good for less.
    """
    return torch.inference_mode() if type(method) in (ZScore, Centralization) else torch.no_grad()
