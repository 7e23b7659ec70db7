"""From an upright RGB picture to one canvas, in four manners and by two routes.

``pad`` puts the picture in the middle of the mean colour, ``squash`` ignores its shape, ``crop`` keeps the centre.
``fit``, for a grid of tiles, makes the picture as large as the canvas holds and puts it in the middle.
``WITH_PIL`` is bit for bit what LLaVA and the PIL processors of transformers make. ``WITH_TORCH`` resizes
uint8 tensors with the same filter, faster, and stays within two grey levels of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import interpolate

Size = tuple[int, int]
"""(height, width) of a tile, or of the canvas that is cut into tiles."""

Resize = Literal["pad", "squash", "crop"]
Colour = tuple[int, int, int]

_LARGEST_CANVAS = 1 << 24
"""Pixels. A picture that would be padded to more is made smaller in its long direction first, then padded."""
_DRAFT_SHIFT = 0.125
"""Pixels of the tile by which an edge of a picture may move when its JPEG is decoded smaller."""


def draft_scale(width: int, height: int, looks: Sequence[tuple[Size, Resize]]) -> int:
    """By how much (8, 4, 2 or 1) a JPEG decoder may make a picture smaller before it is resized.

    In every look it stays at least as large as it is drawn in the tile, and its edges stay where those of the whole
    would be.
    """
    for scale in (8, 4, 2):
        if all(_keeps_its_place(width, height, scale, size, resize) for size, resize in looks):
            return scale
    return 1


def _keeps_its_place(width: int, height: int, scale: int, size: Size, resize: Resize) -> bool:
    whole = _edges(width, height, size, resize)
    smaller = -(-width // scale), -(-height // scale)
    left, top, right, bottom = _edges(*smaller, size, resize)
    if smaller[0] < right - left or smaller[1] < bottom - top:
        return False
    # the last column and row may stand for more pixels than the picture has
    right = left + (right - left) * width / (scale * smaller[0])
    bottom = top + (bottom - top) * height / (scale * smaller[1])
    return max(abs(a - b) for a, b in zip((left, top, right, bottom), whole, strict=True)) <= _DRAFT_SHIFT


def _edges(width: int, height: int, size: Size, resize: Resize) -> tuple[float, float, float, float]:
    """Where left, top, right and bottom of a picture lie, in pixels of the tile; of ``crop`` outside it."""
    down, across = size
    if resize == "squash":
        return 0.0, 0.0, across, down
    if resize == "crop":
        covering = _cover(width, height, size)
        left, top = (across - covering[0]) // 2, (down - covering[1]) // 2
        return left, top, left + covering[0], top + covering[1]
    canvas = _canvas(width, height, size)
    x, y = across / canvas[0], down / canvas[1]
    left, top = (canvas[0] - width) // 2, (canvas[1] - height) // 2
    return left * x, top * y, (left + width) * x, (top + height) * y


def _to_tensor(image: Image.Image) -> Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)  # (3, H, W), channels last in memory


def _canvas(width: int, height: int, size: Size) -> tuple[int, int]:
    """The smallest (width, height) with the tile's shape that holds the picture; a square for a square tile."""
    if width * size[0] >= height * size[1]:
        return width, round(width * size[0] / size[1])
    return round(height * size[1] / size[0]), height


def _cover(width: int, height: int, size: Size) -> tuple[int, int]:
    """(width, height) at which the picture just covers the tile; rounded down as transformers does."""
    if width * size[0] <= height * size[1]:
        return size[1], int(size[1] * height / width)
    return int(size[0] * width / height), size[0]


def _inside(image: Image.Image, size: Size) -> tuple[int, int]:
    """(width, height) at which the picture just fits into the canvas; rounded up as LLaVA-NeXT does."""
    across, down = size[1] / image.width, size[0] / image.height
    if across < down:
        return size[1], min(math.ceil(image.height * across), size[0])
    return min(math.ceil(image.width * down), size[1]), size[0]


# --- PIL -----------------------------------------------------------------------------------------------------------


def _pad_with_pil(image: Image.Image, size: Size, fill: Colour) -> Tensor:
    width, height = _canvas(*image.size, size)
    if width * height > 4 * _LARGEST_CANVAS:
        return _pad_with_torch(image, size, fill)  # 60000 x 1 would need a canvas of 3.6 billion pixels
    canvas = Image.new("RGB", (width, height), fill)
    canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return _squash_with_pil(canvas, size, fill)


def _squash_with_pil(image: Image.Image, size: Size, _: Colour) -> Tensor:
    return _to_tensor(image.resize((size[1], size[0]), Image.Resampling.BICUBIC))


def _fit_with_pil(image: Image.Image, size: Size, fill: Colour) -> Tensor:
    width, height = _inside(image, size)
    canvas = Image.new("RGB", (size[1], size[0]), fill)
    resized = image.resize((width, height), Image.Resampling.BICUBIC)
    canvas.paste(resized, ((size[1] - width) // 2, (size[0] - height) // 2))
    return _to_tensor(canvas)


def _crop_with_pil(image: Image.Image, size: Size, _: Colour) -> Tensor:
    width, height = _cover(*image.size, size)
    left, top = (width - size[1]) // 2, (height - size[0]) // 2
    if width * height <= 4 * size[0] * size[1]:
        covering = image.resize((width, height), Image.Resampling.BICUBIC)
        return _to_tensor(covering.crop((left, top, left + size[1], top + size[0])))
    # A strip: compute the pixels of the tile only (4000 x 3 resized to cover 336 x 336 would be 448000 wide).
    across, down = image.width / width, image.height / height
    right, bottom = (left + size[1]) * across, (top + size[0]) * down
    box = (left * across, top * down, min(right, image.width), min(bottom, image.height))
    return _to_tensor(image.resize((size[1], size[0]), Image.Resampling.BICUBIC, box=box))


# --- torch ---------------------------------------------------------------------------------------------------------


def _scale(pixels: Tensor, size: Size) -> Tensor:
    """(3, h, w) uint8 to (3, *size): bicubic with antialiasing, the same filter as PIL's."""
    height, width = pixels.shape[1:]
    # Each direction rounds to whole grey levels, so their order shows. torch begins with the rows; Pillow since 13
    # with the columns where the height shrinks much more than the width (python-pillow/Pillow#9549).
    if height / size[0] > max(1.0, 2 * width / size[1] - 1):
        pixels = interpolate(pixels[None], size=(size[0], width), mode="bicubic", antialias=True)[0]
    return interpolate(pixels[None], size=size, mode="bicubic", antialias=True)[0]


def _centre(pixels: Tensor, size: Size, fill: Colour) -> Tensor:
    """(3, h, w) in the middle of (3, *size) of one colour, channels last in memory as the picture is."""
    _, height, width = pixels.shape
    top, left = (size[0] - height) // 2, (size[1] - width) // 2
    canvas = torch.tensor(fill, dtype=torch.uint8).repeat(*size, 1)
    canvas[top : top + height, left : left + width] = pixels.permute(1, 2, 0)
    return canvas.permute(2, 0, 1)


def _pad_with_torch(image: Image.Image, size: Size, fill: Colour) -> Tensor:
    """Pad, and resize one direction after the other in an order that keeps the padded picture small."""
    width, height = _canvas(*image.size, size)
    pixels = _to_tensor(image)
    if image.width == width:
        pixels = _scale(pixels, (image.height, size[1]))  # padding rows are flat: nothing to resize in them
        return _scale(_centre(pixels, (height, size[1]), fill), size)
    if width * height <= _LARGEST_CANVAS:
        return _scale(_centre(pixels, (height, width), fill), size)
    pixels = _scale(pixels, (size[0], image.width))
    return _scale(_centre(pixels, (size[0], width), fill), size)


def _squash_with_torch(image: Image.Image, size: Size, _: Colour) -> Tensor:
    return _scale(_to_tensor(image), size)


def _fit_with_torch(image: Image.Image, size: Size, fill: Colour) -> Tensor:
    width, height = _inside(image, size)
    return _centre(_scale(_to_tensor(image), (height, width)), size, fill)


def _crop_with_torch(image: Image.Image, size: Size, fill: Colour) -> Tensor:
    width, height = _cover(*image.size, size)
    if width * height > 4 * size[0] * size[1]:
        return _crop_with_pil(image, size, fill)  # a strip: torch cannot resize a part of a picture
    left, top = (width - size[1]) // 2, (height - size[0]) // 2
    return _scale(_to_tensor(image), (height, width))[:, top : top + size[0], left : left + size[1]]


_Route = Mapping[str, Callable[[Image.Image, Size, Colour], Tensor]]

WITH_PIL: _Route = {"pad": _pad_with_pil, "squash": _squash_with_pil, "crop": _crop_with_pil, "fit": _fit_with_pil}
"""By manner: (picture, (H, W) of the tile, padding colour) -> (3, H, W) uint8."""

WITH_TORCH: _Route = {
    "pad": _pad_with_torch,
    "squash": _squash_with_torch,
    "crop": _crop_with_torch,
    "fit": _fit_with_torch,
}
"""The same, faster, within two grey levels."""
