"""The choice of a kernel for each gradient: Triton's where it is trusted and runs, PyTorch's for all others."""

from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_znorm.gradients.kernels import cpu, torch_ops
from lightning_znorm.gradients.methods import AffineMethod, Centralization, ZScore
from lightning_znorm.gradients.shards import Segment, unsharded_segments

if TYPE_CHECKING:
    from lightning_znorm.gradients.kernels.triton import PointerTable


def transform_unsharded_(grads: Iterable[Tensor], method: AffineMethod, loss_scale: Tensor | None = None) -> None:
    """Apply a method to unsharded gradients. Gradients (or rows) of one element are skipped.

    Args:
        grads: The gradients, on any devices, of floating-point or complex types.
        method: As in :func:`transform_segments_`.
        loss_scale: As in :func:`transform_segments_`.
    """
    grads = list(grads)
    # One device mostly has them all. On a CPU, the time that it takes to make segments shows in small models.
    if grads and grads[0].is_cpu and "cpu" not in DEVICE_TYPES:
        transform_ = cpu.transform_supported_ if method.over == "tensor" else cpu.transform_supported_rows_
        grads = transform_(grads, method, loss_scale)
    if grads:
        transform_segments_(unsharded_segments(grads, method.over), method, loss_scale)


def transform_segments_(segments: Iterable[Segment], method: AffineMethod, loss_scale: Tensor | None = None) -> None:
    """Replace each tensor or row ``g`` of the segments by ``(g - shift) * scale``, in place.

    Args:
        segments: Memory of unsharded tensors or rows, on any devices, of floating-point or complex types.
        method: Returns shift and scale from the statistics of each tensor or row.
        loss_scale: Factor by which the gradients are larger than the true ones because the optimizer will divide by it,
            a scalar tensor. The method sees the true gradients, and its result is multiplied by the factor.
    """
    tables, remaining = pointer_tables(segments)
    with torch.no_grad():
        for table in tables:
            table.transform_(method, loss_scale)
    tensors = [segment.tensor for segment in remaining if not segment.by_row]
    unsupported = cpu.transform_supported_(tensors, method, loss_scale)
    by_row = [segment for segment in remaining if segment.by_row]
    torch_ops.transform_any_segments_([*map(Segment, unsupported), *by_row], method, loss_scale)


def pointer_tables(segments: Iterable[Segment]) -> tuple[list["PointerTable"], list[Segment]]:
    """Return tables of the segments that Triton can measure and rewrite, and the remaining segments."""
    segments = list(segments)
    if not DEVICE_TYPES:
        return [], segments
    on_device = [segment for segment in segments if segment.tensor.device.type in DEVICE_TYPES]
    if not on_device or not runs_triton(on_device[0].tensor.device):
        return [], segments
    from lightning_znorm.gradients.kernels.triton import PointerTable, group_by_table

    groups, remaining = group_by_table(on_device)
    tables = []
    for group in groups:
        if runs_triton(group[0].tensor.device):
            tables.append(PointerTable(group))
        else:
            remaining += group
    if len(on_device) < len(segments):
        remaining += [segment for segment in segments if segment.tensor.device.type not in DEVICE_TYPES]
    return tables, remaining


# Kinds of devices whose gradients go to Triton's kernel. None yet: it has run in Triton's interpreter and through its
# compiler, and `benchmarks/gpu.sh`, which tries it on a CUDA device, has not run on one.
DEVICE_TYPES: frozenset[str] = frozenset()


@lru_cache(maxsize=64)
def runs_triton(device: torch.device) -> bool:
    """Return whether Triton is installed and runs on the device. Two small gradients are tried, one of them by row."""
    try:
        from lightning_znorm.gradients.kernels.triton import PointerTable

        for method in (ZScore(), Centralization()):
            grad = torch.zeros(2, 2, dtype=torch.float32, device=device)
            PointerTable([Segment(grad, method.over == "row")]).transform_(method)
    except Exception:  # Triton's, the system's and the driver's compilers raise exceptions of many classes
        return False
    return True
