"""Networks by name."""

import difflib
from typing import Any

from torch import nn

from lightning_znorm import models


def create_classifier(name: str, num_classes: int, in_chans: int = 3, **kwargs: Any) -> nn.Module:
    """Create a network for image classification.

    Args:
        name: A network of `lightning_znorm.models` or, if there is none of that name, of timm.
        num_classes: Width of the output.
        in_chans: Channels of the input.
        **kwargs: Further arguments of the network, such as timm's ``drop_rate`` or ``pretrained``.

    Returns:
        A module that maps ``(N, in_chans, H, W)`` to ``(N, num_classes)``.

    Raises:
        ValueError: If neither knows the name; the nearest names are in the message.

    Example:
        >>> type(create_classifier("resnet56", num_classes=10)).__module__
        'lightning_znorm.models.resnet'
        >>> create_classifier("mobilenetv2_100", num_classes=10).num_classes
        10
    """
    if name in models.__all__:
        network: nn.Module = getattr(models, name)(num_classes=num_classes, in_chans=in_chans, **kwargs)
        return network

    import timm  # seconds, which a run of our own networks need not wait

    if not timm.is_model(name):
        nearest = difflib.get_close_matches(name, [*models.__all__, *timm.list_models()])
        advice = f"did you mean {' or '.join(nearest)}?" if nearest else "timm.list_models() lists the names."
        raise ValueError(f"No network is called {name!r}, in lightning_znorm.models or in timm: {advice}")
    return timm.create_model(name, num_classes=num_classes, in_chans=in_chans, **kwargs)
