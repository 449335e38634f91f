"""Samplers of training images, whose orders can be resumed in the middle of an epoch."""

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data.distributed import DistributedSampler
from typing_extensions import override

from lightning_znorm.data.datasets import BLOCK, MappedImages

WINDOW = 256 * BLOCK
"""Images that `BlockSampler` shuffles together: 226 MB of PCam's."""


class EpochSampler(DistributedSampler[Any]):
    """A sampler that shuffles all images, in an order that follows from numbers, not from a generator's state.

    The numbers are ``seed``, the epoch, which Lightning sets, and the pass within the epoch. So a resumed training has
    the order that it would have had. Every process gets the same number of images: a few images are given twice if the
    number of processes does not divide theirs.

    It is a `DistributedSampler` because Lightning replaces or wraps other samplers where there are several processes.

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
        """How often all images were given before in this epoch. A loader that is cycled beside a longer one has more
        than one pass in an epoch."""
        self.epoch_was_set = False
        """Whether `set_epoch` was called, as Lightning does."""

    @override
    def set_epoch(self, epoch: int) -> None:
        """Set the number of the epoch."""
        super().set_epoch(epoch)
        self.epoch_was_set = True

    @override
    def __iter__(self) -> Iterator[Any]:
        """Iterate over the indices of this process."""
        skip, self.skip = self.skip, 0
        return iter(self.order()[skip:])

    def order(self) -> list[Any]:
        """Return the indices of this process in this pass."""
        drawn = np.resize(self.rng().permutation(len(self.dataset)), self.total_size)  # type: ignore[arg-type]
        indices: list[int] = self.part_of_rank(drawn).tolist()
        return indices

    def rng(self, stream: int = 0) -> np.random.Generator:
        """Return the generator of this pass, the same in all processes.

        Args:
            stream: 0 for the order. Another number for other draws of the same pass, which are then independent of it.
        """
        numbers = [self.seed, self.epoch, stream, self.pass_number]
        # Without trailing zeros, because older versions had fewer numbers. From a seed of more than 32 bits NumPy would
        # draw something else.
        while numbers[-1] == 0 and len(numbers) > 2:
            numbers.pop()
        return np.random.default_rng(numbers)

    def part_of_rank(self, indices: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return this process's part of the indices of all processes."""
        return indices[self.rank * self.num_samples :][: self.num_samples]


class SeededSampler(EpochSampler):
    """Shuffle all images, and give pairs of an index and a seed for the random transforms of that image.

    So an image is cropped in the same way in any worker process.
    """

    @override
    def order(self) -> list[Any]:
        """Return the indices of this process in this pass, each with a seed."""
        seeds = self.rng(stream=1).integers(2**63, size=len(self.dataset))  # type: ignore[arg-type]
        indices = super().order()
        return list(zip(indices, seeds[indices].tolist(), strict=True))


class BlockSampler(EpochSampler):
    """Shuffle blocks of neighbouring images, and then the images of many blocks among one another.

    A disk reads blocks much faster than single images in random order. Every process gets blocks of its own.

    Args:
        dataset: What to shuffle; its ``rows`` must ascend, or the images of a block are not neighbours in the file.
        num_replicas: Number of processes that share the images.
        rank: Number of this process.
        seed: Draws the orders.
        block: Images that stay together.
        window: Images that are shuffled among one another.
    """

    def __init__(
        self,
        dataset: MappedImages,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
        block: int = BLOCK,
        window: int = WINDOW,
    ) -> None:
        super().__init__(dataset, num_replicas, rank, seed)
        self.block = block
        self.window = window

    @override
    def order(self) -> list[int]:
        """Return the indices of this process in this pass."""
        rng = self.rng()
        count = len(self.dataset)  # type: ignore[arg-type]
        starts = rng.permutation(np.arange(0, count, self.block))
        indices = (starts[:, None] + np.arange(self.block)).ravel()
        # `np.resize` repeats the first indices where the number of processes does not divide the images.
        local = self.part_of_rank(np.resize(indices[indices < count], self.total_size))
        # Windows of equal size: a short last window would mix few blocks.
        windows = np.array_split(local, -(-len(local) // self.window))
        order: list[int] = np.concatenate([rng.permutation(window) for window in windows]).tolist()
        return order
