"""Gradients that share memory. To rewrite one of them in place would change another one, or the same one twice."""

import math
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace
from functools import lru_cache
from operator import attrgetter, gt
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from lightning_znorm.gradients.exceptions import UnsupportedGradientError
from lightning_znorm.gradients.shards import Shard

if TYPE_CHECKING:
    from lightning_znorm.gradients.slots import GradientSlot


def may_share_memory(unsharded: Sequence[Tensor], shards: Sequence[Shard]) -> bool:
    """Return whether any two gradients may have elements in common. It is fast, because every step asks it."""
    tensors = [*unsharded, *(shard.local for shard in shards if shard.local is not None)] if shards else unsharded
    try:
        storages = set(map(_identity, map(Tensor.untyped_storage, tensors)))
    except RuntimeError:  # from tensors of backends that have no storage, such as XLA's
        return False
    if len(storages) == len(tensors):
        return False
    # DDP, FSDP and DeepSpeed cut gradients from common storages, one after the other. Intervals are disjoint if, both
    # sorted, each ends before the next one starts.
    starts, ends = [], []
    for tensor in tensors:
        start = tensor.data_ptr()
        starts.append(start)
        ends.append(start + (tensor.nbytes if tensor.is_contiguous() else _span(tensor)))
    starts.sort()
    ends.sort()
    return any(map(gt, ends, starts[1:]))


def without_duplicates(
    slots: Iterable["GradientSlot"], grads: Sequence[Tensor | Shard | None]
) -> tuple[list[Tensor], list[Shard]]:
    """Return the unsharded gradients and the shards to rewrite, so that no element is rewritten twice.

    If parameters have the same gradient, in the same memory, it is rewritten once, and is the result for all of them.

    Args:
        slots: The slots of the gradients, which name them.
        grads: The gradients.

    Raises:
        UnsupportedGradientError: If other gradients have elements in common.
    """
    unique = list(grads)
    by_storage: defaultdict[int, dict[_Layout, int]] = defaultdict(dict)
    for number, grad in enumerate(grads):
        tensor = grad.local if isinstance(grad, Shard) else grad
        if tensor is None or tensor.numel() == 0:
            continue
        layouts = by_storage[_identity(tensor.untyped_storage())]
        layout = _layout(tensor)
        first = layouts.setdefault(layout, number)
        if first == number:
            continue
        if not _are_the_same(grads[first], grad):
            raise _overlap(slots, first, number)
        # All ranks need statistics of each shard, so the second one is rewritten in a copy.
        unique[number] = replace(grad, local=tensor.clone()) if isinstance(grad, Shard) else None
    for layouts in by_storage.values():
        if len(layouts) > 1 and (pair := _overlapping(tuple(layouts))):
            first, second = (list(layouts.values())[index] for index in pair)
            raise _overlap(slots, first, second)
    return [grad for grad in unique if isinstance(grad, Tensor)], [grad for grad in unique if isinstance(grad, Shard)]


def has_internal_overlap(tensor: Tensor) -> bool:
    """Return whether elements of a tensor share memory, as in an expanded one. If strides cannot tell, it says yes."""
    if tensor.is_contiguous():
        return False
    verdict = torch._debug_has_internal_overlap(tensor)  # torch has no public function: 0 no, 1 yes, 2 unknown
    if verdict < 2:
        return bool(verdict)
    # Elements are disjoint if the stride of each dimension is longer than what the smaller strides span.
    span = 0
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            if stride <= span:
                return True
            span += stride * (size - 1)
    return False


class _Layout(NamedTuple):
    """Where the elements of a tensor are in its storage, and how they are read."""

    start: int  # in bytes, as the strides are
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    kind: tuple[torch.dtype, bool, bool]


def _layout(tensor: Tensor) -> _Layout:
    itemsize = tensor.element_size()
    return _Layout(
        int(tensor.storage_offset()) * itemsize,
        tuple(tensor.shape),
        # A dimension of size one may have any stride.
        tuple(
            stride * itemsize if size > 1 else itemsize
            for stride, size in zip(tensor.stride(), tensor.shape, strict=True)
        ),
        itemsize,
        (tensor.dtype, tensor.is_conj(), tensor.is_neg()),
    )


@lru_cache(maxsize=64)
def _overlapping(layouts: tuple[_Layout, ...]) -> tuple[int, int] | None:
    """Return the indices of the first two tensors of a storage that have an element in common.

    It is tried out on a mask of the storage. Cached, because such gradients mostly have the same layouts in every step.
    """
    unit = math.gcd(*(layout.itemsize for layout in layouts))
    origin = min(layout.start for layout in layouts)
    masks = []
    for start, shape, strides, itemsize, _ in layouts:
        # The units of an element are one more dimension.
        steps = [stride // unit for stride in strides]
        masks.append(((*shape, itemsize // unit), (*steps, 1), (start - origin) // unit))
    length = max(
        start + 1 + sum((size - 1) * step for size, step in zip(shape, steps, strict=True))
        for shape, steps, start in masks
    )
    memory = torch.zeros(length, dtype=torch.bool, device="cpu")
    views = [memory.as_strided(*mask) for mask in masks]
    for second, view in enumerate(views):
        if view.any():
            memory.zero_()
            view.fill_(True)
            return next(first for first in range(second) if views[first].any()), second
        view.fill_(True)
    return None


def _span(tensor: Tensor) -> int:
    """Return the number of bytes from a tensor's first element to the end of its last one."""
    steps = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return (steps + 1) * tensor.element_size() if tensor.numel() else 0


def _are_the_same(first: Tensor | Shard | None, second: Tensor | Shard | None) -> bool:
    """Return whether two gradients in the same memory are one: both unsharded, or the same part of a gradient."""
    if not isinstance(first, Shard) or not isinstance(second, Shard):
        return isinstance(first, Tensor) and isinstance(second, Tensor)
    return type(first) is type(second) and all(
        getattr(first, field.name) == getattr(second, field.name) for field in fields(first) if field.name != "local"
    )


def _overlap(slots: Iterable["GradientSlot"], first: int, second: int) -> UnsupportedGradientError:
    names = [slot.names[0] for slot in slots]
    return UnsupportedGradientError(
        f"the gradients of {names[first]} and {names[second]} overlap in memory, so that what a method makes of one "
        "would change the other: give each memory of its own first (`parameter.grad = parameter.grad.clone()`)"
    )


_identity = attrgetter("_cdata")  # the same for all views of a storage, for which torch has no public name
