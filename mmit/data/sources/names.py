"""Names of pictures as records write them, and the names under which the files may lie.

Sets come with other folders than their records name, with other extensions, and with names that an unpacker changed.
Every such allowance is an option; nothing is searched for that was not asked for.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Literal

from mmit.data.sources.box_texts import Given, Wanted

_COCO = re.compile(r"(^|/)(?:COCO_(?:train|val|test)20\d\d_)?(\d{12}\.jpg)$")
_COCO_SPLITS = ("COCO_train2014_", "COCO_val2014_", "")
_ASCII = 128


@dataclass(frozen=True, kw_only=True)
class PictureOptions:
    """How pictures are found, and in which convention boxes stand.

    prefixes: the first of these that a name starts with is replaced. extensions: tried in turn where there is no such
    file (OCR-VQA names .jpg what was saved as .gif or .png). escaped_names: also look for names as Info-ZIP unpacks
    them, ``#U91d1`` for a character. coco_names: with or without ``COCO_train2014_`` or ``COCO_val2014_``.
    missing_images: a picture that is missing makes a bad record, or one that is left out and counted.
    boxes: what boxes in the texts mean, see ``box_texts``; boxes_to: what they become.
    """

    prefixes: Mapping[str, str] = field(default_factory=dict)
    extensions: tuple[str, ...] = ()
    escaped_names: bool = False
    coco_names: bool = False
    missing_images: Literal["error", "skip"] = "error"
    boxes: Given = "none"
    boxes_to: Wanted = "keep"


def candidates(reference: str, options: PictureOptions) -> Iterator[str]:
    """The names to look for, in order, the record's own (with its prefix replaced) first."""
    name = reference
    for start, replacement in options.prefixes.items():
        if name.startswith(start):
            name = replacement + name[len(start) :]
            break
    seen: set[str] = set()
    for variant in _coco(name) if options.coco_names else (name,):
        for extension in ("", *options.extensions):
            other = f"{_stem(variant)}.{extension.lstrip('.')}" if extension else variant
            for spelling in (other, escaped(other)) if options.escaped_names else (other,):
                if spelling not in seen:
                    seen.add(spelling)
                    yield spelling


def escaped(name: str) -> str:
    """A name as Info-ZIP's unzip writes it where it may not write the characters: ``#U91d1``, ``#L01f600``."""
    return "".join(
        letter if ord(letter) < _ASCII else f"#U{ord(letter):04x}" if ord(letter) < 0x10000 else f"#L{ord(letter):06x}"
        for letter in name
    )


def _coco(name: str) -> Iterator[str]:
    yield name
    found = _COCO.search(name)
    if found:
        for split in _COCO_SPLITS:
            yield f"{name[: found.start()]}{found[1]}{split}{found[2]}"


def _stem(name: str) -> str:
    folder, slash, file = name.rpartition("/")
    stem, dot, _ = file.rpartition(".")
    return folder + slash + (stem if dot else file)
