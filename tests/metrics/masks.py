"""Pairs of masks: fixed ones, and a hypothesis strategy for random ones."""

import torch
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from torch import Tensor


def noise(*shape: int, share: float = 0.5, seed: int = 0) -> Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed)) < share


def box(size: tuple[int, ...], *sides: tuple[int, int]) -> Tensor:
    mask = torch.zeros(size, dtype=torch.bool)
    mask[tuple(slice(*side) for side in sides)] = True
    return mask


def _ring() -> Tensor:
    return box((40, 33), (4, 36), (5, 30)) & ~box((40, 33), (9, 31), (12, 25))


SIZE = (40, 33)
BALL = (9, 12, 7)

# By name: two masks of one size, neither of them empty.
PAIRS = {
    "noise": (noise(*SIZE), noise(*SIZE, seed=1)),
    "sparse": (noise(*SIZE, share=0.01), noise(*SIZE, share=0.02, seed=1)),
    "boxes": (box(SIZE, (2, 20), (3, 25)), box(SIZE, (12, 30), (1, 22))),
    "inside": (box(SIZE, (5, 35), (5, 30)), box(SIZE, (12, 20), (9, 11))),
    "equal": (noise(*SIZE), noise(*SIZE)),
    "hole": (_ring() | box(SIZE, (9, 31), (12, 25)), _ring()),
    "rings": (_ring(), _ring().roll((3, -2), (0, 1))),
    "one pixel each": (box(SIZE, (3, 4), (30, 31)), box(SIZE, (38, 39), (2, 3))),
    "one pixel": (box(SIZE, (3, 4), (30, 31)), noise(*SIZE)),
    "opposite corners": (box(SIZE, (0, 1), (0, 1)), box(SIZE, (39, 40), (32, 33))),
    "borders": (box(SIZE, (0, 40), (0, 1)), box(SIZE, (39, 40), (0, 33))),
    "full": (box(SIZE), box(SIZE, (7, 8), (1, 3))),
    "full and border": (box(SIZE), box(SIZE, (0, 1))),
    "one row": (box((1, 9), (0, 1), (0, 2)), box((1, 9), (0, 1), (4, 9))),
    "volumes": (noise(*BALL, share=0.1), noise(*BALL, share=0.1, seed=1)),
    "boxes in a volume": (box(BALL, (1, 7), (2, 9), (1, 5)), box(BALL, (3, 9), (0, 6), (0, 7))),
    "hole in a volume": (box(BALL), box(BALL) & ~box(BALL, (2, 7), (2, 10), (1, 6))),
}


@st.composite
def pairs(draw: st.DrawFn, volumes: bool = True) -> tuple[Tensor, Tensor]:
    """Draw two masks of one size, each of which may be empty."""
    shape = draw(array_shapes(min_dims=2, max_dims=3 if volumes else 2, min_side=1, max_side=7))
    masks = arrays(bool, shape, elements=st.booleans(), fill=st.booleans())
    return torch.from_numpy(draw(masks)), torch.from_numpy(draw(masks))


def batch(mask: Tensor) -> Tensor:
    """Return a batch of one image with one channel."""
    return mask[None, None]
