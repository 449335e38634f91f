"""Change torch's default dtype, and check that no tensor depends on it."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations, product
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DEFAULTS = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class _Types(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.made: dict[torch.dtype, str] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.made |= {leaf.dtype: str(func) for leaf in tree_leaves(result) if isinstance(leaf, Tensor)}
        return result


@contextmanager
def default_is_never_read() -> Iterator[None]:
    """Fail if a tensor of torch's default dtype is made; the tested code must not use bfloat16 itself."""
    with default_dtype(torch.bfloat16), _Types() as types:
        yield
    assert torch.bfloat16 not in types.made, types.made[torch.bfloat16]


def pairwise(*axes: Sequence[Any]) -> list[tuple[Any, ...]]:
    """Return a few rows with one value of each axis, so that any two values of two axes occur together in a row."""

    def pairs(row: tuple[int, ...]) -> set[tuple[tuple[int, int], ...]]:
        return set(combinations(enumerate(row), 2))

    every_row = list(product(*(range(len(axis)) for axis in axes)))
    open_pairs = set().union(*map(pairs, every_row))
    rows = []
    while open_pairs:
        best = max(every_row, key=lambda row: len(pairs(row) & open_pairs))
        open_pairs -= pairs(best)
        rows.append(tuple(axis[number] for axis, number in zip(axes, best, strict=True)))
    return rows


def fused_sgd_is_right(dtype: torch.dtype) -> bool:
    """Return whether torch's fused SGD can step in this dtype on the CPU; torch 2.6 cannot in half precision."""
    weights = [torch.zeros(30, dtype=dtype, requires_grad=True) for _ in range(2)]
    for weight, fused in zip(weights, (False, True), strict=True):
        weight.grad = torch.linspace(-1, 1, 30).to(dtype)
        torch.optim.SGD([weight], lr=0.1, fused=fused).step()
    return torch.allclose(*weights, rtol=0.02)
