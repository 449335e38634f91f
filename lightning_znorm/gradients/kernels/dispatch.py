"""The choice of a kernel for each gradient that this process holds all of."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from lightning_znorm.gradients.kernels import cpu, cpu_blocks, device, triton_check
from lightning_znorm.gradients.kernels.table import Table
from lightning_znorm.gradients.methods import AffineMethod, rows_share_std
from lightning_znorm.gradients.shards import Segment, unsharded_segments


def transform_unsharded_(
    grads: Iterable[Tensor], method: AffineMethod, loss_scale: Tensor | None = None
) -> list[Tensor]:
    """Apply a method to unsharded gradients. Gradients (or rows) of one element are skipped.

    Args:
        grads: The gradients, on any devices, of floating-point or complex types.
        method: A method with statistics of each tensor or row.
        loss_scale: Factor by which the gradients are larger than the true ones, a scalar tensor. The method sees the
            true gradients, and its result is multiplied by the factor.

    Returns:
        The gradients that only the kernel for shards can transform, unchanged: those on a CPU, if rows share the
        deviation of their tensor.
    """
    grads = list(grads)
    if rows_share_std(method):
        on_device = [grad for grad in grads if not is_on_cpu(grad)]
        transform_segments_(unsharded_segments(on_device, method), method, loss_scale)
        return [grad for grad in grads if is_on_cpu(grad)]
    # One device mostly has them all. On a CPU, the time that it takes to make segments shows in small models.
    if grads and is_on_cpu(grads[0]):
        if triton_check.is_chosen():
            tables_of(unsharded_segments(grads, method))  # which may refuse gradients on devices, before any is changed
        transform_ = cpu.transform_supported_ if method.over == "tensor" else cpu.transform_supported_rows_
        grads = transform_(grads, method, loss_scale)
    if grads:
        transform_segments_(unsharded_segments(grads, method), method, loss_scale)
    return []


def transform_segments_(segments: Iterable[Segment], method: AffineMethod, loss_scale: Tensor | None = None) -> None:
    """Replace each tensor or row ``g`` of the segments by ``(g - shift) * scale``, in place.

    Args:
        segments: Memory of unsharded tensors or rows, on any devices, of floating-point or complex types.
        method: Returns shift and scale from the statistics of each tensor or row.
        loss_scale: Factor by which the gradients are larger than the true ones because the optimizer will divide by it,
            a scalar tensor. The method sees the true gradients, and its result is multiplied by the factor.
    """
    tables, on_cpu = tables_of(segments)
    with torch.no_grad():
        for table in tables:
            table.transform_(method, loss_scale)
    tensors = [segment.tensor for segment in on_cpu if not segment.by_row]
    unsupported = cpu.transform_supported_(tensors, method, loss_scale)
    by_row = [segment for segment in on_cpu if segment.by_row]
    cpu_blocks.transform_any_segments_([*map(Segment, unsupported), *by_row], method, loss_scale)


def tables_of(segments: Iterable[Segment]) -> tuple[Sequence[Table], list[Segment]]:
    """Return tables of the segments on devices, and the segments on a CPU.

    Raises:
        ValueError: If the user has chosen a kernel that does not exist.
        ImportError: If the user has chosen the Triton kernel, and there is no Triton.
        RuntimeError: If the user has chosen the Triton kernel, and it cannot run, or its results are not PyTorch's.
    """
    segments = list(segments)
    on_device = [segment for segment in segments if not is_on_cpu(segment.tensor)]
    on_cpu = [segment for segment in segments if is_on_cpu(segment.tensor)] if on_device else segments
    tables: list[Table] = []
    if on_device and triton_check.is_chosen():
        tables, on_device = triton_check.pointer_tables(on_device)
    return [*tables, *device.tables_of(on_device)], on_cpu


def is_on_cpu(tensor: Tensor) -> bool:
    """Return whether a tensor is for the kernels for CPUs."""
    return tensor.is_cpu
