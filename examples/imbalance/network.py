"""A small U-Net with batch normalization and ReLU, the kind that most labs write themselves."""

from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor, nn


class BatchNormUNet(nn.Module):
    """A U-Net of 3x3 convolutions with batch normalization and ReLU, and a 1x1 convolution as its output layer.

    Args:
        widths: Channels at each depth, from the full resolution down.
        in_chans: Channels of the images.
        num_classes: Width of the output.

    Shape:
        ``(N, in_chans, H, W)`` to ``(N, num_classes, H, W)``, where H and W are multiples of 8 (of two to the power of
        the depth).
    """

    def __init__(self, widths: Sequence[int] = (8, 16, 32, 64), in_chans: int = 3, num_classes: int = 1) -> None:
        super().__init__()
        channels = [in_chans, *widths]
        self.down = nn.ModuleList(map(_block, channels, widths))
        self.up = nn.ModuleList(nn.ConvTranspose2d(deep, width, 2, stride=2) for width, deep in pairwise(widths))
        self.merge = nn.ModuleList(_block(2 * width, width) for width in widths[:-1])
        self.output = nn.Conv2d(widths[0], num_classes, 1)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of a batch of images."""
        features = images
        skips = []
        for number, block in enumerate(self.down):
            features = block(features if number == 0 else nn.functional.max_pool2d(features, 2))
            skips.append(features)
        skips.pop()
        for up, merge in zip(reversed(self.up), reversed(self.merge), strict=True):
            features = merge(torch.cat([skips.pop(), up(features)], dim=1))
        logits: Tensor = self.output(features)
        return logits


def _block(channels: int, width: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(channels, width, 3, padding=1, bias=False),
        nn.BatchNorm2d(width),
        nn.ReLU(),
    )
