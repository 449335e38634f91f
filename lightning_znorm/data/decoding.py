"""Decoding of image files: as they are stored, many at once, with one error that names all bad files."""

import os
import re
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

import numpy as np
from lightning.pytorch.utilities import rank_zero_only
from numpy.typing import NDArray

from lightning_znorm.errors import ZNormValueError

if TYPE_CHECKING:
    from PIL.Image import Image

T = TypeVar("T")
Pixels: TypeAlias = NDArray[np.uint8] | NDArray[np.uint16]
"""Shape ``(H, W)``, or ``(H, W, 3)`` in colour."""


class BadFileError(ZNormValueError):
    """Says what is wrong with one file, in words that follow its path."""


VERSION = 3
"""Version of what `read_pixels` returns or refuses. Images that another version has cached are decoded again."""
# Formats whose files Pillow reads whole, or that are refused below.
_FORMATS = ("JPEG", "PNG", "BMP", "PPM", "GIF", "TIFF", "WEBP")
# Values of the TIFF tags SampleFormat and ExtraSamples.
_TIFF_UNSIGNED = {1, 4}  # 4: undefined
_TIFF_PREMULTIPLIED = 1
_NETPBM_HEAD = re.compile(rb"\s*P[1-7]\s")
_LISTED = 1000  # faults that one error names


def read_pixels(path: Path, modes: Iterable[str]) -> NDArray[np.uint8]:
    """Read an image file as it is stored.

    Colour profiles and gamma, which tell a screen what to show, are not applied.

    torchvision's and Pillow's decoders cut or convert some files without a warning. Such files are refused here.

    Args:
        path: A JPEG, PNG, BMP, PPM, GIF, TIFF or WebP file, whatever its suffix.
        modes: Modes of Pillow that are accepted.

    Returns:
        Pixels of shape ``(H, W)``, or ``(H, W, 3)`` in colour.

    Raises:
        BadFileError: If the file cannot be read to its end, has another mode, holds several images, or has more bits or
            channels than Pillow reads. Also if it is stored rotated or mirrored, because a mask would not fit what a
            viewer shows. Of a camera's JPEG file of several views (MPO) the first view is read.
    """
    image = _load(path, as_stored=True)
    if image.mode not in modes:
        raise BadFileError(f"has pixels of Pillow's mode {image.mode}, and {' or '.join(modes)} is expected")
    return np.asarray(image.convert("L") if image.mode == "1" else image)


def read_deep_pixels(path: Path, modes: Iterable[str], brighter: bool = False) -> Pixels:
    """Read an image file as it is stored, as `read_pixels` does, also grey PNG and TIFF files of 16 bits.

    Args:
        path: A JPEG, PNG, BMP, PPM, GIF, TIFF or WebP file, whatever its suffix.
        modes: Modes of Pillow that are accepted; ``"I;16"`` for grey of 16 bits.
        brighter: Whether to refuse a grey palette in which a higher number may be darker, so that number 0 may be white
            (as `PIL.Image.Image.quantize` makes it).

    Returns:
        Pixels of shape ``(H, W)``, uint8 or uint16, or ``(H, W, 3)`` in colour, uint8.

    Raises:
        BadFileError: As `read_pixels` raises it, and for such a palette.
    """
    image = _load(path, as_stored=True, deep=True)
    mode = "I;16" if image.mode.startswith("I") else image.mode
    if mode not in modes:
        remedy = (
            ". All its colours are grey: save it as grey, in Pillow by image.convert('L')" if _is_grey(image) else ""
        )
        raise BadFileError(f"has pixels of Pillow's mode {mode}, and {' or '.join(modes)} is expected{remedy}")
    if brighter and mode == "P" and _is_unordered(image):
        raise BadFileError(
            "has a grey palette whose numbers do not begin with black and become brighter, so they may not be the "
            "classes: save it as grey (in Pillow by image.convert('L')), or give the class of each number in "
            "mask_values"
        )
    if mode == "I;16":
        return np.asarray(image).astype(np.uint16)  # also from big-endian, and from int32 of older releases of Pillow
    return np.asarray(image.convert("L") if mode == "1" else image)


def read_rgb(path: str) -> "Image":
    """Read an image file in RGB, as torchvision's `ImageFolder` does.

    Grey, palettes, CMYK and YCbCr are converted. Transparency is left out: transparent pixels keep the colours that are
    stored. Colour profiles, gamma and the orientation in a camera's EXIF data are not applied (Pillow does rotate TIFF
    files by their orientation).

    Args:
        path: A JPEG, PNG, BMP, PPM, GIF, TIFF or WebP file, whatever its suffix.

    Returns:
        A Pillow image.

    Raises:
        BadFileError: If the file cannot be read to its end, holds several images, or has more bits or channels than
            Pillow reads. Also if its colours are multiplied by their transparency, by which Pillow would divide them.
            Of a camera's JPEG file of several views (MPO) the first view is read.
    """
    image = _load(path)
    try:
        if image.mode == "P" and "transparency" in image.info:
            image = image.convert("RGBA")  # Pillow warns if it is converted to RGB directly
        return image.convert("RGB")
    except ValueError as error:
        raise BadFileError(
            f"has pixels of Pillow's mode {image.mode}, which cannot be converted to RGB ({error})"
        ) from error


def size_of(path: Path) -> tuple[int, int] | None:
    """Return height and width from the header of an image file; None if the header cannot be read."""
    kind = kind_of(path)
    return None if kind is None else kind[2:]


def kind_of(path: Path) -> tuple[int, int, int, int] | None:
    """Return channels, bits of each, height and width from the header of an image file; None if it cannot be read."""
    from PIL import Image

    try:
        with Image.open(path, formats=_FORMATS) as image:
            bits = 16 if _has_16_bits(image) else 8
            return len(image.getbands()), bits, image.height, image.width
    except Exception:  # Pillow's decoders raise any; `read_pixels` meets it again and reports it
        return None


def _load(path: str | Path, as_stored: bool = False, deep: bool = False) -> "Image":
    from PIL import Image

    try:
        with Image.open(path, formats=_FORMATS) as image:
            _refuse_what_would_be_altered(image, deep)
            if as_stored:
                if (orientation := _orientation(image)) in range(2, 9):
                    raise BadFileError(f"is stored rotated or mirrored (EXIF orientation {orientation})")
                if _hides_transparency(image):
                    raise BadFileError("has a fourth channel that varies, and 3 would be read")
            image.load()
            if _is_divided(image):
                raise BadFileError("has colours multiplied by their transparency, which would be read divided by it")
            return image
    except BadFileError:
        raise
    except Exception as error:  # the errors of Pillow's decoders have no common base
        raise BadFileError(f"cannot be read as an image ({type(error).__name__}: {error})") from error


def _refuse_what_would_be_altered(image: Any, deep: bool) -> None:
    """Refuse what Pillow would cut or change: more than one image, more than 8 bits a channel, further channels."""
    from PIL.ExifTags import Base

    # MPO is a camera's JPEG file with other views or sizes of its image after the first.
    if getattr(image, "is_animated", False) and image.format != "MPO":
        raise BadFileError(f"holds {image.n_frames} images (pages of a volume, or frames), and one is expected")
    if _is_deep(image) and not (deep and _has_16_bits(image)):
        read = (
            "16 are read of grey PNG and TIFF files alone (save others as .npy)" if deep else "no more than 8 are read"
        )
        raise BadFileError(f"has more than 8 bits for each channel, and {read}")
    if image.format == "PPM" and _has_further_image(image):
        raise BadFileError("holds several images, and one is expected")
    if image.format != "TIFF":
        return
    stored, read = image.tag_v2.get(Base.SamplesPerPixel, 1), len(image.getbands()) - (image.mode == "RGBX")
    if stored != read:
        raise BadFileError(f"has {stored} channels, of which {read} would be read")
    if not {*image.tag_v2.get(Base.SampleFormat, ())} <= _TIFF_UNSIGNED:
        raise BadFileError("has signed values, which would be read as unsigned")


def _is_deep(image: Any) -> bool:
    """Return whether a channel has more than 8 bits."""
    from PIL.ExifTags import Base

    if image.mode[0] in "IF":
        return True
    if image.format == "TIFF":
        bits: tuple[int, ...] = image.tag_v2.get(Base.BitsPerSample, (1,))
        return max(bits) > 8
    arguments = [tile[3] for tile in image.tile]  # the decoders' arguments: no other attribute tells the depth
    if image.format == "PNG":
        return any(";16" in pixels for pixels in arguments)
    # The last argument of the PPM decoder is the largest value.
    return image.format == "PPM" and any(not isinstance(each, str) and (each[-1] or 0) > 255 for each in arguments)


def _has_16_bits(image: Any) -> bool:
    """Return whether an image is grey of up to 16 bits. Of colours of 16 bits, Pillow reads 8."""
    if image.format == "TIFF":
        return str(image.mode).startswith("I;16")
    return image.format == "PNG" and any(tile[3] == "I;16B" for tile in image.tile)


def _has_further_image(image: Any) -> bool:
    """Return whether another image follows the first, which Pillow does not tell for Netpbm's formats."""
    decoder, _, start, _ = image.tile[0]
    if decoder == "ppm_plain":  # numbers and comments
        image.fp.seek(start)
        return _NETPBM_HEAD.search(re.sub(rb"#[^\r\n]*", b"", image.fp.read())) is not None
    bits = image.width * len(image.getbands()) * (1 if image.mode == "1" else 8)
    image.fp.seek(start + image.height * ((bits + 7) // 8))
    return _NETPBM_HEAD.match(image.fp.read(64)) is not None


def _is_divided(image: Any) -> bool:
    """Return whether Pillow has divided the colours of a TIFF file by their transparency."""
    from PIL.ExifTags import Base

    if image.format != "TIFF" or _TIFF_PREMULTIPLIED not in image.tag_v2.get(Base.ExtraSamples, ()):
        return False
    *_, last = image.getbands()
    return last in "Aa" and image.getchannel(last).getextrema() != (255, 255)


def _hides_transparency(image: Any) -> bool:
    """Return whether Pillow, which reads 24 bits of a BMP file of 32, leaves out more than 0 or 255 everywhere."""
    if image.format != "BMP" or image.info["compression"] or image.tile[0][3][0] != "BGRX":
        return False
    image.fp.seek(image.tile[0][2])
    pixels = np.frombuffer(image.fp.read(4 * image.width * image.height), np.uint8)
    return np.unique(pixels[3::4]).tolist() not in ([], [0], [255])


def _is_grey(image: Any) -> bool:
    """Return whether an image of colours holds nothing but grey."""
    if image.mode not in ("RGB", "RGBA"):
        return bool(image.mode == "LA")
    pixels = np.asarray(image)
    return bool((pixels[..., :1] == pixels[..., 1:3]).all())


def _is_unordered(image: Any) -> bool:
    """Return whether the colours of a palette that occur are grey, and number 0 is white or a higher one is darker."""
    numbers = np.unique(np.asarray(image))
    palette = np.zeros((256, 3), dtype=np.int64)
    colours = np.reshape(image.getpalette("RGB"), (-1, 3))
    palette[: len(colours)] = colours
    occurring = palette[numbers]
    if (occurring != occurring[:, :1]).any():
        return False
    return bool((np.diff(occurring[:, 0]) < 0).any() or (numbers[0] == 0 and occurring[0, 0] == 255))


def _orientation(image: Any) -> Any:
    from PIL.ExifTags import Base

    return (image.tag_v2 if image.format == "TIFF" else image.getexif()).get(Base.Orientation)


def read_all(read: Callable[[int], Iterable[str]], count: int, what: str, max_threads: int | None = None) -> list[str]:
    """Call a function for each number below ``count``, on all cores that the process may use, with a progress bar.

    Args:
        read: Reads one item, given its number, and returns its faults. It runs in threads, which wait for the disk
            together and decode at the same time.
        count: Number of items.
        what: What they are, for the progress bar.
        max_threads: Most threads, where each of them needs much memory.

    Returns:
        The faults of all items, in order.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with ThreadPoolExecutor(min(cores, max_threads or cores)) as threads:
        faults = with_progress(threads.map(read, range(count)), count, f"Decoding {what}")
        return [fault for found in faults for fault in found]


def with_progress(items: Iterable[T], count: int, description: str) -> Iterable[T]:
    """Return the items, with a progress bar on stderr in the process of rank 0."""
    from rich.console import Console
    from rich.progress import track

    silent = getattr(rank_zero_only, "rank", 0) != 0
    return track(items, description, total=count, console=Console(stderr=True), disable=silent)


def refuse(faults: list[str], folder: Path) -> None:
    """Raise one error that names the faults, at most the first thousand, if there are any.

    Raises:
        ValueError: If there are faults.
    """
    if faults:
        listed = "\n".join(f"  {fault}" for fault in faults[:_LISTED])
        if len(faults) > _LISTED:
            listed += f"\n  and {len(faults) - _LISTED} more"
        raise ZNormValueError(
            f"{folder} cannot be used as it is, for {len(faults)} "
            f"{'reason' if len(faults) == 1 else 'reasons'}: convert, replace or remove these files.\n{listed}"
        )
