"""Chooses the kernel that rewrites gradients: Triton's where it is trusted and runs, PyTorch's for all else."""

from collections.abc import Iterable
from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_znorm.gradients.kernels import blockwise, cpu
from lightning_znorm.gradients.methods import AffineMethod, Centralization, ZScore
from lightning_znorm.gradients.pieces import Piece
from lightning_znorm.gradients.shards import whole_pieces

if TYPE_CHECKING:
    from lightning_znorm.gradients.kernels.pointer_table import Table


def affine_(pieces: Iterable[Piece], method: AffineMethod, loss_scale: Tensor | None = None) -> None:
    """Replaces each entry ``g`` of the pieces by ``(g - shift) * scale`` with the method's shift and scale, in place.

    Args:
        pieces: Memory of whole tensors or rows, on any devices, of floating-point or complex types.
        method: Gives shift and scale from the statistics of each tensor or row.
        loss_scale: Factor by which the gradients are larger than the true ones because the optimizer will divide by it,
            a scalar tensor. The result is the true gradients' one, larger by the same factor.
    """
    tables, rest = tables_of(pieces)
    with torch.no_grad():
        for table in tables:
            table.transform_(method, loss_scale)
    left = cpu.affine_([piece.tensor for piece in rest if not piece.by_row], method, loss_scale)
    blockwise.affine_([*map(Piece, left), *(piece for piece in rest if piece.by_row)], method, loss_scale)


def affine_wholes_(grads: Iterable[Tensor], method: AffineMethod, loss_scale: Tensor | None = None) -> None:
    """Applies a method to whole gradients, but for those of less than two elements, or with rows of single elements.

    Args:
        grads: Each has one entry of the statistics, or one for each row: see ``method.over``.
        method: As for :func:`affine_`.
        loss_scale: As there.
    """
    grads = list(grads)
    # One device mostly has them all. On a CPU, small models feel the time that it takes to make pieces.
    if grads and grads[0].is_cpu and "cpu" not in DEVICE_TYPES:
        grads = (cpu.affine_ if method.over == "tensor" else cpu.affine_rows_)(grads, method, loss_scale)
    if grads:
        affine_(whole_pieces(grads, method.over), method, loss_scale)


def tables_of(pieces: Iterable[Piece]) -> tuple[list["Table"], list[Piece]]:
    """Puts the pieces that Triton can measure and rewrite into tables, and returns them with the others."""
    pieces = list(pieces)
    if not DEVICE_TYPES:
        return [], pieces
    within = [piece for piece in pieces if piece.tensor.device.type in DEVICE_TYPES]
    if not within or not runs_triton(within[0].tensor.device):
        return [], pieces
    from lightning_znorm.gradients.kernels.pointer_table import Table, alike

    groups, rest = alike(within)
    tables = []
    for group in groups:
        if runs_triton(group[0].tensor.device):
            tables.append(Table(group))
        else:
            rest += group
    if len(within) < len(pieces):
        rest += [piece for piece in pieces if piece.tensor.device.type not in DEVICE_TYPES]
    return tables, rest


# Kinds of devices whose gradients go to Triton's kernel. None yet: it has run in Triton's interpreter and through its
# compiler, and `benchmarks/gpu.sh`, which tries it on a CUDA device, has not run on one.
DEVICE_TYPES: frozenset[str] = frozenset()


@lru_cache(maxsize=64)
def runs_triton(device: torch.device) -> bool:
    """Whether Triton is there and knows the device; found out by a small gradient of either kind."""
    try:
        from lightning_znorm.gradients.kernels.pointer_table import Table

        for method in (ZScore(), Centralization()):
            Table([Piece(torch.zeros(2, 2, dtype=torch.float32, device=device), method.over == "row")]).transform_(
                method
            )
    except Exception:  # whatever Triton's, the system's or the driver's compiler raises: they are many
        return False
    return True
