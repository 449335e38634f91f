"""Image files that Pillow reads only in part, or with other values, and that it cannot write."""

import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, TiffImagePlugin

SIZE = 32
rng = np.random.default_rng(0)
DEEP = rng.integers(0, 2**16, (SIZE, SIZE, 4), dtype=np.uint16)
COLOURS = rng.integers(0, 256, (SIZE, SIZE, 3), dtype=np.uint8)


def tiff(pixels: np.ndarray, photometric: int, **tags: Any) -> bytes:
    """Return an uncompressed TIFF file in the byte order of the pixels. Tags are given by number: ``t338=(0,)``."""
    order = ">" if pixels.dtype.byteorder == ">" else "<"
    height, width, channels = pixels.shape
    kind = {"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]
    values = {
        256: (width,), 257: (height,), 258: (pixels.dtype.itemsize * 8,) * channels, 259: (1,), 262: (photometric,),
        273: (0,), 277: (channels,), 278: (height,), 279: (pixels.nbytes,), 339: (kind,) * channels,
        **{int(name[1:]): value for name, value in tags.items()},
    }  # fmt: skip
    end = 8 + 2 + 12 * len(values) + 4
    behind = b""
    entries = []
    for tag, numbers in sorted(values.items()):
        packed = struct.pack(f"{order}{len(numbers)}I", *numbers)
        if len(numbers) > 1:
            behind, packed = behind + packed, struct.pack(f"{order}I", end + len(behind))
        entries.append([tag, len(numbers), packed])
    strip = struct.pack(f"{order}I", end + len(behind))
    head = (b"MM" if order == ">" else b"II") + struct.pack(f"{order}HIH", 42, 8, len(entries))
    for tag, count, packed in entries:
        head += struct.pack(f"{order}HHI", tag, 4, count) + (strip if tag == 273 else packed)
    return head + bytes(4) + behind + pixels.tobytes()


def png(pixels: np.ndarray, kind: int) -> bytes:
    """Return a PNG file of 16 bits for each channel. Kind 0 is grey, 2 RGB, 4 grey with alpha, 6 RGBA."""

    def chunk(name: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels.reshape(height, -1))
    head = struct.pack(">IIBBBBB", width, height, 16, kind, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def saved(image: Image.Image, format: str, **kwargs: Any) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        image.save(path, format=format, **kwargs)

    return write


def written(content: bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(content)

    return write


RGB = Image.fromarray(COLOURS)
PAGES: dict[str, Any] = {"save_all": True, "append_images": [Image.fromarray(255 - COLOURS)]}
EIGHT = (DEEP >> 8).astype(np.uint8)
PPM = b"P6 32 32 255\n" + COLOURS.tobytes()
PGM = b"P5 32 32 255\n" + COLOURS[..., 0].tobytes()
DEEP_FAULT, PAGES_FAULT = "has more than 8 bits for each channel", "holds 2 images"

# Older releases of Pillow do not know this kind.
_KNOWS_IT = any(mode == "La" for mode, _ in TiffImagePlugin.OPEN_INFO.values())
PREMULTIPLIED_GREY_FAULT = "has colours multiplied by their" if _KNOWS_IT else "cannot be read as an image"
REFUSED: dict[str, tuple[Callable[[Path], None], str]] = {
    "RGB 16 TIFF": (written(tiff(DEEP[..., :3].astype("<u2"), 2)), DEEP_FAULT),
    "RGB 16 TIFF, big-endian": (written(tiff(DEEP[..., :3].astype(">u2"), 2)), DEEP_FAULT),
    "RGBA 16 TIFF": (written(tiff(DEEP, 2, t338=(2,))), DEEP_FAULT),
    "CMYK 16 TIFF": (written(tiff(DEEP, 5)), DEEP_FAULT),
    "grey 16 TIFF": (saved(Image.fromarray(DEEP[..., 0]), "TIFF"), DEEP_FAULT),
    "grey 16 TIFF, LZW": (saved(Image.fromarray(DEEP[..., 0]), "TIFF", compression="tiff_lzw"), DEEP_FAULT),
    "grey int32 TIFF": (saved(Image.fromarray(DEEP[..., 0].astype(np.int32)), "TIFF"), DEEP_FAULT),
    "grey float32 TIFF": (saved(Image.fromarray(DEEP[..., 0].astype(np.float32)), "TIFF"), DEEP_FAULT),
    "RGB 16 PNG": (written(png(DEEP[..., :3], 2)), DEEP_FAULT),
    "RGBA 16 PNG": (written(png(DEEP, 6)), DEEP_FAULT),
    "grey 16 PNG": (written(png(DEEP[..., :1], 0)), DEEP_FAULT),
    "grey 16 PNG with alpha": (written(png(DEEP[..., :2], 4)), DEEP_FAULT),
    "RGB 16 PPM": (written(b"P6 32 32 65535\n" + DEEP[..., :3].astype(">u2").tobytes()), DEEP_FAULT),
    "RGB 10 PPM": (written(b"P6 32 32 1023\n" + (DEEP[..., :3] % 1024).astype(">u2").tobytes()), DEEP_FAULT),
    "RGB 16 PPM, plain": (written(b"P3 32 32 65535\n" + b"1000 2000 3000\n" * SIZE**2), DEEP_FAULT),
    "grey int8 TIFF": (written(tiff(EIGHT[..., :1].view(np.int8), 1)), "has signed values"),
    "four channels": (written(tiff(EIGHT, 2, t338=(0,))), "has 4 channels, of which 3 would be read"),
    "six channels": (
        written(tiff(np.concatenate([EIGHT, EIGHT[..., :2]], -1), 2, t338=(0, 0, 0))),
        "has 6 channels, of which 3 would be read",
    ),
    "two pages": (saved(RGB, "TIFF", **PAGES), PAGES_FAULT),
    "two pages, LZW": (saved(RGB, "TIFF", compression="tiff_lzw", **PAGES), PAGES_FAULT),
    "two pages of a volume of masks": (saved(RGB.convert("1").convert("L"), "TIFF", **PAGES), PAGES_FAULT),
    "GIF of two frames": (saved(RGB, "GIF", **PAGES), PAGES_FAULT),
    "PNG of two frames": (saved(RGB, "PNG", **PAGES), PAGES_FAULT),
    "WebP of two frames": (saved(RGB, "WEBP", lossless=True, **PAGES), PAGES_FAULT),
    "two PPM": (written(PPM + PPM), "holds several images"),
    "two PGM, a line between": (written(PGM + b"\n" + PGM), "holds several images"),
    "two PPM of 15 levels": (written(b"P6 1 1 15\nabcP6 1 1 15\nabc"), "holds several images"),
    "two PBM": (written(b"P4 9 1\nabP4 9 1\nab"), "holds several images"),
    "two PPM, plain": (written(b"P3 1 1 255 # P6\n1 2 3\nP3 1 1 255\n4 5 6\n"), "holds several images"),
    "premultiplied colours": (written(tiff(EIGHT, 2, t338=(1,))), "has colours multiplied by their transparency"),
    "premultiplied grey": (written(tiff(EIGHT[..., :2], 1, t338=(1,))), PREMULTIPLIED_GREY_FAULT),
    "JPEG 2000": (saved(RGB, "JPEG2000"), "cannot be read as an image"),
    "ICO of several sizes": (saved(RGB, "ICO", sizes=[(16, 16), (32, 32)]), "cannot be read as an image"),
}
"""Files that every reader refuses: how to write them, and the reason."""


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[274] = orientation
    return tags


TURNED = {
    "JPEG": saved(RGB, "JPEG", quality=100, subsampling=0, exif=exif(6)),
    "PNG": saved(RGB, "PNG", exif=exif(3)),
    "WebP": saved(RGB, "WEBP", lossless=True, exif=exif(2)),
    "TIFF": saved(RGB, "TIFF", tiffinfo={274: 8}),
}
TRANSPARENT = Image.fromarray(EIGHT)
CONVERTED = {
    "grey": saved(RGB.convert("L"), "PNG"),
    "grey 1": saved(RGB.convert("1"), "TIFF"),
    "grey 4": saved(RGB.convert("L").quantize(16).convert("L"), "PNG", bits=4),
    "palette": saved(RGB.convert("P"), "PNG"),
    "palette, transparent by bytes": saved(RGB.convert("P"), "PNG", transparency=bytes(range(100))),
    "palette, transparent by index": saved(RGB.convert("P"), "PNG", transparency=7),
    "GIF of one frame": saved(RGB, "GIF"),
    "RGB with a transparent colour": saved(RGB, "PNG", transparency=tuple(COLOURS[0, 0].tolist())),
    "RGBA PNG": saved(TRANSPARENT, "PNG"),
    "RGBA TIFF": saved(TRANSPARENT, "TIFF"),
    "RGBA BMP": saved(TRANSPARENT, "BMP"),
    "RGBA WebP": saved(TRANSPARENT, "WEBP", lossless=True, exact=True),
    "LA": saved(TRANSPARENT.convert("LA"), "PNG"),
    "CMYK JPEG": saved(RGB.convert("CMYK"), "JPEG"),
    "CMYK TIFF": saved(RGB.convert("CMYK"), "TIFF"),
    "YCbCr JPEG": saved(RGB, "JPEG"),
    "JPEG in TIFF": saved(RGB, "TIFF", compression="jpeg"),
    "two views of a camera": saved(RGB, "MPO", **PAGES),
    "colour profile": saved(RGB, "PNG", icc_profile=b"of a monitor"),
    "15 levels": written(b"P6 2 1 15\n" + bytes([0, 1, 2, 3, 4, 15])),
    "PPM": written(PPM),
    "PPM, an empty line behind it": written(PPM + b"\n"),
    "PPM, plain": written(b"P3 2 1 255 # P3\n1 2 3 4 5 6 # P3 2 1\n"),
    "PBM": written(b"P4 9 2\nabcd"),
}
"""Files that become RGB in the same way as with torchvision's loader."""
