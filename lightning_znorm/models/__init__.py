"""Networks that timm and MONAI lack."""

from typing import TYPE_CHECKING

from lightning_znorm.lazy import lazy_names

if TYPE_CHECKING:
    from lightning_znorm.models.resnet import ResNet, resnet20, resnet56
else:
    __getattr__, __dir__ = lazy_names(
        __name__,
        {
            "resnet": ["ResNet", "resnet20", "resnet56"],
        },
    )

__all__ = ["ResNet", "resnet20", "resnet56"]
