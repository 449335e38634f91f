"""The residual networks that He et al. designed for CIFAR-10."""

import torch.nn.functional as F
from torch import Tensor, nn


class BasicBlock(nn.Module):
    """Two 3x3 convolutions and a shortcut without parameters (option A).

    Where the block halves the resolution, the shortcut keeps every second row and column, and the channels that its
    input lacks are zeros (He et al. 2016, section 4.2).

    Shape:
        ``(N, in_channels, H, W)`` to ``(N, out_channels, ceil(H / stride), ceil(W / stride))``.
    """

    def __init__(self, in_channels: int, out_channels: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, stride=stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(out_channels)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(out_channels)
        self.stride = stride
        self.new_channels = out_channels - in_channels

    def forward(self, x: Tensor) -> Tensor:
        """Add the residual branch to the shortcut."""
        shortcut = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, 0, self.new_channels))
        residual = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(residual + shortcut)


class ResNet(nn.Module):
    """CIFAR residual network with ``6 * blocks_per_stage + 2`` weighted layers.

    The network has a 3x3 convolution to 16 channels, three stages of basic blocks with 16, 32 and 64 channels, global
    average pooling and one linear layer. The second and the third stage begin by halving the resolution. Convolutions
    are initialized from He's normal distribution (He et al. 2015, section 2.2), the linear layer as torch does by
    default. The input may have any size.

    Shape:
        ``(N, in_chans, H, W)`` to ``(N, num_classes)``.

    Source:
        He et al., "Deep Residual Learning for Image Recognition", CVPR 2016, section 4.2 and table 6.

    Args:
        blocks_per_stage: n of the paper: 3 for ResNet-20, 9 for ResNet-56.
        num_classes: Width of the output.
        in_chans: Channels of the input.

    Example:
        A ResNet-8 for grey images:

        >>> import torch
        >>> ResNet(blocks_per_stage=1, in_chans=1)(torch.zeros(2, 1, 28, 28)).shape
        torch.Size([2, 10])
    """

    def __init__(self, blocks_per_stage: int, num_classes: int = 10, in_chans: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_chans, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.stage1 = _stage(16, 16, stride=1, blocks=blocks_per_stage)
        self.stage2 = _stage(16, 32, stride=2, blocks=blocks_per_stage)
        self.stage3 = _stage(32, 64, stride=2, blocks=blocks_per_stage)
        self.fc = nn.Linear(64, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, nonlinearity="relu")

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of a batch of images."""
        x = F.relu(self.bn1(self.conv1(images)))
        x = self.stage3(self.stage2(self.stage1(x)))
        logits: Tensor = self.fc(x.mean(dim=(2, 3)))
        return logits


def resnet20(num_classes: int = 10, in_chans: int = 3) -> ResNet:
    """Create the ResNet-20 of He et al. 2016 (section 4.2), with 0.27 M parameters for CIFAR-10.

    Args:
        num_classes: Width of the output.
        in_chans: Channels of the input.

    Example:
        >>> import torch
        >>> resnet20(in_chans=1)(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """
    return ResNet(3, num_classes, in_chans)


def resnet56(num_classes: int = 10, in_chans: int = 3) -> ResNet:
    """Create the ResNet-56 of He et al. 2016 (section 4.2), with 0.85 M parameters for CIFAR-10.

    Args:
        num_classes: Width of the output.
        in_chans: Channels of the input.

    Example:
        >>> sum(p.numel() for p in resnet56().parameters())
        853018
    """
    return ResNet(9, num_classes, in_chans)


def _stage(in_channels: int, out_channels: int, stride: int, blocks: int) -> nn.Sequential:
    following = (BasicBlock(out_channels, out_channels, stride=1) for _ in range(blocks - 1))
    return nn.Sequential(BasicBlock(in_channels, out_channels, stride), *following)
