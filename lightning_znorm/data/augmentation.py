"""Random augmentation of training images, a batch at a time on the batch's device.

torchvision's transforms draw once for a whole batch; these draw for each image.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def random_crop_and_flip(images: Tensor, padding: int = 4) -> Tensor:
    """Shift each image by up to ``padding`` pixels and mirror it with probability 1/2, by draws of its own.

    It does what torchvision's ``RandomCrop(size, padding)`` and ``RandomHorizontalFlip()`` do for single images: it
    pads the image with zeros, cuts a window of the image's size, and may mirror it left to right. The draws come from
    torch's generator of the batch's device, so the same seed gives the same images.

    Source:
        He et al. 2016, section 4.2.

    Args:
        images: Shape ``(N, C, H, W)``, any dtype.
        padding: Width of the frame of zeros, in pixels.

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
    mirrored = torch.rand(n, 1, dtype=torch.float32, device=device) < 0.5
    columns = torch.where(mirrored, columns.flip(1), columns)
    sample = torch.arange(n, device=device).view(n, 1, 1, 1)
    channel = torch.arange(channels, device=device).view(1, channels, 1, 1)
    return padded[sample, channel, rows.view(n, 1, height, 1), columns.view(n, 1, 1, width)]


def random_flip_and_rotate(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Mirror each image and rotate it by a multiple of 90 degrees, at random, and its mask with it.

    The eight orientations of a square are equally likely, and each image gets its own draw. Images that are not square
    are rotated by 0 or 180 degrees only. The draws come from torch's generator of the batch's device, so the same seed
    gives the same images.

    Args:
        *tensors: Tensors of shape ``(N, C, H, W)``, of any number of channels and any dtype, that get the same
            changes: images and their masks.

    Returns:
        New tensors of the same shapes and dtypes.

    Example:
        >>> image = torch.arange(4).view(1, 1, 2, 2)
        >>> view, mask = random_flip_and_rotate(image, image > 1)
        >>> torch.equal(view > 1, mask)
        True
    """
    n, _, height, width = tensors[0].shape
    transposed, mirrored, upended = torch.rand(3, n, 1, 1, 1, dtype=torch.float32, device=tensors[0].device) < 0.5
    changed = []
    for tensor in tensors:
        if height == width:
            tensor = torch.where(transposed, tensor.mT, tensor)
        tensor = torch.where(mirrored, tensor.flip(-1), tensor)
        changed.append(torch.where(upended, tensor.flip(-2), tensor))
    return tuple(changed)
