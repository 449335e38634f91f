"""Images that need not fit in memory: read from a mapped file, in blocks that follow no order."""

import mmap

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import Dataset
from typing_extensions import override

from lightning_znorm.data.array_file import ArrayFile
from lightning_znorm.data.images import Batch, Labels
from lightning_znorm.data.shuffle import EpochShuffle

BLOCK = 32
"""Images that are read together: 0.9 MB of PCam's."""
WINDOW = 256 * BLOCK
"""Images that are shuffled together: 226 MB of PCam's."""


class MappedImages(Dataset[Batch]):
    """Images in a file and their labels, of which a DataLoader takes a whole batch at a time.

    Every process maps the file by itself, worker processes too. The blocks that a batch lies in are announced to the
    system, which then reads each in one piece: by itself it would read around every single image, several times as
    much as is needed.

    Args:
        images: Where the images are, shape ``(N, H, W, C)``.
        labels: Of the images in the set, shape ``(M,)``, int64.
        rows: Which of the images are in the set, shape ``(M,)``; by default all.
    """

    def __init__(self, images: ArrayFile, labels: Labels, rows: NDArray[np.int64] | None = None) -> None:
        self.images = images
        self.labels = labels
        self.rows = np.arange(len(labels)) if rows is None else rows
        self._mapped: tuple[NDArray[np.uint8], mmap.mmap] | None = None
        self._announced = np.empty(0, dtype=np.int64)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        """Return one image of shape ``(C, H, W)`` and its label, of shape ``()``."""
        images, labels = self.__getitems__([index])
        return images[0], labels[0]

    def __getitems__(self, indices: list[int]) -> Batch:
        """Return a batch; `DataLoader` calls this in place of `__getitem__`."""
        if self._mapped is None:
            self._mapped = self.images.map()
        array, mapping = self._mapped
        rows = self.rows[indices]
        self._announce(rows // BLOCK, mapping)
        return torch.from_numpy(array[rows]).permute(0, 3, 1, 2), torch.from_numpy(self.labels[indices])

    def __getstate__(self) -> dict[str, object]:
        return {**self.__dict__, "_mapped": None, "_announced": self._announced[:0]}

    def _announce(self, blocks: NDArray[np.int64], mapping: mmap.mmap) -> None:
        if not hasattr(mapping, "madvise"):  # on Windows, which reads images as they come
            return
        blocks = np.unique(blocks)
        size = BLOCK * int(np.prod(self.images.shape[1:]))
        for block in np.setdiff1d(blocks, self._announced, assume_unique=True).tolist():
            first = self.images.offset + block * size
            start = first - first % mmap.PAGESIZE
            mapping.madvise(mmap.MADV_WILLNEED, start, min(first + size, len(mapping)) - start)
        self._announced = blocks


class BlockShuffle(EpochShuffle):
    """Shuffles blocks of neighbours, and the images of many blocks among one another.

    As any `EpochShuffle`, but every process gets blocks of its own.

    Args:
        dataset: What to shuffle; ``rows`` in ascending order, or blocks are no neighbours.
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
        firsts = rng.permutation(np.arange(0, count, self.block))
        indices = (firsts[:, None] + np.arange(self.block)).ravel()
        own = self.own(np.resize(indices[indices < count], self.total_size))  # repeats the first ones, if need be
        # Windows of equal size: a short last one would be of few blocks.
        windows = np.array_split(own, -(-len(own) // self.window))
        indices_of_windows: list[int] = np.concatenate([rng.permutation(window) for window in windows]).tolist()
        return indices_of_windows
