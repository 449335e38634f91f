"""Orders of training images that can be taken up again in their middle."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data.distributed import DistributedSampler
from typing_extensions import override


class EpochShuffle(DistributedSampler[Any]):
    """Shuffles all images.

    The order follows from ``seed``, the epoch's number, which Lightning sets, and the number of the pass within the
    epoch, and from nothing else. So a training that is resumed goes on in the order that it would have had. Every
    process gets as many images as any other: a few images are given twice if the number of processes does not divide
    theirs.

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
        self.pass_number = 0
        """How often all images were given before in this epoch, as where a loader is cycled beside a longer one."""
        self.counted = False
        """Whether somebody counts the epochs."""

    @override
    def set_epoch(self, epoch: int) -> None:
        """Set the number of the epoch."""
        super().set_epoch(epoch)
        self.counted = True

    @override
    def __iter__(self) -> Iterator[Any]:
        """Iterate over the indices of this process."""
        skip, self.skip = self.skip, 0
        return iter(self.order()[skip:])

    def order(self) -> list[Any]:
        """Return the indices of this process in this pass."""
        drawn = np.resize(self.rng().permutation(len(self.dataset)), self.total_size)  # type: ignore[arg-type]
        indices: list[int] = self.own(drawn).tolist()
        return indices

    def rng(self, stream: int = 0) -> np.random.Generator:
        """Return what all processes draw the order of this pass from; another stream, for what else they draw in it."""
        numbers = [self.seed, self.epoch, stream, self.pass_number]
        # Without zeros at the end, as in former versions: from a seed of more than 32 bits they draw other numbers.
        while numbers[-1] == 0 and len(numbers) > 2:
            numbers.pop()
        return np.random.default_rng(numbers)

    def own(self, drawn: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return the part of this process."""
        return drawn[self.rank * self.num_samples :][: self.num_samples]


class SeededShuffle(EpochShuffle):
    """Shuffles all images, and gives each with a seed for whatever is drawn for it: pairs of index and seed.

    A worker process then crops an image as any other would have done, whatever it did before.
    """

    @override
    def order(self) -> list[Any]:
        """Return the indices of this process in this pass, each with a seed."""
        seeds = self.rng(stream=1).integers(2**63, size=len(self.dataset))  # type: ignore[arg-type]
        indices = super().order()
        return list(zip(indices, seeds[indices].tolist(), strict=True))
