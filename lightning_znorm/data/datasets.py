"""Datasets of images: in memory, in a mapped file, or in files of their own. Those in arrays give a batch at a time."""

import mmap
import os
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from lightning_znorm.data.array_file import ArrayFile
from lightning_znorm.data.decoding import BadFileError, read_rgb
from lightning_znorm.errors import ZNormRuntimeError

Images: TypeAlias = NDArray[np.uint8]
"""Shape ``(N, C, H, W)``."""
Labels: TypeAlias = NDArray[np.int64]
"""Shape ``(N,)``."""
Indices: TypeAlias = NDArray[np.int64]
"""Which images are in a set, shape ``(M,)``."""
Paths: TypeAlias = NDArray[np.bytes_]
"""Shape ``(N,)``, as the file system spells them."""
Batch: TypeAlias = tuple[Tensor, Tensor]
"""Images of shape ``(N, C, H, W)``, and labels of shape ``(N,)`` or masks of shape ``(N, 1, H, W)``."""
Transform: TypeAlias = Callable[[Any], Tensor]
"""Makes a uint8 tensor of shape ``(C, H, W)`` from a PIL image in RGB."""

BLOCK = 32
"""Neighbouring images that `MappedImages` reads together: 0.9 MB of PCam's."""


class InMemoryImages(Dataset[Batch]):
    """Images and labels in two NumPy arrays.

    The arrays are NumPy's because torch indexes uint8 tensors many times more slowly.

    Args:
        images: Shape ``(N, C, H, W)``, uint8.
        labels: Shape ``(N,)``, int64.
    """

    def __init__(self, images: Images, labels: Labels) -> None:
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> Batch:
        """Return one image of shape ``(C, H, W)`` and its label, of shape ``()``."""
        return torch.as_tensor(self.images[index]), torch.as_tensor(self.labels[index])

    def __getitems__(self, indices: list[int]) -> Batch:
        """Return a batch; `DataLoader` calls this in place of `__getitem__`."""
        return torch.from_numpy(self.images[indices]), torch.from_numpy(self.labels[indices])


class MaskedImages(Dataset[Batch]):
    """Images and their masks, in one NumPy array.

    Args:
        images: Shape ``(N, 4, H, W)``, uint8: red, green, blue and the mask (0 or 1).
        rows: Which of the images are in the set.
    """

    def __init__(self, images: Images, rows: Indices) -> None:
        self.images = images
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> Batch:
        """Return one image of shape ``(3, H, W)`` and its mask of shape ``(1, H, W)``."""
        images, masks = self.__getitems__([index])
        return images[0], masks[0]

    def __getitems__(self, indices: list[int]) -> Batch:
        """Return a batch; `DataLoader` calls this in place of `__getitem__`."""
        batch = torch.from_numpy(self.images[self.rows[indices]])
        return batch[:, :3], batch[:, 3:]


class NamedImages(Dataset[tuple[Tensor, list[str]]]):
    """Images in one NumPy array, and their names: what to predict for.

    Args:
        images: Shape ``(N, C, H, W)``, uint8: red, green, blue and channels that are left out, such as a mask.
        rows: Which of the images are in the set.
        names: Of all images.
    """

    def __init__(self, images: Images, rows: Indices, names: list[str]) -> None:
        self.images = images
        self.rows = rows
        self.names = names

    def __len__(self) -> int:
        return len(self.rows)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, list[str]]:
        """Return a batch; `DataLoader` calls this in place of `__getitem__`."""
        rows = self.rows[indices]
        return torch.from_numpy(self.images[rows])[:, :3], [self.names[row] for row in rows]


class MappedImages(Dataset[Batch]):
    """Images in a file, which need not fit in memory, and their labels.

    Every process maps the file by itself, worker processes too. The blocks that a batch lies in are announced to the
    operating system, which then reads each in one piece. Without that it reads around every single image, several times
    as much as is needed.

    Args:
        images: Where the images are, shape ``(N, H, W, C)``.
        labels: Of the images in the set, shape ``(M,)``, int64.
        rows: Which of the images are in the set; by default all.
    """

    def __init__(self, images: ArrayFile, labels: Labels, rows: Indices | None = None) -> None:
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

    def _announce(self, blocks: Indices, mapping: mmap.mmap) -> None:
        if not hasattr(mapping, "madvise"):  # Windows has no such call
            return
        blocks = np.unique(blocks)
        size = BLOCK * int(np.prod(self.images.shape[1:]))
        for block in np.setdiff1d(blocks, self._announced, assume_unique=True).tolist():
            first = self.images.offset + block * size
            start = first - first % mmap.PAGESIZE
            mapping.madvise(mmap.MADV_WILLNEED, start, min(first + size, len(mapping)) - start)
        self._announced = blocks


class ImageFiles(Dataset[tuple[Tensor, int]]):
    """Image files and their labels; a file is read each time its image is asked for.

    Paths are kept in one NumPy array, whose memory worker processes share. Of a list of a million strings each worker
    would make its own copy, page by page, because Python counts references in the strings.

    Args:
        paths: Where the images are.
        labels: Class of each.
        transform: Turns each image into a tensor.
    """

    def __init__(self, paths: Paths, labels: Labels, transform: Transform) -> None:
        self.paths = paths
        self.labels = labels
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int | tuple[int, int]) -> tuple[Tensor, int]:
        """Return one image, transformed, and its label. A seed beside the index seeds the random transforms."""
        if not isinstance(index, tuple):
            return self._read(index)
        index, seed = index
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed the GPUs' generators too
            return self._read(index)

    def _read(self, index: int) -> tuple[Tensor, int]:
        path = os.fsdecode(self.paths[index])
        try:
            image = read_rgb(path)
        except BadFileError as fault:
            raise ZNormRuntimeError(f"{path} {fault}: convert, replace or remove it.") from fault
        return self.transform(image), int(self.labels[index])
