"""Pictures of masks, and their way to a logger."""

import math
import re
from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
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
_SWATCH = 16
_DASH = 8  # pixels, along a row
_LONGEST = 2048  # pixels, to which one side of an image may be stretched

_PICTURE = re.compile(r"(val|test)(-epoch=\d+)?\.png")


def picture_name(stage: str, epoch: int | None) -> str:
    """Return the name of the file of a picture.

    Args:
        stage: ``"val"`` or ``"test"``.
        epoch: Of the training, or None outside of training.
    """
    return f"{stage}.png" if epoch is None else f"{stage}-epoch={epoch}.png"


def is_picture(path: Path) -> bool:
    """Return whether a file has a name from ``picture_name``."""
    return path.is_file() and _PICTURE.fullmatch(path.name) is not None


@dataclass(frozen=True)
class Case:
    """One image with its true and predicted masks, on the CPU.

    Args:
        image: Shape ``(C, H, W)``, any range.
        truth: True masks, shape ``(K, H, W)``, bool, one for each class.
        preds: Predicted masks, of the same shape and dtype.
        caption: Text below the image.
        path: The part of the caption that is shortened if the caption is too long. Without one, or if that does not
            suffice, the end is cut off.
        spacing: Distance of neighbouring pixels along rows and columns, that is, from one row to the next and from one
            column to the next. The image is drawn with square pixels, so it is stretched where the two differ.
    """

    image: Tensor
    truth: Tensor
    preds: Tensor
    caption: str
    path: str = ""
    spacing: tuple[float, float] = (1.0, 1.0)


def grid(cases: Sequence[Case], columns: int = 2, class_names: Sequence[str] = ()) -> "Image":
    """Draw each case as image, image with the true outlines, and image with both outlines; and its caption.

    Beside the predicted outlines, which are solid, the true ones are dashed: light and black by turns, so that they
    show on every background and on the predicted outline.

    Args:
        cases: What is drawn, from left to right and from top to bottom.
        columns: Number of cases side by side.
        class_names: Names of the classes, for a legend of their colours; none by default.
    """
    from PIL import Image, ImageDraw, ImageFont

    font = ImageFont.load_default(_FONT_SIZE)
    tiles = [
        torch.cat([_panel(case), _panel(case, solid=case.truth), _panel(case, case.preds, dashed=case.truth)], dim=1)
        for case in cases
    ]
    width = max(tile.shape[1] for tile in tiles) + GAP
    height = max(tile.shape[0] for tile in tiles) + LINE + GAP
    columns = min(columns, len(tiles))
    rows = -(-len(tiles) // columns)
    entries = _legend(class_names, columns * width - GAP, font)
    first = LINE * (1 + max((line for line, _, _ in entries), default=0)) if entries else 0
    picture = Image.new("RGB", (columns * width + GAP, first + rows * height + LINE + GAP), "white")
    draw = ImageDraw.Draw(picture)
    for (line, left, name), colour in zip(entries, _colours(len(entries)), strict=True):
        corner = (GAP + left, line * LINE + (LINE - _SWATCH) // 2)
        draw.rectangle((*corner, corner[0] + _SWATCH, corner[1] + _SWATCH), fill=tuple(colour.tolist()), outline=0)
        draw.text((corner[0] + _SWATCH + GAP, line * LINE + 3), name, fill="black", font=font)
    for number, (case, tile) in enumerate(zip(cases, tiles, strict=True)):
        left, top = GAP + number % columns * width, first + LINE + number // columns * height
        picture.paste(Image.fromarray(tile.numpy()), (left, top))
        caption = _fitting(case.caption, case.path, tile.shape[1], font)
        draw.text((left, top + tile.shape[0] + 2), caption, fill="black", font=font)
        if number < columns:
            panel = tile.shape[1] // 3
            explained = "prediction, truth dashed"
            last = explained if font.getlength(explained) < panel else "prediction"
            for position, title in enumerate(("image", "truth", last)):
                draw.text((left + position * panel, first + 3), title, fill="black", font=font)
    return picture


def _panel(case: Case, solid: Tensor | None = None, dashed: Tensor | None = None) -> Tensor:
    """Draw an image with the outlines of masks and a white gap to its right, shape ``(H, W, 3)``, uint8."""
    size = _drawn_size(case)
    pixels = _resized(_visible(case.image), size)
    colours = _colours(len(case.truth))
    for mask, colour in zip(() if solid is None else solid, colours, strict=False):
        mask = _resized(mask, size)
        pixels[:, _grown(mask) & ~mask] = 0  # a dark line around it, so that it shows in bright images too
        pixels[:, _line(mask)] = colour.unsqueeze(1)
    for mask, colour in zip(() if dashed is None else dashed, colours, strict=False):
        line = _line(_resized(mask, size))
        # Diagonal stripes, whose direction hardly any outline has for long.
        rows, columns = (torch.arange(size) for size in line.shape)
        dash = (3 * rows.unsqueeze(1) + 5 * columns).div(5 * _DASH, rounding_mode="floor") % 2 == 0
        pixels[:, line & dash] = (colour // 2 + 127).unsqueeze(1)  # a light tint of the class
        pixels[:, line & ~dash] = 0
    panel = pixels.movedim(0, -1).contiguous()
    return torch.cat([panel, panel.new_full((len(panel), GAP, 3), 255)], dim=1)


def _colours(count: int) -> Tensor:
    return _COLOURS.repeat(-(-count // len(_COLOURS)), 1)[:count]


def _legend(names: Sequence[str], width: int, font: Any) -> list[tuple[int, int, str]]:
    """Return line, distance from the left edge and text of each entry of a legend."""
    entries, line, left = [], 0, 0
    for name in names:
        name = _shortened(name, width - _SWATCH - GAP, font)
        length = _SWATCH + GAP + int(font.getlength(name))
        if left and left + length > width:
            line, left = line + 1, 0
        entries.append((line, left, name))
        left += length + 3 * GAP
    return entries


def _printable(text: str) -> str:
    """Return what a font can draw of a text, in one line."""
    text = text.encode("utf-8", "replace").decode()  # file names need not be UTF-8
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def _shortened(text: str, width: int, font: Any) -> str:
    """Return what a font can draw of a text, in one line, and of a long text the end."""
    text = _printable(text)
    if font.getlength(text) <= width:
        return text
    first = bisect_left(range(len(text)), True, key=lambda start: font.getlength("…" + text[start:]) <= width)
    return "…" + text[first:]


def _fitting(caption: str, path: str, width: int, font: Any) -> str:
    """Return a caption in one line: of a long one, the end of its path; if that does not suffice, its beginning."""
    caption, path = _printable(caption), _printable(path)
    if font.getlength(caption) <= width:
        return caption
    if path:
        before, _, after = caption.rpartition(path)
        caption = before + _shortened(path, width - font.getlength(before + after), font) + after
        if font.getlength(caption) <= width:
            return caption
    lengths = range(len(caption) + 1)
    count = bisect_left(lengths, True, key=lambda length: font.getlength(caption[:length] + "…") > width)
    return caption[: max(count - 1, 0)] + "…"


def _line(mask: Tensor) -> Tensor:
    """Return the outline of a mask, two pixels wide."""
    edge = outline(mask)
    return edge | outline(mask & ~edge)


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


def _drawn_size(case: Case) -> list[int]:
    """Return the numbers of rows and columns that an image is drawn with, so that its pixels are square."""
    shape = case.image.shape[-2:]
    extents = [size * step for size, step in zip(shape, case.spacing, strict=True)]
    # No side is stretched without limit: a spacing may be wrong.
    step = max(*extents) / max(_LONGEST, *shape)
    step = max(step, min(case.spacing))
    factor = math.ceil(LEAST_SIZE / round(max(extents) / step))
    return [max(1, round(factor * extent / step)) for extent in extents]


def _resized(tensor: Tensor, size: Sequence[int]) -> Tensor:
    """Return images or masks with other numbers of rows and columns: each pixel is the nearest one."""
    for axis, new in zip((-2, -1), size, strict=True):
        numbers = (2 * torch.arange(new) + 1) * tensor.shape[axis] // (2 * new)
        tensor = tensor.index_select(axis, numbers)
    return tensor


def log_picture(trainer: pl.Trainer, name: str, picture: "Image") -> None:
    """Log a picture in RGB with each logger that takes pictures: TensorBoard, Weights & Biases, MLflow and Comet.

    In MLflow it is an artifact, ``NAME-step=STEP.png``.
    """
    step = trainer.global_step
    logger: Any
    for logger in trainer.loggers:
        # By name, because the packages may not be installed, and pytorch_lightning has classes of its own.
        kinds = {cls.__name__ for cls in type(logger).__mro__}
        if "TensorBoardLogger" in kinds:
            logger.experiment.add_image(name, _pixels(picture), step)
        elif "WandbLogger" in kinds:
            logger.log_image(key=name, images=[picture], step=step)
        elif "MLFlowLogger" in kinds:
            # Not with key and step, which older versions of MLflow do not know.
            logger.experiment.log_image(logger.run_id, picture, f"{name}-step={step}.png")
        elif "CometLogger" in kinds:
            logger.experiment.log_image(picture, name=name, step=step)


def _pixels(picture: "Image") -> Tensor:
    """Return a tensor of shape ``(3, H, W)``, uint8."""
    flat = torch.frombuffer(bytearray(picture.tobytes()), dtype=torch.uint8)
    return flat.view(picture.height, picture.width, 3).permute(2, 0, 1)
