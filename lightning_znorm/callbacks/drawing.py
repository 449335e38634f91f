"""Pictures of masks, and their way to a logger."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image

# Okabe and Ito's palette without black, which colour-blind readers can tell apart. One colour for each class.
_COLOURS = torch.tensor(
    [(230, 159, 0), (86, 180, 233), (0, 158, 115), (240, 228, 66), (213, 94, 0), (204, 121, 167), (0, 114, 178)],
    dtype=torch.uint8,
)
LEAST_SIZE = 512  # pixels; smaller images are enlarged, so that outlines do not cover small structures
GAP = 8
LINE = 28
_FONT_SIZE = 20


@dataclass(frozen=True)
class Case:
    """One image with its true and predicted masks, on the CPU.

    Args:
        image: Shape ``(C, H, W)``, any range.
        truth: True masks, shape ``(K, H, W)``, bool, one for each class.
        preds: Predicted masks, of the same shape and dtype.
        caption: Text below the image.
    """

    image: Tensor
    truth: Tensor
    preds: Tensor
    caption: str


def grid(cases: Sequence[Case], columns: int = 2) -> "Image":
    """Draw each case as image, image with the true outlines, image with the predicted outlines, and its caption."""
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(_FONT_SIZE)
    tiles = [torch.cat([_panel(case, masks) for masks in (None, case.truth, case.preds)], dim=1) for case in cases]
    width = max(tile.shape[1] for tile in tiles) + GAP
    height = max(tile.shape[0] for tile in tiles) + LINE + GAP
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    picture = Image.new("RGB", (columns * width + GAP, rows * height + LINE + GAP), "white")
    draw = ImageDraw.Draw(picture)
    for number, (case, tile) in enumerate(zip(cases, tiles, strict=True)):
        left, top = GAP + number % columns * width, LINE + number // columns * height
        picture.paste(Image.fromarray(tile.numpy()), (left, top))
        draw.text((left, top + tile.shape[0] + 2), case.caption, fill="black", font=font)
        if number < columns:
            for position, title in enumerate(("image", "truth", "prediction")):
                draw.text((left + position * (tile.shape[1] + GAP) // 3, 3), title, fill="black", font=font)
    return picture


def _panel(case: Case, masks: Tensor | None) -> Tensor:
    """Draw an image with the outlines of masks and a white gap to its right, shape ``(H, W, 3)``, uint8."""
    factor = -(-LEAST_SIZE // max(case.image.shape[-2:]))
    pixels = _enlarged(_visible(case.image), factor)
    for mask, colour in zip([] if masks is None else masks, _COLOURS.repeat(-(-len(case.truth) // 7), 1), strict=False):
        mask = _enlarged(mask, factor)
        edge = outline(mask)
        pixels[:, _grown(mask) & ~mask] = 0  # a dark line around it, so that it shows in bright images too
        pixels[:, edge | outline(mask & ~edge)] = colour.unsqueeze(1)  # two pixels wide
    panel = pixels.movedim(0, -1).contiguous()
    return torch.cat([panel, panel.new_full((len(panel), GAP, 3), 255)], dim=1)


def outline(mask: Tensor) -> Tensor:
    """Return the pixels of a mask that have a side neighbour outside of it, as a mask."""
    padded = torch.nn.functional.pad(mask, (1, 1, 1, 1))  # a mask that reaches the border has an outline there
    inside = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return mask & ~inside


def _grown(mask: Tensor) -> Tensor:
    """Return a mask and its side neighbours."""
    padded = torch.nn.functional.pad(mask, (1, 1, 1, 1))
    return mask | padded[:-2, 1:-1] | padded[2:, 1:-1] | padded[1:-1, :-2] | padded[1:-1, 2:]


def _visible(image: Tensor) -> Tensor:
    """Convert an image of any range and number of channels to RGB, from its 1st to its 99th percentile."""
    image = image.float()
    image = image[:3] if len(image) >= 3 else image[:1].expand(3, -1, -1)
    # Percentiles of a sample, because torch.quantile takes at most 16 million elements.
    flat = image.flatten()[:: max(1, image.numel() // 2**20)]
    low, high = torch.quantile(flat, flat.new_tensor([0.01, 0.99]))
    pixels: Tensor = ((image - low) / (high - low).clamp_min(1e-12)).clamp(0, 1) * 255
    return pixels.round().to(torch.uint8)


def _enlarged(tensor: Tensor, factor: int) -> Tensor:
    return tensor.repeat_interleave(factor, -1).repeat_interleave(factor, -2)


def log_picture(trainer: pl.Trainer, name: str, picture: "Image") -> bool:
    """Log a picture in RGB with each TensorBoard or Weights & Biases logger, and return whether there was any."""
    logged = False
    logger: Any
    for logger in trainer.loggers:
        # By name, because the packages may not be installed, and pytorch_lightning has classes of its own.
        kinds = {cls.__name__ for cls in type(logger).__mro__}
        if "TensorBoardLogger" in kinds:
            logger.experiment.add_image(name, _pixels(picture), trainer.global_step)
            logged = True
        elif "WandbLogger" in kinds:
            logger.log_image(key=name, images=[picture], step=trainer.global_step)
            logged = True
    return logged


def _pixels(picture: "Image") -> Tensor:
    """Return a tensor of shape ``(3, H, W)``, uint8."""
    flat = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return flat.view(picture.height, picture.width, 3).permute(2, 0, 1)
