"""Small JPEGs in ImageNet's layout. The pixels of an image tell its number and its orientation."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from lightning_znorm.data.base import ImageDataModule


def shades(number: int, height: int, width: int) -> np.ndarray:
    """Return an image whose red grows from left to right, green from top to bottom, and whose blue is its number."""
    image = np.empty((height, width, 3), dtype=np.uint8)
    image[..., 0] = np.linspace(0, 255, width).round()
    image[..., 1] = np.linspace(0, 255, height).round()[:, None]
    image[..., 2] = number
    return image


def write_image_folder(
    root: Path, classes: int, train: int, val: int, height: int = 40, width: int = 48, step: int = 1
) -> Path:
    """Write ``train`` images for each class in ``root/train/<class>``, and ``val`` images in ``root/val/<class>``.

    Image ``i`` has the blue ``i * step``, counted through ``train`` class by class, and on through ``val``.
    """
    number = 0
    for part, count in (("train", train), ("val", val)):
        for label in range(classes):
            folder = root / part / f"n{label:08}"
            folder.mkdir(parents=True)
            for i in range(count):
                image = Image.fromarray(shades(number * step % 256, height, width))
                # The best quality of JPEG: blue is right to a unit.
                image.save(folder / f"n{label:08}_{i:04}.JPEG", quality=100, subsampling=0)
                number += 1
    return root


def pixels(data: ImageDataModule, images: Tensor) -> Tensor:
    """Undo the normalization."""
    mean, std = (torch.tensor(values).view(-1, 1, 1) for values in (data.mean, data.std))
    return ((images * std + mean) * data.max_value).round().to(torch.uint8)


def numbers(data: ImageDataModule, images: Tensor, step: int) -> list[int]:
    """Read each image's number, which is its blue, from a normalized batch."""
    return (pixels(data, images)[:, 2].float().mean((1, 2)) / step).round().int().tolist()
