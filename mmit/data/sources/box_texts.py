"""Boxes inside texts: found, checked against the picture, and written in one stated convention.

xyxy01, xyxy01_padded   [0.12, 0.3, 0.44, 0.5]   (LLaVA 1.5 writes the padded ones)
xyxy_px                 "12 30 44 50" or [12.0, 30.0, 44.0, 50.0]   (MultiInstruct)
xywh_px                 "X:105 Y:350 Width:258 Height:258" (LRV-Instruction) or [105.0, 350.0, 258.0, 258.0] (COCO)
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Literal

from msgspec import structs

from mmit.conversation import ImageRef, Message
from mmit.data.construct.boxes import read_box, write_box
from mmit.data.faults import SampleError

Given = Literal["none", "xyxy01", "xyxy01_padded", "xyxy_px", "xywh_px"]
Wanted = Literal["keep", "xyxy01", "xyxy01_padded"]

_NUMBER = r"(-?\d+(?:\.\d+)?(?:e-?\d+)?)"
_SHARE = r"([01](?:\.\d+)?)"


def _bracketed(number: str) -> str:
    return r"\[\s*" + r"\s*,\s*".join([number] * 4) + r"\s*\]"


# four numbers with no fifth before or after them
_SPACED = r"(?<![\d.\-])(?<!\d )" + " ".join([_NUMBER] * 4) + r"(?! ?\d|\.\d)"
_NAMED = rf"X:\s*{_NUMBER},?\s*Y:\s*{_NUMBER},?\s*Width:\s*{_NUMBER},?\s*Height:\s*{_NUMBER}"
_PATTERNS: Mapping[str, re.Pattern[str]] = {
    "xyxy01": re.compile(_bracketed(_SHARE)),
    "xyxy01_padded": re.compile(_bracketed(_SHARE)),
    "xyxy_px": re.compile(f"{_bracketed(_NUMBER)}|{_SPACED}"),
    "xywh_px": re.compile(f"{_bracketed(_NUMBER)}|{_NAMED}", re.IGNORECASE),
}


def settle(
    messages: tuple[Message, ...], sizes: Sequence[tuple[int, int]], *, given: Given, wanted: Wanted
) -> tuple[tuple[Message, ...], str]:
    """The messages with their boxes as ``wanted``, and the convention they are in now ("" where there is no box).

    wanted "keep" leaves fractions as they are and turns pixels into xyxy01.
    Raises SampleError: a box that is not in the picture, or that could be in any of several.
    """
    if given == "none":
        return messages, ""
    pattern = _PATTERNS[given]
    if not any(pattern.search(part) for m in messages for part in m.content if isinstance(part, str)):
        return messages, ""
    target = wanted if wanted != "keep" else "xyxy01_padded" if given == "xyxy01_padded" else "xyxy01"
    if target == given:
        return messages, given
    places = {part.index for message in messages for part in message.content if isinstance(part, ImageRef)}
    if len(places) != 1:
        raise SampleError(f"a box in the text and {len(places)} pictures: which one it is in is not said")
    size = sizes[places.pop()]

    def written(found: re.Match[str]) -> str:
        numbers = [float(number) for number in found.groups() if number is not None]
        return write_box(read_box(numbers, given, size), target, size)

    return tuple(
        structs.replace(m, content=tuple(pattern.sub(written, p) if isinstance(p, str) else p for p in m.content))
        for m in messages
    ), target
