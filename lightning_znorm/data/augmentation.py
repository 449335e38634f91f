"""Random changes of training images, a batch at a time on the batch's device."""

import torch
import torch.nn.functional as F
from torch import Tensor


def random_crop_and_flip(images: Tensor, padding: int = 4) -> Tensor:
    """Shift each image by up to ``padding`` pixels and mirror every second one, each image by its own draw.

    As torchvision's ``RandomCrop(size, padding)`` and ``RandomHorizontalFlip()`` do image by image: a window of the
    image's own size is cut from the image in a frame of zeros, then mirrored left to right with probability 1/2. The
    draws come from torch's generator of the batch's device, so that the seed repeats them.

    Source:
        He et al. 2016, section 4.2.

    Args:
        images: Shape ``(N, C, H, W)``, any dtype.
        padding: Width of the frame, in pixels.

    Returns:
        New images of the same shape and dtype.

    Example:
        >>> images = torch.arange(4, dtype=torch.uint8).view(1, 1, 2, 2)
        >>> random_crop_and_flip(images, padding=1).shape
        torch.Size([1, 1, 2, 2])
    """
    n, channels, height, width = images.shape
    device = images.device
    padded = F.pad(images, (padding, padding, padding, padding))
    rows = torch.randint(2 * padding + 1, (n, 1), device=device) + torch.arange(height, device=device)
    columns = torch.randint(2 * padding + 1, (n, 1), device=device) + torch.arange(width, device=device)
    mirrored = torch.rand(n, 1, device=device) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    sample = torch.arange(n, device=device).view(n, 1, 1, 1)
    channel = torch.arange(channels, device=device).view(1, channels, 1, 1)
    return padded[sample, channel, rows.view(n, 1, height, 1), columns.view(n, 1, 1, width)]
