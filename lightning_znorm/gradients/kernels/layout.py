"""From gradients of any layout to flat tensors and matrices that a kernel transforms in place, and back."""

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor

# Statistics are not taken in these: the usual eps is zero in float16, and a bfloat16 mean has three digits.
_UPCAST = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.complex32: torch.complex64}

# Up to this many elements each, tensors of equal shape are transformed as the rows of one matrix: to copy them there
# and back costs less than the calls it saves (a network has dozens of biases and scales of one length).
_MAX_STACKED_NUMEL = 2**14
_STACK_NUMEL = 2**20  # of such a matrix


def block_size(device: torch.device) -> int:
    """How many elements should go through all their passes together.

    On a CPU they fit the second-level caches of a few cores, amortize the arithmetic on the statistics, and keep a
    float32 dot product exact to a few units of rounding (it is off by 4e-4 at 2^27 elements). Elsewhere each block is a
    kernel launch, and 2^30 elements keep to 32-bit indices.
    """
    return 2**20 if device.type == "cpu" else 2**30


def workspaces(grads: Iterable[Tensor], over: Literal["tensor", "row"]) -> Iterator[list[Tensor] | Tensor]:
    """Yields tensors to transform in place, and carries them back to the gradients when the next is asked for.

    Gradients (or rows) of a single element are left out: they have no deviation. Most workspaces are the gradients'
    own memory. Half-precision ones are float32 copies: of one tensor at a time, or of small ones, 4 MiB together.

    Yields:
        Flat tensors, each a whole gradient, or a matrix whose rows are whole gradients or rows of one.
    """
    by_kind = defaultdict(list)
    for grad in grads:
        by_kind[grad.device, grad.dtype].append(grad)
    for alike in by_kind.values():
        yield from _matrices(alike) if over == "row" else _stacks_and_flats(alike)


def _matrices(grads: list[Tensor]) -> Iterator[Tensor]:
    for grad in grads:
        if grad.ndim > 1 and grad.numel() > len(grad):
            aligned, work = _workspace(grad, outermost=1)
            yield work.view(len(grad), -1)
            _write_back_(aligned, work)


def _stacks_and_flats(grads: list[Tensor]) -> Iterator[list[Tensor] | Tensor]:
    singles = []
    by_shape = defaultdict(list)
    for grad in grads:
        if grad.numel() < 2:
            continue
        # _foreach_copy_ refuses lazily conjugated and negated tensors, which complex autograd makes.
        if grad.numel() > _MAX_STACKED_NUMEL or grad.is_complex() or grad.is_neg():
            singles.append(grad)
        else:
            by_shape[grad.shape].append(grad)
    for shape, equal in by_shape.items():
        if len(equal) == 1:
            singles += equal
        else:
            yield from _stacks(equal, rows=_STACK_NUMEL // shape.numel())
    for chunk in _chunks(singles):
        pairs = [_workspace(grad) for grad in chunk]
        yield [work.view(-1) for _, work in pairs]
        for aligned, work in pairs:
            _write_back_(aligned, work)


def _stacks(grads: list[Tensor], rows: int) -> Iterator[Tensor]:
    for start in range(0, len(grads), rows):
        stacked = grads[start : start + rows]
        matrix = torch.stack(stacked).reshape(len(stacked), -1)
        matrix = matrix.to(_UPCAST.get(matrix.dtype, matrix.dtype))
        yield matrix
        torch._foreach_copy_(stacked, matrix.view(len(stacked), *stacked[0].shape).unbind())


def _chunks(grads: list[Tensor]) -> Iterator[list[Tensor]]:
    """Cuts a list where a block is full, and around every tensor that will be copied to a wider type."""
    chunk: list[Tensor] = []
    elements = 0
    for grad in grads:
        if chunk and (grad.dtype in _UPCAST or elements + grad.numel() > block_size(grad.device)):
            yield chunk
            chunk, elements = [], 0
        chunk.append(grad)
        elements += grad.numel()
    if chunk:
        yield chunk


def _workspace(grad: Tensor, outermost: int = 0) -> tuple[Tensor, Tensor]:
    """Views the gradient in the order of its memory, its first ``outermost`` dimensions in place.

    Returns:
        The view, and a contiguous tensor of its shape in the type of the statistics: the view itself where possible.
    """
    aligned = grad
    if not grad.is_contiguous():
        # A dimension of size one may have any stride.
        strides = grad.stride()
        inner = sorted(range(outermost, grad.ndim), key=lambda dim: (grad.shape[dim] == 1, -strides[dim]))
        aligned = grad.permute(*range(outermost), *inner)
    return aligned, aligned.to(_UPCAST.get(grad.dtype, grad.dtype)).contiguous()


def _write_back_(aligned: Tensor, work: Tensor) -> None:
    if work is not aligned:
        aligned.copy_(work)
