"""The affine kernel in PyTorch operations: right on every device, fast on the CPU, where blocks stay in cache."""

from collections.abc import Iterable
from functools import lru_cache

import torch
from torch import Tensor

from lightning_znorm.gradients.kernels import one_pass
from lightning_znorm.gradients.kernels.layout import workspaces
from lightning_znorm.gradients.kernels.maps import residual_map
from lightning_znorm.gradients.methods import AffineMethod
from lightning_znorm.gradients.pieces import Piece
from lightning_znorm.gradients.statistics import Statistics

# Elements of which the deviation is taken while they are in cache, and that keep a dot product exact. Elsewhere than on
# a CPU a block is a kernel launch, and 2^30 elements keep to 32-bit indices.
_CPU_BLOCK = one_pass.BLOCK
_DEVICE_BLOCK = 2**30


@torch.no_grad()
def affine_(pieces: Iterable[Piece], method: AffineMethod, loss_scale: Tensor | None = None) -> None:
    """Replaces each entry ``g`` of the pieces by ``(g - shift) * scale`` with the method's shift and scale, in place.

    Takes two passes: the mean is subtracted in place and the squared deviation taken of what remains, so that a large
    mean costs no digits.

    Args:
        pieces: Memory of whole tensors or rows, on any devices, of floating-point or complex types.
        method: Gives shift and scale from the statistics of each tensor or row.
        loss_scale: Factor by which the gradients are larger than the true ones because the optimizer will divide by it,
            a scalar tensor. The result is the true gradients' one, larger by the same factor.
    """
    for chunk in workspaces(pieces):
        transform_(chunk.works, method, loss_scale)


def transform_(works: list[Tensor], method: AffineMethod, loss_scale: Tensor | None = None) -> None:
    """Applies a method to flat tensors, and to each row of matrices, all on one device and of one type."""
    count, sums, m2 = center_(works, method.needs_std)
    rewrite_(works, *residual_map(Statistics(count, sums / count, m2), method, loss_scale))


def center_(works: list[Tensor], needs_std: bool) -> tuple[Tensor, Tensor, Tensor | None]:
    """Subtracts the mean of flat tensors, and of each row of matrices.

    Returns:
        Counts, former sums and, if needed, squared deviations from the mean, each of shape ``(S,)``: one entry for each
        flat tensor and row, in order.
    """
    sums, m2s = zip(*(_center_(work, needs_std) for work in works), strict=True)
    count = _counts(tuple(work.shape for work in works), sums[0].real.dtype, sums[0].device)
    if len({total.ndim for total in sums}) > 1:
        sums = tuple(total.view(-1) for total in sums)
    return count, torch.cat(sums).view(-1), torch.cat(m2s).real if needs_std else None


def rewrite_(works: list[Tensor], offset: Tensor | None, scale: Tensor | None) -> None:
    """Adds an offset to each flat tensor and row of a matrix, and then multiplies it with a scale."""
    if offset is not None:
        torch._foreach_add_(works, _dealt_out(offset, works))
    if scale is not None:
        torch._foreach_mul_(works, _dealt_out(scale, works))


def _center_(work: Tensor, needs_std: bool) -> tuple[Tensor, Tensor]:
    """Subtracts the mean of a flat tensor, or of each row of a matrix.

    Returns:
        The former sums, of shape ``(1,)`` or ``(S, 1)``, and, if needed, the squared deviations, ``(1,)`` or ``(S,)``.
    """
    numel = work.shape[-1]
    total = work.sum(-1, keepdim=True)
    if work.ndim > 1:
        work.sub_(total, alpha=1 / numel)
        return total, torch.linalg.vector_norm(work, dim=1).square_() if needs_std else total
    # Not vector_norm, which takes three times as long and loses digits.
    dot = torch.vdot if work.is_complex() else torch.dot
    block = _CPU_BLOCK if work.device.type == "cpu" else _DEVICE_BLOCK
    m2s = []
    # Backwards, because the end of the tensor is what summing it has left in cache.
    for part in (work,) if numel <= block else reversed(torch.split(work, block)):
        part.sub_(total, alpha=1 / numel)
        if needs_std:
            m2s.append(dot(part, part))  # while the part is in cache
    if len(m2s) > 1:
        return total, torch.stack(m2s).sum(0, keepdim=True)
    return total, m2s[0].view(1) if needs_std else total


def _dealt_out(entries: Tensor, works: list[Tensor]) -> list[Tensor]:
    """One entry for each flat tensor, a column of them for each matrix."""
    if all(work.ndim == 1 for work in works):
        return list(entries.unbind())
    own_entries = torch.split(entries, [1 if work.ndim == 1 else len(work) for work in works])
    return [own if work.ndim == 1 else own.unsqueeze(1) for work, own in zip(works, own_entries, strict=True)]


@lru_cache(maxsize=1024)
@torch.inference_mode(False)  # for whoever asks next
def _counts(shapes: tuple[torch.Size, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Elements behind each entry of the statistics; cached, because a copy to a device waits for it.

    So a CUDA graph can only be captured of sizes that have been seen before, as in its warm-up.
    """
    counts = [shape[-1] for shape in shapes for _ in range(shape[0] if len(shape) > 1 else 1)]
    return torch.tensor(counts, dtype=dtype, device=device)
