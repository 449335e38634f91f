"""Networks so small that one CPU core trains them to a loss near zero in a minute."""

from collections.abc import Sequence

from torch import Tensor, nn

from lightning_znorm.models.resnet import ResNet


class Plain(nn.Module):
    """A VGG-like network: 3x3 convolutions with batch normalization, maximum pooling between stages, no shortcut.

    Args:
        widths: Channels of the convolutions of each stage.
        num_classes: Width of the output.

    Shape:
        ``(N, 3, H, W)`` to ``(N, num_classes)``.
    """

    def __init__(
        self, widths: Sequence[Sequence[int]] = ((16, 16), (32, 32, 32), (64, 64, 64)), num_classes: int = 10
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        channels = 3
        for number, stage in enumerate(widths):
            if number:
                layers.append(nn.MaxPool2d(2))
            for width in stage:
                conv = nn.Conv2d(channels, width, 3, padding=1, bias=False)
                nn.init.kaiming_normal_(conv.weight, nonlinearity="relu")
                layers += [conv, nn.BatchNorm2d(width), nn.ReLU()]
                channels = width
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(channels, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits of a batch of images."""
        logits: Tensor = self.fc(self.features(images).mean(dim=(2, 3)))
        return logits


class Residual(ResNet):
    """ResNet-8 of the CIFAR family of He et al. 2016 (section 4.2): every second convolution has a shortcut."""

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__(blocks_per_stage=1, num_classes=num_classes)
