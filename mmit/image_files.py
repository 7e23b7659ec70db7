"""Image files: from encoded bytes to upright RGB, or to the displayed size alone; what is wrong is a DataError.

Nothing is decoded before the header has said that the number of pixels is bearable.
"""

from __future__ import annotations

import io
import struct
import warnings
import zlib
from collections.abc import Sequence

import numpy as np
from PIL import Image, UnidentifiedImageError
from PIL.JpegImagePlugin import JpegImageFile

from mmit.errors import DataError
from mmit.resize import Colour, Resize, Size, draft_scale

DEFAULT_MAX_PIXELS = 89_478_485
"""PIL's own limit, at which it only warns; here an image beyond it is refused before it is decoded."""

HARD_MAX_PIXELS = 2 * DEFAULT_MAX_PIXELS
"""PIL's own bound, at which it raises."""

_ORIENTATION = 0x0112
_UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPS_SIDES = (5, 6, 7, 8)
# What PIL's readers raise on damaged files; a bug of ours (KeyError, AttributeError, ...) is not among them.
_DAMAGE = (OSError, SyntaxError, ValueError, EOFError, IndexError, OverflowError, struct.error, zlib.error)


def decode(
    data: bytes, *, max_pixels: int, behind: Colour, drawn_into: Sequence[tuple[Size, Resize]] = ()
) -> Image.Image:
    """The picture, upright and RGB. Raises DataError if ``data`` is no image, is damaged, or has too many pixels.

    behind: the colour behind transparent pixels. drawn_into: the tiles it will be drawn into, for the JPEG decoder to
    make it smaller where none of them loses by it (``resize.draft_scale``); empty: it is decoded as it is.
    """
    image = _open(data, max_pixels)
    orientation = _orientation(image)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL's remarks on palettes and metadata; damage raises
            if drawn_into and isinstance(image, JpegImageFile):
                turned = orientation in _SWAPS_SIDES
                scale = draft_scale(
                    *image.size, [(size[::-1] if turned else size, resize) for size, resize in drawn_into]
                )
                image.draft(None, (image.width // scale, image.height // scale))
            image.load()
            rgb = _to_rgb(image, behind)
    except _DAMAGE as error:
        raise DataError(f"the image is damaged: {error}") from error
    return rgb.transpose(_UPRIGHT[orientation]) if orientation in _UPRIGHT else rgb


def read_size(data: bytes, *, max_pixels: int = DEFAULT_MAX_PIXELS) -> Size:
    """The displayed (width, height) of an encoded image, EXIF rotation applied, from its header alone.

    Raises DataError if ``data`` is no image or has more than ``max_pixels``.
    """
    image = _open(data, max_pixels)
    width, height = image.size
    return (height, width) if _orientation(image) in _SWAPS_SIDES else (width, height)


def _open(data: bytes, max_pixels: int) -> Image.Image:
    """Read the header. Nothing is decoded before the number of pixels is known to be bearable."""
    if not data:
        raise DataError("the image has zero bytes")
    try:
        with warnings.catch_warnings():
            # PIL warns of a bomb and goes on; the check below refuses it. Odd metadata is no reason to warn either.
            warnings.simplefilter("ignore")
            image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError as error:
        raise DataError(f"{len(data)} bytes that are no image PIL can read") from error
    except Image.DecompressionBombError as error:
        raise DataError(f"the image has more than {HARD_MAX_PIXELS} pixels: a decompression bomb?") from error
    except _DAMAGE as error:
        raise DataError(f"the image header is damaged: {error}") from error
    width, height = image.size
    if width * height > max_pixels:
        raise DataError(
            f"the image has {width} x {height} = {width * height} pixels, more than max_pixels = {max_pixels}"
        )
    return image


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation 1..8; 1 where there is none or it is unreadable."""
    if image.format == "TIFF":
        return 1  # Pillow itself turns these upright
    if image.format == "PNG" and not {"exif", "Raw profile type exif"} & image.info.keys():
        return 1  # getexif would decode the whole PNG to look for a chunk behind the pixels
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except _DAMAGE:
        return 1  # broken metadata beside a good picture: viewers show it unrotated
    return found if found in _UPRIGHT else 1


def _to_rgb(image: Image.Image, behind: Colour) -> Image.Image:
    if image.mode.startswith("I") or image.mode == "F":
        return _high_depth_to_rgb(image)
    if not image.has_transparency_data:
        rgb = image.convert("RGB")
    else:
        rgba = image.convert("RGBA")
        canvas = Image.new("RGBA", rgba.size, (*behind, 255))
        rgb = Image.alpha_composite(canvas, rgba).convert("RGB")
    rgb.info = {}  # a transparency key that survives would make readers blank out that colour
    return rgb


def _high_depth_to_rgb(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits, scaled from 0..65535 to 0..255 (PIL's own conversion clips at 255)."""
    values = np.asarray(image)
    if image.mode == "F" or values.min() < 0 or values.max() > 65_535:
        raise DataError(f"the image holds values outside 0..65535 (PIL mode {image.mode}); convert it to 8 or 16 bits")
    grey = np.rint(values.astype(np.float32) / 257).astype(np.uint8)
    return Image.fromarray(grey, mode="L").convert("RGB")
