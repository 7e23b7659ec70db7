"""A picture as a data URL, no larger than a language model needs it."""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image, ImageOps

from mmit.data.faults import SampleError
from mmit.data.shards import image_type
from mmit.errors import DataError
from mmit.images import read_size

_MIME = {"jpg": "image/jpeg", "png": "image/png", "webp": "image/webp"}
_QUALITY = 90
_ORIENTATION = 0x0112


def data_url(picture: bytes, *, max_side: int) -> str:
    """The picture as it is where every server can read it; else upright, at most ``max_side`` pixels long, as JPEG.

    Raises SampleError for what is no picture, or is damaged.
    """
    try:
        width, height = read_size(picture)
    except DataError as error:
        raise SampleError(str(error)) from None
    mime = _MIME.get(image_type(picture), "")
    try:
        image = Image.open(io.BytesIO(picture))
        if not mime or max(width, height) > max_side or image.getexif().get(_ORIENTATION, 1) != 1:
            picture, mime = _smaller(image, max_side), "image/jpeg"
    except (OSError, SyntaxError, ValueError) as error:
        raise SampleError(f"the image is damaged: {error}") from None
    return f"data:{mime};base64,{base64.b64encode(picture).decode()}"


def with_picture(messages: tuple[Any, ...], url: str) -> list[Any]:
    """The messages of a request with the picture in its place."""
    return [
        message
        if isinstance(message["content"], str)
        else {
            **message,
            "content": [
                {"type": "image_url", "image_url": {"url": url}} if part["type"] == "image_url" else part
                for part in message["content"]
            ],
        }
        for message in messages
    ]


def _smaller(image: Image.Image, max_side: int) -> bytes:
    upright = ImageOps.exif_transpose(image)
    if upright.has_transparency_data:
        white = Image.new("RGBA", upright.size, "white")
        upright = Image.alpha_composite(white, upright.convert("RGBA"))
    upright = upright.convert("RGB")
    upright.thumbnail((max_side, max_side))
    file = io.BytesIO()
    upright.save(file, "JPEG", quality=_QUALITY)
    return file.getvalue()
