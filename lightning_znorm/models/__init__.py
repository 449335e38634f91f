"""Networks that timm and MONAI lack."""

from lightning_znorm.models.resnet import ResNet, resnet20, resnet56

__all__ = ["ResNet", "resnet20", "resnet56"]
