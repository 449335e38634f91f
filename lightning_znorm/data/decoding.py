"""Many image files read at once, and everything wrong with them found at once."""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import numpy as np
from lightning.pytorch.utilities import rank_zero_only
from numpy.typing import NDArray

T = TypeVar("T")


class BadFileError(ValueError):
    """What is wrong with one file, in words that follow its path."""


def read_pixels(path: Path, modes: Iterable[str]) -> NDArray[np.uint8]:
    """Read an image file.

    Args:
        path: Of a format that Pillow reads.
        modes: Kinds of pixels that are accepted, by Pillow's names.

    Returns:
        Pixels of shape ``(H, W)``, or ``(H, W, 3)`` in colour.

    Raises:
        BadFileError: If the file cannot be read to its end, or holds another kind of pixels.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            image.load()
    except Exception as error:  # those of Pillow's many decoders have no common base
        raise BadFileError(f"cannot be read as an image ({type(error).__name__}: {error})") from error
    if image.mode not in modes:
        raise BadFileError(f"has pixels of Pillow's mode {image.mode}, and {' or '.join(modes)} is expected")
    return np.asarray(image.convert("L") if image.mode == "1" else image)


def size_of(path: Path) -> tuple[int, int] | None:
    """Read height and width from the head of an image file; None if it has none."""
    from PIL import Image

    try:
        with Image.open(path) as image:
            return image.height, image.width
    except Exception:  # which `read_pixels` finds too, and reports
        return None


def read_all(read: Callable[[int], Iterable[str]], count: int, what: str) -> list[str]:
    """Call a function for each number below ``count``, on all cores, under a progress bar.

    Args:
        read: Reads one item, given its number, and returns what is wrong with it. It runs on threads,
            which wait for the disk together and decompress at the same time.
        count: Number of items.
        what: What they are, for the progress bar.

    Returns:
        Everything that was wrong, in order.
    """
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        faults = with_progress(threads.map(read, range(count)), count, f"Decoding {what}")
        return [fault for found in faults for fault in found]


def with_progress(items: Iterable[T], count: int, description: str) -> Iterable[T]:
    """Draw a progress bar on stderr, in the first process alone, as the items are taken."""
    from rich.console import Console
    from rich.progress import track

    silent = getattr(rank_zero_only, "rank", 0) != 0
    return track(items, description, total=count, console=Console(stderr=True), disable=silent)


def refuse(faults: list[str], folder: Path) -> None:
    """Raise one error that names every fault, if there are any.

    Raises:
        ValueError: If there are.
    """
    if faults:
        listed = "\n".join(f"  {fault}" for fault in faults)
        raise ValueError(
            f"{folder} cannot be used as it is, for {len(faults)} "
            f"{'reason' if len(faults) == 1 else 'reasons'}: unpack these files again, or remove them.\n{listed}"
        )
