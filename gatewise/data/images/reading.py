"""Reading any image file as an upright RGB image.

Users' class folders contain palettes, transparency, 16-bit grays, CMYK scans, rotated phone pictures and files that are
not images at all. All image reading goes through `read_image`, which opens only raster formats. Pillow also supports
formats that start a program (EPS starts Ghostscript) or a registered loader.
"""

from __future__ import annotations

import os
from functools import cache
from io import BytesIO
from typing import IO

import numpy as np
from PIL import ExifTags, Image

from gatewise.errors import UserError
from gatewise.files import require_regular

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000", "AVIF")
"""Pillow's names of the accepted formats."""

# Operations that undo each EXIF orientation (CIPA DC-008, table 6); 1 is upright.
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class UnreadableImageError(UserError):
    """A file is missing or cannot be decoded as an image. The message names it and the reason."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(f"{name} cannot be read as an image ({reason})")
        self.name = name
        self.reason = reason

    def __reduce__(self) -> tuple[type[UnreadableImageError], tuple[str, str]]:
        return type(self), (self.name, self.reason)


def read_image(source: str | os.PathLike[str] | bytes, name: str | None = None) -> Image.Image:
    """Return the fully decoded, upright RGB image in a file or in the bytes of one.

    Args:
        source: path, or bytes of an image in one of `FORMATS`. Of an animation, the first frame is used.
        name: name in error messages; None: the path.
    Raises:
        UnreadableImageError: if there is no such file, it does not decode to the end, or it has more pixels than
            Pillow's `Image.MAX_IMAGE_PIXELS`, which is checked before anything is decoded.
    """
    name = name or ("<bytes>" if isinstance(source, bytes) else os.fsdecode(source))
    try:
        with _opened(source, name) as file, Image.open(file, formats=_known_formats()) as image:
            _require_bounded(image, name)
            image.load()
            orientation = image.getexif().get(ExifTags.Base.Orientation)
            upright = image.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else image
            return to_rgb(upright)
    except UnreadableImageError:
        raise
    # Decoders raise almost any exception for damaged bytes (OSError, SyntaxError, struct.error, IndexError,
    # DecompressionBombError, ...). Whichever it is, the file is at fault.
    except Exception as error:
        raise UnreadableImageError(name, _reason(error)) from error


def to_rgb(image: Image.Image) -> Image.Image:
    """Convert an image to RGB with 8 bits per channel.

    Transparency is blended with white. 16-bit grays (and 32-bit ones, taken as 0 to 65535) keep their upper 8 bits.
    Floating-point grays are taken as 0 to 1, or as 0 to 255 if a pixel exceeds 1.
    """
    if image.mode == "RGB" and not image.has_transparency_data:
        return image
    if image.mode == "I" or image.mode.startswith("I;16"):
        gray = np.clip(np.asarray(image, dtype=np.int64), 0, 65535) >> 8
        return Image.fromarray(gray.astype(np.uint8)).convert("RGB")
    if image.mode == "F":
        values = np.nan_to_num(np.asarray(image))
        scale = 255.0 if values.max(initial=0.0) <= 1.0 else 1.0
        return Image.fromarray(np.clip(np.rint(values * scale), 0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        layer = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", image.size, "white"), layer).convert("RGB")
    return image.convert("RGB")


def _opened(source: str | os.PathLike[str] | bytes, name: str) -> IO[bytes]:
    if isinstance(source, bytes):
        return BytesIO(source)
    # Absolute, because a leading tilde is part of the name here.
    path = os.path.abspath(os.fsdecode(source))
    try:
        return require_regular(path, "image").open("rb")
    except UserError as error:
        if isinstance(error.__cause__, Exception):
            raise UnreadableImageError(name, _reason(error.__cause__)) from error
        kind = "is a directory" if os.path.isdir(path) else "not a regular file"
        raise UnreadableImageError(name, kind) from error


@cache
def _known_formats() -> tuple[str, ...]:
    """Return the formats in `FORMATS` that this version of Pillow supports."""
    Image.init()
    return tuple(kind for kind in FORMATS if kind in Image.OPEN)


def _require_bounded(image: Image.Image, name: str) -> None:
    most = Image.MAX_IMAGE_PIXELS
    if most is not None and image.width * image.height > most:
        raise UnreadableImageError(
            name,
            f"{image.width} x {image.height} pixels are more than the {most:,} that PIL.Image.MAX_IMAGE_PIXELS "
            "allows; it could be a decompression bomb",
        )


def _reason(error: Exception) -> str:
    if isinstance(error, FileNotFoundError):
        return "no such file"
    if isinstance(error, OSError) and error.strerror:
        return error.strerror.lower()
    if isinstance(error, Image.UnidentifiedImageError):
        return "not an image, or in an unsupported format"
    return " ".join(str(error).split()) or type(error).__name__
