"""Pictures for questions."""

from __future__ import annotations

import io
import zlib

from PIL import Image


def picture(
    colour: str | int | tuple[int, ...], form: str = "PNG", mode: str = "RGB", size: tuple[int, int] = (30, 20)
) -> bytes:
    """An encoded picture of one colour."""
    buffer = io.BytesIO()
    Image.new(mode, size, colour).save(buffer, form)
    return buffer.getvalue()


def bomb() -> bytes:
    """A PNG of a few bytes whose header announces 100,000 x 100,000 pixels."""
    small = picture("red")
    header = b"IHDR" + (100_000).to_bytes(4, "big") * 2 + small[24:29]
    return small[:12] + header + zlib.crc32(header).to_bytes(4, "big") + small[33:]
