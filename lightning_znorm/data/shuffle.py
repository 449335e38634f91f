"""Orders of training images that can be taken up again in their middle."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data.distributed import DistributedSampler
from typing_extensions import override


class EpochShuffle(DistributedSampler[Any]):
    """Shuffles all images.

    The order of an epoch follows from ``seed`` and the epoch's number, which Lightning sets, and from nothing else. So
    a training that is resumed goes on in the order that it would have had. Every process gets as many images as any
    other: a few images are given twice if the number of processes does not divide theirs.

    Lightning leaves samplers of this kind as they are.

    Args:
        dataset: What to shuffle.
        num_replicas: Number of processes that share the images.
        rank: Number of this process.
        seed: Draws the orders.
    """

    def __init__(self, dataset: Any, num_replicas: int = 1, rank: int = 0, seed: int = 0) -> None:
        super().__init__(dataset, num_replicas=num_replicas, rank=rank, shuffle=True, seed=seed)
        self.skip = 0
        """Images that the next iteration leaves out at its beginning."""

    @override
    def __iter__(self) -> Iterator[Any]:
        """Iterate over the indices of this process."""
        skip, self.skip = self.skip, 0
        return iter(self.order()[skip:])

    def order(self) -> list[Any]:
        """Return the indices of this process in this epoch."""
        drawn = np.resize(self.rng().permutation(len(self.dataset)), self.total_size)  # type: ignore[arg-type]
        indices: list[int] = self.own(drawn).tolist()
        return indices

    def rng(self) -> np.random.Generator:
        """Return what all processes draw the order of this epoch from."""
        return np.random.default_rng((self.seed, self.epoch))

    def own(self, drawn: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the part of this process."""
        return drawn[self.rank * self.num_samples :][: self.num_samples]


class SeededShuffle(EpochShuffle):
    """Shuffles all images, and gives each with a seed for whatever is drawn for it: pairs of index and seed.

    A worker process then crops an image as any other would have done, whatever it did before.
    """

    @override
    def order(self) -> list[Any]:
        """Return the indices of this process in this epoch, each with a seed."""
        rng = np.random.default_rng((self.seed, self.epoch, 1))
        seeds = rng.integers(2**63, size=len(self.dataset))  # type: ignore[arg-type]
        indices = super().order()
        return list(zip(indices, seeds[indices].tolist(), strict=True))
