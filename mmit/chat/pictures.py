"""Pictures as a person hands them over, turned into the encoded bytes of a conversation."""

from __future__ import annotations

import io
from pathlib import Path

from PIL import Image, ImageOps

from mmit.errors import DataError
from mmit.images import read_size

Picture = str | Path | bytes | Image.Image
"""A file's path, the encoded bytes of an image, or an image of Pillow."""

_PNG_MODES = ("1", "L", "LA", "P", "RGB", "RGBA", "I", "I;16")


def picture_bytes(picture: Picture) -> bytes:
    """The encoded bytes of a picture that is readable by its header.

    Raises DataError that names the file where there is none, or where it holds no image or a decompression bomb.
    """
    if isinstance(picture, Image.Image):
        data, name = _encoded(picture), "the image"
    elif isinstance(picture, bytes):
        data, name = picture, "the image"
    else:
        name = str(picture)
        try:
            data = Path(picture).expanduser().read_bytes()
        except OSError as error:
            raise DataError(f"image {name} cannot be read: {error.strerror}") from error
    try:
        read_size(data)
    except DataError as error:
        raise DataError(f"{name}: {error}") from error
    return data


def _encoded(image: Image.Image) -> bytes:
    """PNG, upright: the orientation in the metadata of a photo would not survive."""
    try:
        upright = ImageOps.exif_transpose(image)
        if upright.mode not in _PNG_MODES:
            upright = upright.convert("RGB")
        buffer = io.BytesIO()
        upright.save(buffer, "PNG")
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"the image is damaged: {error}") from error
    return buffer.getvalue()
