"""Boxes inside texts: found, checked, and written in one stated convention.

    xyxy01          [x1, y1, x2, y2] in 0..1 of the picture
    xyxy01_padded   the same in 0..1 of the picture padded to a square (LLaVA 1.5, its RefCOCO and VG answers)
    xyxy_px         "x1 y1 x2 y2" or [x1, y1, x2, y2] in pixels (MultiInstruct)
    xywh_px         "X:105 Y:350 Width:258 Height:258" in pixels (LRV-Instruction)

Padding puts the shorter side's missing pixels half before and half after, as LLaVA's own preparation does. What is
written is always [x1, y1, x2, y2] in 0..1 with three decimals.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from mmit.conversation import ImageRef, Message
from mmit.data.faults import SampleError

Box = tuple[float, float, float, float]

_NUMBER = r"(\d+(?:\.\d+)?)"
_SHARE = r"([01](?:\.\d+)?)"
_BRACKETS = r"\[\s*" + r"\s*,\s*".join([_SHARE] * 4) + r"\s*\]"
_PIXELS = (
    r"\[\s*" + r"\s*,\s*".join([_NUMBER] * 4) + r"\s*\]"
    r"|(?<![\d.] )(?<![\d.])" + " ".join([_NUMBER] * 4) + r"(?![\d]| \d|\.\d)"
)
_NAMED = rf"X:\s*{_NUMBER},?\s*Y:\s*{_NUMBER},?\s*Width:\s*{_NUMBER},?\s*Height:\s*{_NUMBER}"
_PATTERNS: Mapping[str, re.Pattern[str]] = {
    "xyxy01": re.compile(_BRACKETS),
    "xyxy01_padded": re.compile(_BRACKETS),
    "xyxy_px": re.compile(_PIXELS),
    "xywh_px": re.compile(_NAMED, re.IGNORECASE),
}
_SLACK = 2.0  # pixels by which annotations reach over the edge (COCO, VG); more is another picture


def settle(
    messages: tuple[Message, ...], sizes: Sequence[tuple[int, int]], *, given: str, wanted: str
) -> tuple[tuple[Message, ...], str]:
    """The messages with their boxes in the convention ``wanted``, and the convention they are in ("" without boxes).

    wanted "keep" leaves shares of the picture as they are and turns pixels into xyxy01.
    Raises SampleError: a box out of the picture, or one that could belong to any of several pictures.
    """
    pattern = _PATTERNS[given]
    if not any(pattern.search(part) for m in messages for part in m.content if isinstance(part, str)):
        return messages, ""
    pixels = given.endswith("_px")
    target = wanted if wanted != "keep" else "xyxy01" if pixels else given
    if target == given:
        return messages, given
    places = {part.index for message in messages for part in message.content if isinstance(part, ImageRef)}
    if len(places) != 1:
        raise SampleError(f"a box in the text and {len(places)} pictures: which one it is in is not said")
    size = sizes[places.pop()]

    def written(found: re.Match[str]) -> str:
        numbers = [float(number) for number in found.groups() if number is not None]
        return write(convert(_box(numbers, given), size, given=given, wanted=target))

    return tuple(
        replace(m, content=tuple(pattern.sub(written, p) if isinstance(p, str) else p for p in m.content))
        for m in messages
    ), target


def convert(box: Box, size: tuple[int, int], *, given: str, wanted: str) -> Box:
    """A box (x1, y1, x2, y2) from one convention to another; pixels are given as corners. Raises SampleError."""
    width, height = size
    side = max(width, height)
    if given == "xyxy01_padded":
        left, top = (side - width) // 2, (side - height) // 2
        corners = (box[0] * side - left, box[1] * side - top, box[2] * side - left, box[3] * side - top)
        slack = _SLACK + 0.005 * side  # boxes are published with two or three decimals
    elif given == "xyxy01":
        corners = (box[0] * width, box[1] * height, box[2] * width, box[3] * height)
        slack = _SLACK
    else:
        corners, slack = box, _SLACK
    x1, y1, x2, y2 = corners
    inside = -slack <= x1 <= x2 <= width + slack and -slack <= y1 <= y2 <= height + slack
    if not inside:
        raise SampleError(f"the box {write(box)} ({given}) is not inside the picture of {width} x {height}")
    x1, x2 = (min(max(x, 0.0), width) for x in (x1, x2))
    y1, y2 = (min(max(y, 0.0), height) for y in (y1, y2))
    if wanted == "xyxy01_padded":
        left, top = (side - width) // 2, (side - height) // 2
        return (x1 + left) / side, (y1 + top) / side, (x2 + left) / side, (y2 + top) / side
    return x1 / width, y1 / height, x2 / width, y2 / height


def write(box: Sequence[float]) -> str:
    """[x1, y1, x2, y2] with three decimals."""
    return "[" + ", ".join(f"{number:.3f}" for number in box) + "]"


def from_xywh(value: Any) -> Box:  # noqa: ANN401  (whatever JSON holds)
    """COCO's [x, y, width, height] as corners. Raises SampleError."""
    if not isinstance(value, list) or len(value) != 4 or not all(isinstance(n, int | float) for n in value):
        raise SampleError(f"a box is [x, y, width, height]; this one is {value!r}")
    x, y, width, height = value
    return float(x), float(y), float(x + width), float(y + height)


def _box(numbers: Sequence[float], given: str) -> Box:
    a, b, c, d = numbers
    return (a, b, a + c, b + d) if given == "xywh_px" else (a, b, c, d)
