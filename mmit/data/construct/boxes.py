"""Boxes of a picture, and the conventions in which published sets write them down.

With W x H the displayed size in pixels, and (x1, y1), (x2, y2) the left top and right bottom corner in pixels:

    xyxy_px        x1, y1, x2, y2
    xywh_px        x1, y1, x2 - x1, y2 - y1                                       (COCO)
    xyxy01         x1 / W, y1 / H, x2 / W, y2 / H
    cxcywh01       (x1 + x2) / 2W, (y1 + y2) / 2H, (x2 - x1) / W, (y2 - y1) / H   (YOLO)
    xyxy01_padded  (x + left) / S and (y + top) / S of the picture in the middle of a square:
                   S = max(W, H), left = floor((S - W) / 2), top = floor((S - H) / 2)          (LLaVA 1.5)
    xyxy_bins1000  min(999, floor(1000 x / W)), min(999, floor(1000 y / H)); read back as (bin + 0.5) / 1000

Written pixels are floor(v + 0.5), fractions have a fixed number of decimals (nearest, as Python's ``format`` rounds).
A box that leaves its picture by no more than 2 pixels or 2 % of the side is cut at the edge; any other is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, get_args

from mmit.data.faults import SampleError

Convention = Literal["xyxy_px", "xywh_px", "xyxy01", "cxcywh01", "xyxy01_padded", "xyxy_bins1000"]
CONVENTIONS: tuple[Convention, ...] = get_args(Convention)
Size = tuple[int, int]
Four = tuple[float, float, float, float]

BINS = 1000
_TOLERANCE_PX = 2.0
_TOLERANCE = 0.02

STATED: Mapping[Convention, str] = {
    "xyxy_px": "[left, top, right, bottom] in pixels",
    "xywh_px": "[left, top, width, height] in pixels",
    "xyxy01": "[left, top, right, bottom] in fractions of width and height",
    "cxcywh01": "[centre x, centre y, width, height] in fractions of width and height",
    "xyxy01_padded": "[left, top, right, bottom] in fractions of the image padded to a square",
    "xyxy_bins1000": "[left, top, right, bottom] on a scale from 0 to 999",
}
"""What a wording says of a convention."""


@dataclass(frozen=True)
class Box:
    """A box in pixels of the displayed picture, edges not rounded: 0 <= left < right <= W, and so for the height."""

    left: float
    top: float
    right: float
    bottom: float


def read_box(values: Sequence[float], convention: Convention, size: Size) -> Box:
    """The box that four numbers mean in a picture of ``size`` (width, height). Raises SampleError."""
    if len(values) != 4 or not all(isinstance(v, int | float) and math.isfinite(v) for v in values):
        raise SampleError(f"the box {list(values)} is not four numbers")
    a, b, c, d = (float(value) for value in values)
    if convention in ("xyxy_px", "xywh_px") and max(a, b, c, d) <= 1 and any(v % 1 for v in (a, b, c, d)):
        raise SampleError(f"the box {list(values)} is stated as {convention} and looks like fractions")
    corners = _READ[convention]((a, b, c, d), size)
    left, right = _inside(corners[0], corners[2], size[0], values)
    top, bottom = _inside(corners[1], corners[3], size[1], values)
    return Box(left, top, right, bottom)


def write_box(box: Box, convention: Convention, size: Size, *, decimals: int = 3) -> str:
    """``[a, b, c, d]`` as the convention writes it; ``decimals`` of fractions."""
    numbers = _WRITE[convention](box, size)
    if convention in ("xyxy_px", "xywh_px", "xyxy_bins1000"):
        return f"[{', '.join(str(int(number)) for number in numbers)}]"
    return f"[{', '.join(f'{number:.{decimals}f}' for number in numbers)}]"


def padding(size: Size) -> tuple[int, int, int]:
    """Left and top padding and the side of the square that a picture is padded to, as ``resize: pad`` does."""
    width, height = size
    side = max(width, height)
    return (side - width) // 2, (side - height) // 2, side


def _inside(low: float, high: float, limit: int, values: Sequence[float]) -> tuple[float, float]:
    tolerance = max(_TOLERANCE_PX, _TOLERANCE * limit)
    if low < -tolerance or high > limit + tolerance:
        raise SampleError(
            f"the box {list(values)} reaches from {low:g} to {high:g} pixels in a picture of {limit}: "
            "is it of another convention, or of another size of the picture?"
        )
    low, high = max(low, 0.0), min(high, float(limit))
    if low >= high:
        raise SampleError(f"the box {list(values)} has no area inside the picture")
    return low, high


def _from_padded(four: Four, size: Size) -> Four:
    left, top, side = padding(size)
    return four[0] * side - left, four[1] * side - top, four[2] * side - left, four[3] * side - top


def _from_centre(four: Four, size: Size) -> Four:
    (x, y, w, h), (width, height) = four, size
    return (x - w / 2) * width, (y - h / 2) * height, (x + w / 2) * width, (y + h / 2) * height


def _from_bins(four: Four, size: Size) -> Four:
    x1, y1, x2, y2 = ((number + 0.5) / BINS for number in four)
    return x1 * size[0], y1 * size[1], x2 * size[0], y2 * size[1]


_READ: Mapping[Convention, Callable[[Four, Size], Four]] = {
    "xyxy_px": lambda four, _: four,
    "xywh_px": lambda four, _: (four[0], four[1], four[0] + four[2], four[1] + four[3]),
    "xyxy01": lambda four, size: (four[0] * size[0], four[1] * size[1], four[2] * size[0], four[3] * size[1]),
    "cxcywh01": _from_centre,
    "xyxy01_padded": _from_padded,
    "xyxy_bins1000": _from_bins,
}


def _px(value: float) -> int:
    return math.floor(value + 0.5)


def _to_padded(box: Box, size: Size) -> Four:
    left, top, side = padding(size)
    return (box.left + left) / side, (box.top + top) / side, (box.right + left) / side, (box.bottom + top) / side


def _to_centre(box: Box, size: Size) -> Four:
    width, height = size
    return (
        (box.left + box.right) / 2 / width,
        (box.top + box.bottom) / 2 / height,
        (box.right - box.left) / width,
        (box.bottom - box.top) / height,
    )


def _bin(value: float, limit: int) -> int:
    return min(BINS - 1, math.floor(BINS * value / limit))


_WRITE: Mapping[Convention, Callable[[Box, Size], Four]] = {
    "xyxy_px": lambda box, _: (_px(box.left), _px(box.top), _px(box.right), _px(box.bottom)),
    "xywh_px": lambda box, _: (
        _px(box.left),
        _px(box.top),
        _px(box.right) - _px(box.left),
        _px(box.bottom) - _px(box.top),
    ),
    "xyxy01": lambda b, size: (b.left / size[0], b.top / size[1], b.right / size[0], b.bottom / size[1]),
    "cxcywh01": _to_centre,
    "xyxy01_padded": _to_padded,
    "xyxy_bins1000": lambda b, size: (
        _bin(b.left, size[0]),
        _bin(b.top, size[1]),
        _bin(b.right, size[0]),
        _bin(b.bottom, size[1]),
    ),
}
