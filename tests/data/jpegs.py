"""Small JPEGs in ImageNet's layout, of which each image tells what it is."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightning_znorm.data.base import ImageDataModule


def shades(number: int, height: int, width: int) -> np.ndarray:
    """Red grows from left to right, green from top to bottom, and blue is the image's number."""
    image = np.empty((height, width, 3), dtype=np.uint8)
    image[..., 0] = np.linspace(0, 255, width).round()
    image[..., 1] = np.linspace(0, 255, height).round()[:, None]
    image[..., 2] = number
    return image


def write_image_folder(
    root: Path, classes: int, train: int, val: int, height: int = 40, width: int = 48, step: int = 1
) -> Path:
    """Write images in ``root/train/<class>`` and ``root/val/<class>``, as many of each class as said; return root.

    Image ``i`` has the blue ``i * step``, counted through ``train`` class by class, and on through ``val``.
    """
    number = 0
    for part, count in (("train", train), ("val", val)):
        for label in range(classes):
            folder = root / part / f"n{label:08}"
            folder.mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(shades(number * step % 256, height, width))
                # As good as JPEG can: blue comes out right to a unit.
                image.save(folder / f"n{label:08}_{i:04}.JPEG", quality=100, subsampling=0)
                number += 1
    return root


def pixels(data: ImageDataModule, images: Tensor) -> Tensor:
    """Undo the normalization."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (data.mean, data.std))
    return ((images * std + mean) * data.max_value).round().to(torch.uint8)


def numbers(data: ImageDataModule, images: Tensor, step: int) -> list[int]:
    """Read each image's number, which blue tells, from a normalized batch."""
    return (pixels(data, images)[:, 2].float().mean((1, 2)) / step).round().int().tolist()
