"""From gradients of any layout to flat tensors and matrices that a kernel transforms in place, and back."""

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from typing import Literal

import torch
from torch import Tensor

# Statistics are not taken in these: the usual eps is zero in float16, and a bfloat16 mean has three digits.
_UPCAST = {torch.float16: torch.float32, torch.bfloat16: torch.float32, torch.complex32: torch.complex64}

# Up to this many elements each, tensors of equal shape are transformed as the rows of one matrix: to copy them there
# and back costs less than the calls it saves (a network has dozens of biases and scales of one length).
_MAX_STACKED_NUMEL = 2**14
# No more elements than these are copied at a time, unless it is a single tensor.
_COPIED_NUMEL = 2**20


def workspaces(grads: Iterable[Tensor], over: Literal["tensor", "row"]) -> Iterator[list[Tensor]]:
    """Yields tensors to transform together in place, and carries them back when the next are asked for.

    Gradients (or rows) of a single element are left out: they have no deviation. Most workspaces are the gradients'
    own memory. Copies (small tensors in a matrix, half precision in float32) are of one tensor at a time, or of small
    ones that take 4 MiB together. As many tensors as that allows come at once, so that what is computed from their
    statistics, in a dozen small operations, is computed once.

    Yields:
        Flat tensors, each a whole gradient, and matrices whose rows are whole gradients or the rows of one.
    """
    by_kind = defaultdict(list)
    for grad in grads:
        by_kind[grad.device, grad.dtype].append(grad)
    for alike in by_kind.values():
        for chunk in _chunks(_units(alike, over)):
            spaces = [_workspace(unit, over) for unit in chunk]
            yield [work for work, _ in spaces]
            for _, write_back_ in spaces:
                if write_back_ is not None:
                    write_back_()


def _units(grads: Iterable[Tensor], over: Literal["tensor", "row"]) -> Iterator[list[Tensor]]:
    """Yields what one workspace serves: a gradient, or small ones of equal shape that become the rows of a matrix."""
    by_shape = defaultdict(list)
    for grad in grads:
        if over == "row":
            if grad.ndim > 1 and grad.numel() > len(grad):
                yield [grad]
        # Lazily conjugated and negated tensors, which complex autograd makes, cannot be written to by _foreach_copy_.
        elif grad.numel() > _MAX_STACKED_NUMEL or ((grad.is_complex() or grad.is_neg()) and grad.numel() > 1):
            yield [grad]
        elif grad.numel() > 1:
            by_shape[grad.shape].append(grad)
    for shape, equal in by_shape.items():
        rows = _COPIED_NUMEL // shape.numel()
        for start in range(0, len(equal), rows):
            yield equal[start : start + rows]


def _chunks(units: Iterable[list[Tensor]]) -> Iterator[list[list[Tensor]]]:
    """Gathers as many units as may be copied at a time; all, if their workspaces are no copies."""
    chunk: list[list[Tensor]] = []
    copied = 0
    for unit in units:
        is_copy = len(unit) > 1 or unit[0].dtype in _UPCAST or not unit[0].is_contiguous()
        numel = len(unit) * unit[0].numel() if is_copy else 0
        if copied and copied + numel > _COPIED_NUMEL:
            yield chunk
            chunk, copied = [], 0
        chunk.append(unit)
        copied += numel
    if chunk:
        yield chunk


def _workspace(grads: list[Tensor], over: Literal["tensor", "row"]) -> tuple[Tensor, Callable[[], object] | None]:
    """Makes a workspace for one gradient, or for several of equal shape.

    Returns:
        The workspace, contiguous and in the type of the statistics, and what carries it back; ``None`` where it is the
        gradient's own memory.
    """
    wide = _UPCAST.get(grads[0].dtype, grads[0].dtype)
    if len(grads) > 1:
        matrix = torch.stack(grads).reshape(len(grads), -1).to(wide)
        return matrix, lambda: torch._foreach_copy_(grads, matrix.view(len(grads), *grads[0].shape).unbind())
    (grad,) = grads
    aligned = grad if grad.is_contiguous() else _in_memory_order(grad, outermost=1 if over == "row" else 0)
    work = aligned.resolve_conj().resolve_neg().to(wide).contiguous()
    write_back_ = None if work is aligned else lambda: aligned.copy_(work)
    return work.view(len(grad), -1) if over == "row" else work.view(-1), write_back_


def _in_memory_order(grad: Tensor, outermost: int) -> Tensor:
    """Permutes the dimensions, but for the first ``outermost``, into the order in which they lie in memory."""
    strides = grad.stride()
    # A dimension of size one may have any stride.
    inner = sorted(range(outermost, grad.ndim), key=lambda dim: (grad.shape[dim] == 1, -strides[dim]))
    return grad.permute(*range(outermost), *inner)
