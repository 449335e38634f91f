"""Image sizes as arguments, and resizing of images and masks when they are read."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from lightning_znorm.arguments import checked_integer, shown
from lightning_znorm.errors import ZNormTypeError


def checked_size(name: str, value: Any) -> tuple[int, int] | None:
    """Return an image size as height and width; a single number is both, and ``None`` stays.

    Raises:
        TypeError: If it is neither a whole number nor two of them.
        ValueError: If one is less than 1.

    Example:
        >>> checked_size("image_size", 128), checked_size("image_size", [96, 128])
        ((128, 128), (96, 128))
    """
    if value is None:
        return None
    if not isinstance(value, Sequence):
        value = [value, value]
    if isinstance(value, str) or len(value) != 2:
        raise ZNormTypeError(f"{name} must be one number, or height and width, got {shown(value)}.")
    height, width = (checked_integer(name, each, minimum=1, bits=31) for each in value)
    return height, width


def resized_image(pixels: NDArray[Any], size: Sequence[int]) -> NDArray[Any]:
    """Resize an image by bilinear interpolation. Shrinking averages over what a pixel covers (antialiasing).

    Args:
        pixels: Of an unsigned type, shape ``(H, W)`` or ``(H, W, C)``.
        size: New height and width.

    Returns:
        Pixels of the same type, rounded.
    """
    if pixels.shape[:2] == tuple(size):
        return pixels
    batch = torch.from_numpy(np.atleast_3d(pixels).astype(np.float32)).permute(2, 0, 1).unsqueeze(0)
    resized = F.interpolate(batch, tuple(size), mode="bilinear", antialias=True)
    rounded = resized.round().clamp(0, np.iinfo(pixels.dtype).max)
    return rounded[0].permute(1, 2, 0).numpy().astype(pixels.dtype).reshape(*size, *pixels.shape[2:])


def resized_mask(mask: NDArray[np.uint8], size: Sequence[int]) -> NDArray[np.uint8]:
    """Resize a mask of shape ``(H, W)``: each new pixel gets the class of the nearest old one."""
    # With whole numbers, because torch's interpolation rounds where a centre lies between two pixels.
    rows, columns = ((2 * np.arange(new) + 1) * old // (2 * new) for new, old in zip(size, mask.shape, strict=True))
    resized: NDArray[np.uint8] = mask[rows[:, None], columns]
    return resized
