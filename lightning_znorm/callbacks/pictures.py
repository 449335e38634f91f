"""Where pictures go."""

from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image


def log_picture(trainer: pl.Trainer, name: str, picture: "Image") -> bool:
    """Gives a picture in RGB to each TensorBoard or Weights & Biases logger, and returns whether there was any."""
    logged = False
    logger: Any
    for logger in trainer.loggers:
        # By name, because neither package need be installed, and pytorch_lightning has classes of its own.
        kinds = {cls.__name__ for cls in type(logger).__mro__}
        if "TensorBoardLogger" in kinds:
            logger.experiment.add_image(name, _pixels(picture), trainer.global_step)
            logged = True
        elif "WandbLogger" in kinds:
            logger.log_image(key=name, images=[picture], step=trainer.global_step)
            logged = True
    return logged


def _pixels(picture: "Image") -> Tensor:
    """Shape ``(3, H, W)``, uint8."""
    flat = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return flat.view(picture.height, picture.width, 3).permute(2, 0, 1)
