"""The affine kernel in PyTorch operations: right on every device, fast on the CPU, where blocks stay in cache."""

from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor

from lightning_znorm.gradients.kernels.layout import block_size, workspaces
from lightning_znorm.gradients.methods import AffineMethod
from lightning_znorm.gradients.statistics import Statistics


@torch.no_grad()
def affine_(grads: Iterable[Tensor], method: AffineMethod, loss_scale: Tensor | None = None) -> None:
    """Replaces each gradient ``g`` by ``(g - shift) * scale`` with the method's shift and scale, in place.

    Two passes: the mean is subtracted in place and the squared deviation taken of what remains, so that a large mean
    costs no digits.

    Args:
        grads: Dense tensors of any shape and strides, on any devices, of floating-point or complex types.
        method: Gives shift and scale from the statistics of each tensor or row.
        loss_scale: Factor by which the gradients are larger than the true ones because the optimizer will divide by it,
            a scalar tensor. The result is the true gradients' one, larger by the same factor.
    """
    for work in workspaces(grads, method.over):
        if isinstance(work, Tensor):
            _transform_rows_(work, method, loss_scale)
        else:
            _transform_flats_(work, method, loss_scale)


def _transform_rows_(rows: Tensor, method: AffineMethod, loss_scale: Tensor | None) -> None:
    mean = rows.mean(dim=1)
    rows.sub_(mean.unsqueeze(1))
    m2 = torch.linalg.vector_norm(rows, dim=1).square_() if method.needs_std else None
    count = mean.real.new_full(mean.shape, rows.shape[1])
    offset, scale = _offset_and_scale(count, mean, m2, method, loss_scale)
    if offset is not None:
        rows.add_(offset.unsqueeze(1))
    if scale is not None:
        rows.mul_(scale.unsqueeze(1))


def _transform_flats_(flats: list[Tensor], method: AffineMethod, loss_scale: Tensor | None) -> None:
    sums, m2s = zip(*(_center_(flat, method.needs_std) for flat in flats), strict=True)
    count = _counts(tuple(flat.numel() for flat in flats), sums[0].real.dtype, sums[0].device)
    m2 = torch.stack(m2s).real if method.needs_std else None
    offset, scale = _offset_and_scale(count, torch.stack(sums) / count, m2, method, loss_scale)
    if offset is not None:
        for flat, own_offset in zip(flats, offset.unbind(), strict=True):
            flat.add_(own_offset)
    if scale is not None:
        for flat, own_scale in zip(flats, scale.unbind(), strict=True):
            flat.mul_(own_scale)


def _center_(flat: Tensor, needs_std: bool) -> tuple[Tensor, Tensor | None]:
    """Subtracts its mean from a flat tensor; returns the former sum and the squared deviation as scalar tensors."""
    numel = flat.numel()
    block = block_size(flat.device)
    # Not vector_norm, which takes three times as long and loses digits.
    dot = torch.vdot if flat.is_complex() else torch.dot
    total = flat.sum()
    m2s = []
    for part in (flat,) if numel <= block else torch.split(flat, block):
        part.sub_(total, alpha=1 / numel)
        if needs_std:
            m2s.append(dot(part, part))  # while the part is in cache
    if not needs_std:
        return total, None
    return total, m2s[0] if len(m2s) == 1 else torch.stack(m2s).sum()


@lru_cache(maxsize=1024)
def _counts(numels: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """The tensors' sizes on their device; cached, because a copy to a device waits for it.

    So a CUDA graph can only be captured of sizes that have been seen before, as in its warm-up.
    """
    return torch.tensor(numels, dtype=dtype, device=device)


def _offset_and_scale(
    count: Tensor, mean: Tensor, m2: Tensor | None, method: AffineMethod, loss_scale: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """What is left to add to, and to multiply with, gradients whose mean has been subtracted."""
    stats = Statistics(count, mean, m2)
    if loss_scale is not None:
        loss_scale = loss_scale.to(mean.device, non_blocking=True)
        # Twice, and not by the square, which overflows beyond 2^64.
        stats = Statistics(count, mean / loss_scale, None if m2 is None else m2 / loss_scale / loss_scale)
    shift, scale = method.affine(stats)
    for part in (shift, scale):
        if part is not None and (not isinstance(part, Tensor) or part.shape != mean.shape):
            raise TypeError(
                f"{method}.affine must return a shift and a scale that are None or tensors of shape "
                f"{tuple(mean.shape)}, like the statistics, and returned {part!r}"
            )
    if shift is stats.mean:
        return None, scale
    if shift is None:
        return mean, scale
    return mean - (shift if loss_scale is None else shift * loss_scale), scale
