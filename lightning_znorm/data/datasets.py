"""Datasets of images: in memory, in a mapped file, or in files of their own. Those in arrays give a batch at a time."""

import mmap
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
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
CaseTransform: TypeAlias = Callable[[Tensor, Tensor, Sequence[int | None]], tuple[Tensor, Tensor]]
"""Changes images, ``(N, C, H, W)``, and their masks, ``(N, 1, H, W)``, given a seed for the draws of each."""

Cases: TypeAlias = Mapping[str, Sequence[Any] | NDArray[Any]]
"""What is known about images, such as ``"patient"``: lists, or arrays that stay arrays in a batch."""

IGNORED = 255
"""Value of a mask's pixels that count neither in the loss nor in a score: the ``ignore_index`` of the task."""
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


class MaskedImages(Dataset[Any]):
    """Images and their masks, in one NumPy array.

    Args:
        images: Shape ``(N, P, H, W)``, uint8: the bytes of each channel, and then the mask, such as red, green, blue
            and 0 or 1.
        rows: Which of the images are in the set.
        cases: What is known about all N images. A batch gets its part of it.
        value_bytes: Bytes of a value of the images, 1 or 2; of two, the higher comes first.
        transform: Changes an image and its mask, given an index's seed too. Without it, a batch is not taken apart.
    """

    def __init__(
        self,
        images: Images,
        rows: Indices,
        cases: Cases | None = None,
        value_bytes: int = 1,
        transform: CaseTransform | None = None,
    ) -> None:
        self.images = images
        self.rows = rows
        self.cases = cases
        self.value_bytes = value_bytes
        self.transform = transform

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int | tuple[int, int]) -> Batch:
        """Return one image of shape ``(C, H, W)`` and its mask of shape ``(1, H, W)``."""
        images, masks = self.__getitems__([index])[:2]
        return images[0], masks[0]

    def __getitems__(self, indices: Sequence[int | tuple[int, int]]) -> tuple[Any, ...]:
        """Return a batch; `DataLoader` calls this in place of `__getitem__`. An index may be a pair with a seed."""
        pairs = [index if isinstance(index, tuple) else (index, None) for index in indices]
        rows = self.rows[[index for index, _ in pairs]]
        pixels = self.images[rows]
        images, masks = _values(pixels[:, :-1], self.value_bytes), torch.from_numpy(pixels[:, -1:])
        if self.transform is not None:
            images, masks = self.transform(images, masks, [seed for _, seed in pairs])
        return (images, masks) if self.cases is None else (images, masks, _of_rows(self.cases, rows))

    def collate(self, batch: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return a batch as it is: torch's default would make tensors of arrays."""
        return batch


class NamedImages(Dataset[tuple[Tensor, dict[str, Any]]]):
    """Images in one NumPy array, and what is known about them, such as their names: what to predict for.

    Args:
        images: Shape ``(N, P, H, W)``, uint8: the bytes of each channel.
        cases: What is known about the images.
        value_bytes: Bytes of a value, as in `MaskedImages`.
    """

    def __init__(self, images: Images, cases: Cases, value_bytes: int = 1) -> None:
        self.images = images
        self.cases = cases
        self.value_bytes = value_bytes

    def __len__(self) -> int:
        return len(self.images)

    def __getitems__(self, indices: list[int]) -> tuple[Tensor, dict[str, Any]]:
        """Return a batch; `DataLoader` calls this in place of `__getitem__`."""
        return _values(self.images[indices], self.value_bytes), _of_rows(self.cases, indices)

    def collate(self, batch: tuple[Any, ...]) -> tuple[Any, ...]:
        """Return a batch as it is: torch's default would make tensors of arrays."""
        return batch


def _values(pixels: Images, value_bytes: int) -> Tensor:
    """Return pixels as a tensor of their values; those of two bytes as int32, because torch does little in uint16."""
    if value_bytes == 1:
        return torch.from_numpy(pixels)
    high, low = pixels[:, 0::2].astype(np.int32), pixels[:, 1::2]
    return torch.from_numpy((high << 8) | low)


def _of_rows(cases: Cases, rows: Iterable[int]) -> dict[str, Any]:
    rows = [int(row) for row in rows]
    return {
        name: values[rows] if isinstance(values, np.ndarray) else [values[row] for row in rows]
        for name, values in cases.items()
    }


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
