"""Networks by name, for the tasks."""

import difflib
import math
import re
from collections.abc import Callable
from functools import partial
from typing import Any

from torch import nn

from lightning_znorm import models
from lightning_znorm.errors import ZNormTypeError, ZNormValueError
from lightning_znorm.requirements import needed_by


def create_classifier(name: str, num_classes: int, in_chans: int = 3, **kwargs: Any) -> nn.Module:
    """Create a network for image classification.

    Args:
        name: The name of a network in `lightning_znorm.models`, or else in timm.
        num_classes: Width of the output.
        in_chans: Channels of the input.
        **kwargs: Further arguments of the network, such as timm's ``drop_rate`` or ``pretrained``.

    Returns:
        A module that maps ``(N, in_chans, H, W)`` to ``(N, num_classes)``.

    Raises:
        ValueError: If neither has a network of this name. The message gives the nearest names.
        ImportError: If it is none of this package's, and timm is missing.
        TypeError: If the network has no argument of a name in ``kwargs``.

    Example:
        >>> type(create_classifier("resnet56", num_classes=10)).__module__
        'lightning_znorm.models.resnet'
        >>> create_classifier("mobilenetv2_100", num_classes=10).num_classes
        10
    """
    if name in models.__all__:
        return _create(name, getattr(models, name), {"num_classes": num_classes, "in_chans": in_chans}, kwargs)

    with needed_by("ClassificationTask"):
        import timm  # takes seconds, and this package's own networks do not need it

    if not timm.is_model(name):
        nearest = difflib.get_close_matches(name, [*models.__all__, *timm.list_models()])
        advice = f"did you mean {' or '.join(nearest)}?" if nearest else "timm.list_models() lists the names."
        raise ZNormValueError(f"No network is called {name!r}, in lightning_znorm.models or in timm: {advice}")
    return _create(name, partial(timm.create_model, name), {"num_classes": num_classes, "in_chans": in_chans}, kwargs)


_STRIDES = (2, 2, 2, 2)  # of the Attention U-Net
_SEGMENTERS = ("resnet50_unet", "unetpp", "attention_unet")


def create_segmenter(
    name: str, num_classes: int = 1, in_chans: int = 3, spatial_dims: int = 2, **kwargs: Any
) -> nn.Module:
    """Create one of the three segmentation networks of the ZNorm paper, from MONAI.

    All have batch normalization. Only MONAI's Attention U-Net has instance normalization too: where it merges an
    upsampled layer with a skip connection.

    Args:
        name: ``"resnet50_unet"`` (a U-Net with a ResNet-50 as its encoder), ``"unetpp"`` (U-Net++, with an output at
            each depth: without this deep supervision, some of its parameters would never be used) or
            ``"attention_unet"``. See :func:`size_divisor` for the sizes of images that they take.
        num_classes: Width of the output.
        in_chans: Channels of the input.
        spatial_dims: 2 for images, 3 for volumes.
        **kwargs: Further arguments of MONAI's ``FlexibleUNet``, ``BasicUNetPlusPlus`` or ``AttentionUnet``, such as
            ``channels`` or ``dropout``.

    Returns:
        A module that maps ``(N, in_chans, ...)`` to ``(N, num_classes, ...)``. U-Net++ maps to a list of four of these.

    Raises:
        ValueError: If the name is none of these.
        ImportError: If MONAI is missing.
        TypeError: If the network has no argument of a name in ``kwargs``.

    Example:
        >>> import torch
        >>> create_segmenter("attention_unet")(torch.zeros(1, 3, 32, 32)).shape
        torch.Size([1, 1, 32, 32])
    """
    if name not in _SEGMENTERS:
        raise ZNormValueError(f"No segmentation network is called {name!r}: choose one of {', '.join(_SEGMENTERS)}.")

    with needed_by("SegmentationTask"):
        from monai.networks.nets import AttentionUnet, BasicUNetPlusPlus, FlexibleUNet  # takes seconds

    shape: dict[str, Any] = {"spatial_dims": spatial_dims, "in_channels": in_chans, "out_channels": num_classes}
    if name == "resnet50_unet":
        return _create(name, FlexibleUNet, {"backbone": "resnet50", **shape}, kwargs)
    if name == "unetpp":
        return _create(name, BasicUNetPlusPlus, {"deep_supervision": True, "norm": "batch", **shape}, kwargs)
    convolutions = {"channels": (64, 128, 256, 512, 1024), "strides": _STRIDES}
    return _create(name, AttentionUnet, {**convolutions, **shape}, kwargs)


def size_divisor(name: str, **kwargs: Any) -> int:
    """Return the number that the sizes of images for a segmentation network must be a multiple of.

    Args:
        name: A name that :func:`create_segmenter` takes.
        **kwargs: Further arguments of the network.

    Example:
        >>> size_divisor("resnet50_unet"), size_divisor("attention_unet"), size_divisor("unetpp")
        (32, 16, 1)
    """
    if name == "resnet50_unet":
        return 32
    if name == "attention_unet":
        return math.prod(kwargs.get("strides", _STRIDES))
    return 1  # U-Net++ pads what it upsamples by itself


def _create(
    name: str, network: Callable[..., nn.Module], settings: dict[str, Any], kwargs: dict[str, Any]
) -> nn.Module:
    """Create a network with this package's settings, which the user's override."""
    try:
        return network(**settings | kwargs)
    except TypeError as error:
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if unknown is None or unknown[1] not in kwargs:
            raise
        raise ZNormTypeError(f"The network {name} has no argument {unknown[1]!r}.") from error
