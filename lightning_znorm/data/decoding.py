"""Image files read as they are, many at once, and everything wrong with them found at once."""

import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np
from lightning.pytorch.utilities import rank_zero_only
from numpy.typing import NDArray

from lightning_znorm.errors import ZNormValueError

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")


class BadFileError(ZNormValueError):
    """What is wrong with one file, in words that follow its path."""


VERSION = 3
"""Of what `read_pixels` returns or refuses: images decoded into a cache by another version are decoded anew."""
# Those whose files are known to be read whole, or refused below.
_FORMATS = ("JPEG", "PNG", "BMP", "PPM", "GIF", "TIFF", "WEBP")
# Tags of TIFF and EXIF.
_TIFF_BITS, _ORIENTATION, _TIFF_CHANNELS, _TIFF_EXTRA, _TIFF_NUMBERS = 258, 274, 277, 338, 339
_TIFF_UNSIGNED = {1, 4}  # 4: not said
_TIFF_PREMULTIPLIED = 1
_NETPBM_HEAD = re.compile(rb"\s*P[1-7]\s")
_LISTED = 1000


def read_pixels(path: Path, modes: Iterable[str]) -> NDArray[np.uint8]:
    """Read an image file as it is stored.

    Colour profiles and gamma, which tell a screen what to show, are not applied.

    Args:
        path: A JPEG, PNG, BMP, PPM, GIF, TIFF or WebP file, whatever its suffix.
        modes: Kinds of pixels that are accepted, by Pillow's names.

    Returns:
        Pixels of shape ``(H, W)``, or ``(H, W, 3)`` in colour.

    Raises:
        BadFileError: If the file cannot be read to its end, holds another kind of pixels, several images (but a
            camera's JPEG file of several views, MPO, of which the first is read), or more bits or channels than Pillow
            reads, or is stored turned or mirrored: a mask would not fit what a viewer shows.
    """
    image = _load(path, as_stored=True)
    if image.mode not in modes:
        raise BadFileError(f"has pixels of Pillow's mode {image.mode}, and {' or '.join(modes)} is expected")
    return np.asarray(image.convert("L") if image.mode == "1" else image)


def read_rgb(path: str) -> "Image":
    """Read an image file in RGB, as torchvision's `ImageFolder` does.

    Grey, palettes, CMYK and YCbCr are converted. Transparency is left out, and the colours of transparent pixels are
    those that are stored. Neither colour profiles and gamma nor the orientation in a camera's EXIF data is applied
    (but Pillow turns TIFF files as theirs says).

    Args:
        path: A JPEG, PNG, BMP, PPM, GIF, TIFF or WebP file, whatever its suffix.

    Returns:
        A Pillow image.

    Raises:
        BadFileError: If the file cannot be read to its end, or holds several images (but a camera's JPEG file of
            several views, MPO, of which the first is read), more bits or channels than Pillow reads, or colours that
            are multiplied by their transparency, which Pillow would divide by it.
    """
    image = _load(path)
    try:
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # else Pillow warns
        return image.convert("RGB")
    except ValueError as error:
        raise BadFileError(f"has pixels of Pillow's mode {image.mode}, which do not become RGB ({error})") from error


def size_of(path: Path) -> tuple[int, int] | None:
    """Read height and width from the head of an image file; None if it has none."""
    from PIL import Image

    try:
        with Image.open(path, formats=_FORMATS) as image:
            return image.height, image.width
    except Exception:  # which `read_pixels` finds too, and reports
        return None


def _load(path: str | Path, as_stored: bool = False) -> "Image":
    from PIL import Image

    try:
        with Image.open(path, formats=_FORMATS) as image:
            _refuse_what_would_be_altered(image)
            if as_stored:
                if (orientation := _orientation(image)) in range(2, 9):
                    raise BadFileError(f"is stored turned or mirrored (EXIF orientation {orientation})")
                if _hides_transparency(image):
                    raise BadFileError("has a fourth channel that varies, and 3 would be read")
            image.load()
            if _is_divided(image):
                raise BadFileError("has colours multiplied by their transparency, which would be read divided by it")
            return image
    except BadFileError:
        raise
    except Exception as error:  # those of Pillow's many decoders have no common base
        raise BadFileError(f"cannot be read as an image ({type(error).__name__}: {error})") from error


def _refuse_what_would_be_altered(image: Any) -> None:
    """Refuse what Pillow would read in part or change: all but one image with up to 8 bits for each channel."""
    # A camera's JPEG file may hold other views or sizes of its image behind it.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise BadFileError(f"holds {image.n_frames} images (pages of a volume, or frames), and one is expected")
    if _is_deep(image):
        raise BadFileError("has more than 8 bits for each channel, and no more than 8 are read")
    if image.format == "PPM" and _has_further_image(image):
        raise BadFileError("holds several images, and one is expected")
    if image.format != "TIFF":
        return
    stored, read = image.tag_v2.get(_TIFF_CHANNELS, 1), len(image.getbands()) - (image.mode == "RGBX")
    if stored != read:
        raise BadFileError(f"has {stored} channels, of which {read} would be read")
    if not {*image.tag_v2.get(_TIFF_NUMBERS, ())} <= _TIFF_UNSIGNED:
        raise BadFileError("has signed values, which would be read as unsigned")


def _is_deep(image: Any) -> bool:
    if image.mode[0] in "IF":
        return True
    if image.format == "TIFF":
        bits: tuple[int, ...] = image.tag_v2.get(_TIFF_BITS, (1,))
        return max(bits) > 8
    arguments = [tile[3] for tile in image.tile]  # of the decoder
    if image.format == "PNG":
        return any(";16" in pixels for pixels in arguments)
    # Of PPM's, the last one is the largest value.
    return image.format == "PPM" and any(not isinstance(each, str) and (each[-1] or 0) > 255 for each in arguments)


def _has_further_image(image: Any) -> bool:
    """Whether another image lies behind the first, which Pillow does not say of Netpbm's formats."""
    decoder, _, start, _ = image.tile[0]
    if decoder == "ppm_plain":  # numbers and comments
        image.fp.seek(start)
        return _NETPBM_HEAD.search(re.sub(rb"#[^\r\n]*", b"", image.fp.read())) is not None
    bits = image.width * len(image.getbands()) * (1 if image.mode == "1" else 8)
    image.fp.seek(start + image.height * ((bits + 7) // 8))
    return _NETPBM_HEAD.match(image.fp.read(64)) is not None


def _is_divided(image: Any) -> bool:
    """Whether Pillow has divided the colours of a TIFF file by their transparency, which it does if there is some."""
    if image.format != "TIFF" or _TIFF_PREMULTIPLIED not in image.tag_v2.get(_TIFF_EXTRA, ()):
        return False
    *_, last = image.getbands()
    return last in "Aa" and image.getchannel(last).getextrema() != (255, 255)


def _hides_transparency(image: Any) -> bool:
    """Whether a BMP file of 32 bits, of which Pillow reads 24, has more in the others than 0 or 255 everywhere."""
    if image.format != "BMP" or image.info["compression"] or image.tile[0][3][0] != "BGRX":
        return False
    image.fp.seek(image.tile[0][2])
    pixels = np.frombuffer(image.fp.read(4 * image.width * image.height), np.uint8)
    return np.unique(pixels[3::4]).tolist() not in ([], [0], [255])


def _orientation(image: Any) -> Any:
    return (image.tag_v2 if image.format == "TIFF" else image.getexif()).get(_ORIENTATION)


def read_all(read: Callable[[int], Iterable[str]], count: int, what: str) -> list[str]:
    """Call a function for each number below ``count``, on all cores, under a progress bar.

    Args:
        read: Reads one item, given its number, and returns what is wrong with it. It runs on threads,
            which wait for the disk together and decompress at the same time.
        count: Number of items.
        what: What they are, for the progress bar.

    Returns:
        Everything that was wrong, in order.
    """
    with ThreadPoolExecutor(os.cpu_count()) as threads:
        faults = with_progress(threads.map(read, range(count)), count, f"Decoding {what}")
        return [fault for found in faults for fault in found]


def with_progress(items: Iterable[T], count: int, description: str) -> Iterable[T]:
    """Draw a progress bar on stderr, in the first process alone, as the items are taken."""
    from rich.console import Console
    from rich.progress import track

    silent = getattr(rank_zero_only, "rank", 0) != 0
    return track(items, description, total=count, console=Console(stderr=True), disable=silent)


def refuse(faults: list[str], folder: Path) -> None:
    """Raise one error that names the faults, the first thousand of them, if there are any.

    Raises:
        ValueError: If there are.
    """
    if faults:
        listed = "\n".join(f"  {fault}" for fault in faults[:_LISTED])
        if len(faults) > _LISTED:
            listed += f"\n  and {len(faults) - _LISTED} more"
        raise ZNormValueError(
            f"{folder} cannot be used as it is, for {len(faults)} "
            f"{'reason' if len(faults) == 1 else 'reasons'}: convert, replace or remove these files.\n{listed}"
        )
