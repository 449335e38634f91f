"""Outputs of segmentation networks: several of them, of lower resolution too, and sizes that must be padded."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from lightning_znorm.batches import kind_of, logits_of
from lightning_znorm.errors import ZNormValueError
from lightning_znorm.metrics.mask_metric import at_least_float32

_INTERPOLATIONS = {1: "linear", 2: "bilinear", 3: "trilinear"}


@dataclass(frozen=True)
class Output:
    """The logits of one output of a network.

    Args:
        logits: Shape ``(N, num_classes, ...)``, in the size of the images.
        weight: Share of its loss in the training loss. The weights of all outputs add up to 1.
    """

    logits: Tensor
    weight: float


def outputs_of(returned: Any, network: str, images: Sequence[int], num_classes: int) -> list[Output]:
    """Return the outputs in what a network has returned; the last one is the prediction.

    - A list or tuple of logits in the size of the images, as U-Net++ returns it: equal weights, and the last is the
      prediction.
    - A list in which some are smaller, as MONAI's SegResNetDS returns it: the last one of full size is the prediction.
      Each next lower resolution has half the weight. Its logits are interpolated linearly to the size of the images.
    - A tensor with one more dimension, ``(N, outputs, num_classes, ...)``, as MONAI's DynUNet returns it in training:
      the first is the prediction, and each next one, which comes from a lower resolution, has half the weight.

    Source of the weights: Isensee et al. 2021, "nnU-Net: a self-configuring method for deep learning-based biomedical
    image segmentation", Nature Methods 18.

    Args:
        returned: What the network returned.
        network: What a message calls the network.
        images: Shape of the images, ``(N, C, ...)``.
        num_classes: Number of logits at each pixel.

    Raises:
        ValueError: If the network has returned something else.
    """
    returned = logits_of(returned)
    expected = (images[0], num_classes, *images[2:])
    if isinstance(returned, (list, tuple)) and returned:
        logits = list(returned)
        fits = [isinstance(each, Tensor) and each.shape == expected for each in logits]
        smaller = [isinstance(each, Tensor) and _is_smaller(each.shape, expected) for each in logits]
        if any(fits) and all(full or small for full, small in zip(fits, smaller, strict=True)):
            logits.sort(key=_pixels)  # stable: the last of full size stays the last
            sizes = sorted({_pixels(each) for each in logits}, reverse=True)
            weights = [0.5 ** sizes.index(_pixels(each)) for each in logits]
            return _weighted([_enlarged(each, expected) for each in logits], weights)
        found = next(each for each, full in zip(logits, fits, strict=True) if not full)
    else:
        if isinstance(returned, Tensor) and returned.ndim == len(expected) + 1 and returned.shape[1] > 0:
            stacked = returned.unbind(1)
            if stacked[0].shape == expected:
                weights = [0.5**level for level in range(len(stacked))]
                return _weighted(stacked[::-1], weights[::-1])
        if isinstance(returned, Tensor) and returned.shape == expected:
            return [Output(returned, 1.0)]
        found = returned
    what = f"shape {tuple(found.shape)}" if isinstance(found, Tensor) else kind_of(found)
    raise ZNormValueError(
        f"{network} turned images of shape {tuple(images)} into {what}, and num_classes={num_classes} asks for logits "
        f"of shape {expected}."
    )


def pad_to_multiple(images: Tensor, divisor: int) -> Tensor:
    """Pad images at the end of each axis to a multiple of a number, by repeating the last pixels.

    Args:
        images: Shape ``(N, C, ...)``.
        divisor: Every size of the result is a multiple of it.

    Returns:
        The images themselves if nothing is missing.
    """
    missing = [-size % divisor for size in images.shape[2:]]
    if not any(missing):
        return images
    padding = [number for each in reversed(missing) for number in (0, each)]
    return F.pad(images, padding, mode="replicate")


def crop_to(logits: Tensor, size: Sequence[int]) -> Tensor:
    """Return the beginning of each axis, which undoes :func:`pad_to_multiple`.

    Args:
        logits: Shape ``(N, C, ...)``.
        size: Size of each axis but the first two.
    """
    for dim, each in enumerate(size, start=2):
        logits = logits.narrow(dim, 0, each)
    return logits


def counted_pixels(logits: Tensor, masks: Tensor, counts: Tensor) -> tuple[Tensor, Tensor]:
    """Return the logits and masks of the pixels that count, as one image that is one pixel wide.

    Args:
        logits: Shape ``(N, num_classes, ...)``.
        masks: Shape ``(N, channels, ...)``.
        counts: Which pixels count, shape ``(N, 1, ...)``, bool.

    Returns:
        Shapes ``(1, num_classes, pixels, 1, ...)`` and ``(1, channels, pixels, 1, ...)``, with as many dimensions as
        before.
    """
    chosen = counts.squeeze(1)

    def select(values: Tensor) -> Tensor:
        flat = values.movedim(1, -1)[chosen].T.unsqueeze(0)
        return flat.reshape(*flat.shape, *[1] * (values.ndim - 3))

    return select(logits), select(masks)


def averages_images(loss: object) -> bool:
    """Return whether a loss scores each image by itself, as MONAI's Dice losses do without ``batch=True``."""
    parts = list(loss.modules()) if hasattr(loss, "modules") else [loss]
    return any(getattr(part, "batch", None) is False for part in parts)


def _pixels(logits: Tensor) -> int:
    return math.prod(logits.shape[2:])


def _is_smaller(shape: Sequence[int], expected: Sequence[int]) -> bool:
    return (
        len(shape) == len(expected)
        and tuple(shape[:2]) == tuple(expected[:2])
        and all(0 < size <= full for size, full in zip(shape[2:], expected[2:], strict=True))
    )


def _enlarged(logits: Tensor, expected: Sequence[int]) -> Tensor:
    size = list(expected[2:])
    if list(logits.shape[2:]) == size:
        return logits
    return F.interpolate(at_least_float32(logits), size, mode=_INTERPOLATIONS[len(size)], align_corners=False)


def _weighted(logits: Sequence[Tensor], weights: Sequence[float]) -> list[Output]:
    total = sum(weights)
    return [Output(each, weight / total) for each, weight in zip(logits, weights, strict=True)]
