"""Files of cases, each an image and perhaps its mask, and their pixels in one array."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from lightning_znorm.data.array_file import cached_array
from lightning_znorm.data.decoding import read_all, refuse


@dataclass(frozen=True)
class CaseFile:
    """The files of a case.

    Args:
        image: Path of the image.
        mask: Path of the mask, if there is one.
        patient: Who was scanned.
    """

    image: Path
    mask: Path | None = None
    patient: str = ""


@dataclass(frozen=True)
class CaseFiles(ABC):
    """The cases in a folder, and their pixels.

    Args:
        folder: Where the images are.
        files: Of all cases.
        faults: What is wrong, apart from the pixels.
        image_size: Height and width that images and masks are resized to. Without it, all must have one size.
    """

    folder: Path
    files: list[CaseFile]
    faults: list[str] = field(default_factory=list)
    image_size: tuple[int, int] | None = None
    what: ClassVar[str] = "images"
    """What the cases are, for the progress bar."""

    @property
    def names(self) -> list[str]:
        """Paths of the images, relative to the folder."""
        return [each.image.relative_to(self.folder).as_posix() for each in self.files]

    @cached_property
    def marked(self) -> NDArray[np.float64]:
        """Share of the pixels of each mask, as its file has it, that are marked; `decode` sets it.

        It is not taken from the decoded masks, because small structures vanish from masks that are resized.
        """
        return np.zeros(len(self.files))

    @property
    def has_masks(self) -> bool:
        """Whether the cases have masks."""
        return any(each.mask for each in self.files)

    @property
    @abstractmethod
    def shape(self) -> tuple[int, ...]:
        """Shape of the decoded cases, ``(N, P, H, W)``: the bytes of each image's channels, and then the mask."""

    @property
    @abstractmethod
    def sizes(self) -> list[tuple[int, int]]:
        """Height and width of each image, as its header says; 0 and 0 if it cannot be read."""

    @property
    @abstractmethod
    def cache_name(self) -> str:
        """What the name of a file of these decoded cases begins with: other settings have another."""

    @abstractmethod
    def read(self, index: int, into: NDArray[np.uint8]) -> list[str]:
        """Decode a case into an array of shape ``(P, H, W)``, set its `marked`, and return its faults.

        Threads call this.
        """

    def faults_of_all(self) -> list[str]:
        """Return what is wrong with the cases together, after all were read."""
        return []

    def fits(self, max_memory: float) -> bool:
        """Return whether the decoded cases take at most ``max_memory`` bytes."""
        return math.prod(self.shape) <= max_memory

    def decode(self, max_memory: float, cache: Path) -> NDArray[np.uint8]:
        """Decode all cases, into memory if they fit and otherwise into a file, and set `marked`.

        Args:
            max_memory: Size in bytes up to which they fit.
            cache: Folder for the file.

        Returns:
            Shape `shape`.

        Raises:
            ValueError: If a file is damaged, or missing: all such are named.
        """
        if self.faults:
            self._fill(None)  # raises, with the faults of the pixels too
        if self.fits(max_memory):
            array = np.empty(self.shape, dtype=np.uint8)
            self._fill(array)
            return array
        sources = [path for each in self.files for path in (each.image, each.mask) if path is not None]
        size = math.prod(self.shape)
        content, _ = cached_array(self.cache_name, sources, (size + self.marked.nbytes,), self._fill_file, cache).map()
        self.marked[:] = np.frombuffer(content[size:].tobytes())
        return content[:size].reshape(self.shape)

    def _fill_file(self, content: NDArray[np.uint8]) -> None:
        """Set what a file holds: the decoded cases, and `marked` behind them."""
        size = math.prod(self.shape)
        self._fill(content[:size].reshape(self.shape))
        content[size:] = self.marked.view(np.uint8)

    def _fill(self, array: NDArray[np.uint8] | None) -> None:
        def read(index: int) -> list[str]:
            return self.read(index, np.empty(self.shape[1:], np.uint8) if array is None else array[index])

        faults = read_all(read, len(self.files), self.what)
        refuse(sorted([*self.faults, *faults, *self.faults_of_all()]), self.folder)


def by(size: Iterable[int]) -> str:
    """Return a size as messages write it, such as 256x256."""
    return "x".join(map(str, size))
