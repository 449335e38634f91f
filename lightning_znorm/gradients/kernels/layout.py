"""From memory of any layout to flat tensors and matrices that a kernel transforms in place, and back."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_znorm.gradients.pieces import Piece

# Statistics are not taken in these: the usual eps is zero in float16, and a bfloat16 mean has three digits.
_UPCAST = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.complex32: torch.complex64}

# Up to this many elements each, tensors of equal shape are transformed as the rows of one matrix: to copy them there
# and back costs less than the calls it saves (a network has dozens of biases and scales of one length).
_MAX_STACKED_NUMEL = 2**14
# No more elements than these are copied at a time, unless it is a single tensor.
_COPIED_NUMEL = 2**20


class Chunk(NamedTuple):
    """Pieces that are transformed together."""

    pieces: list[Piece]
    """In the order of their entries."""
    works: list[Tensor]
    """Their workspaces: flat tensors, each a whole piece, and matrices whose rows are pieces or the rows of one."""


def workspaces(pieces: Iterable[Piece], read_only: bool = False) -> Iterator[Chunk]:
    """Yields memory to transform together in place, and carries it back when the next is asked for.

    Most workspaces are the pieces' own memory. Copies (small tensors in a matrix, half precision in float32) are of one
    tensor at a time, or of small ones that take 4 MiB together. As many tensors as that allows come at once, so that
    what is computed from their statistics, in a dozen small operations, is computed once. The same pieces are laid out
    in the same way each time.

    Args:
        pieces: The memory.
        read_only: Carries nothing back, for those who change nothing.
    """
    by_kind = defaultdict(list)
    for piece in pieces:
        by_kind[piece.tensor.device, piece.tensor.dtype].append(piece)
    for alike in by_kind.values():
        for units in _chunks(_units(alike)):
            spaces = [_workspace(unit) for unit in units]
            yield Chunk([piece for unit in units for piece in unit], [work for work, _ in spaces])
            for _, write_back_ in spaces:
                if write_back_ is not None and not read_only:
                    write_back_()


def _units(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Yields what one workspace serves: a piece, or small ones of equal shape that become the rows of a matrix."""
    by_shape = defaultdict(list)
    for piece in pieces:
        tensor = piece.tensor
        # Lazily conjugated and negated tensors, which complex autograd makes, cannot be written to by _foreach_copy_.
        if piece.by_row or tensor.numel() > _MAX_STACKED_NUMEL or tensor.is_complex() or tensor.is_neg():
            yield [piece]
        else:
            by_shape[tensor.shape].append(piece)
    for shape, equal in by_shape.items():
        rows = _COPIED_NUMEL // shape.numel()
        for start in range(0, len(equal), rows):
            yield equal[start : start + rows]


def _chunks(units: Iterable[list[Piece]]) -> Iterator[list[list[Piece]]]:
    """Gathers as many units as may be copied at a time; all, if their workspaces are no copies."""
    chunk: list[list[Piece]] = []
    copied = 0
    for unit in units:
        first = unit[0].tensor
        is_copy = len(unit) > 1 or first.dtype in _UPCAST or not first.is_contiguous()
        numel = len(unit) * first.numel() if is_copy else 0
        if copied and copied + numel > _COPIED_NUMEL:
            yield chunk
            chunk, copied = [], 0
        chunk.append(unit)
        copied += numel
    if chunk:
        yield chunk


def _workspace(unit: list[Piece]) -> tuple[Tensor, Callable[[], object] | None]:
    """Makes a workspace for one piece, or for several of equal shape.

    Returns:
        The workspace, contiguous and in the type of the statistics, and what carries it back; ``None`` where it is the
        piece's own memory.
    """
    tensors = [piece.tensor for piece in unit]
    wide = _UPCAST.get(tensors[0].dtype, tensors[0].dtype)
    if len(tensors) > 1:
        matrix = torch.stack(tensors).reshape(len(tensors), -1).to(wide)
        return matrix, lambda: torch._foreach_copy_(tensors, matrix.view(len(tensors), *tensors[0].shape).unbind())
    (tensor,), by_row = tensors, unit[0].by_row
    if wide is tensor.dtype and tensor.is_contiguous() and not tensor.is_conj() and not tensor.is_neg():
        return tensor.view(tensor.shape[0], -1) if by_row else tensor.view(-1), None
    aligned = tensor if tensor.is_contiguous() else in_memory_order(tensor, outermost=1 if by_row else 0)
    work = aligned.resolve_conj().resolve_neg().to(wide).contiguous()
    write_back_ = None if work is aligned else lambda: aligned.copy_(work)
    return work.view(len(tensor), -1) if by_row else work.view(-1), write_back_


def in_memory_order(tensor: Tensor, outermost: int) -> Tensor:
    """Permutes the dimensions, but for the first ``outermost``, into the order in which they lie in memory."""
    strides = tensor.stride()
    # A dimension of size one may have any stride.
    inner = sorted(range(outermost, tensor.ndim), key=lambda dim: (tensor.shape[dim] == 1, -strides[dim]))
    return tensor.permute(*range(outermost), *inner)
