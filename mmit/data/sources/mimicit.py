"""MIMIC-IT's form: instructions that name their pictures and the instructions they are related to.

    XX_instructions.json   {"meta": {}, "data": {"XX_INS_1": {"instruction", "answer", "image_ids", "rel_ins_ids"}}}
    XX.json or XX.parquet  the pictures in base64, by id; or a folder of ID.jpg
    XX_train.json          {"XX_INS_1": ["XX_INS_2", ...]}   other relations, where it is there

What several pictures and relations mean depends on the group, which the recipe names:

    image_text        related instructions are earlier questions about the same picture
    image_text_in_context   related instructions are examples with pictures of their own
    video_text        the pictures are frames of one video
    text_only         no pictures
"""

from __future__ import annotations

import base64
import binascii
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from mmit.conversation import ImageRef, Message, Part
from mmit.data import forms, rows
from mmit.data.faults import SampleError
from mmit.data.sources.grouped import Parts, beside
from mmit.data.sources.json_parts import JsonParts
from mmit.data.sources.parquet import ParquetRows
from mmit.data.sources.sampling import evenly
from mmit.errors import DataError

_NUMBERING = re.compile(r"(_\d+)?_INS_.*", re.DOTALL)


@dataclass(frozen=True, kw_only=True)
class MimicItOptions:
    """group: what pictures and relations mean. pictures: the file of base64 pictures beside the source; "" is a
    folder, the image root, with ID.jpg. relations: the file that replaces the related ids; "" keeps those of the
    records. context: at most so many related instructions. frames: at most so many frames of a video.
    """

    group: Literal["image_text", "image_text_in_context", "video_text", "text_only"]
    pictures: str = ""
    relations: str = ""
    context: int = 3
    frames: int = 8


def open_mimicit(source: Path, options: MimicItOptions, _root: Path) -> tuple[rows.Rows, forms.Parse]:
    """One conversation for every instruction, the related ones before it. Raises DataError, MissingExtra."""
    parts = JsonParts(source, "data")
    reader = _Instructions(
        parts=parts,
        places={name: number for number, name in enumerate(parts.names())},
        relations=dict(JsonParts(beside(source, options.relations)).items()) if options.relations else {},
        pictures=_open_pictures(source, options),
        options=options,
    )
    return Parts(parts), reader.parse


class _Pictures(Protocol):
    def read(self, name: str) -> str | bytes: ...


@dataclass(frozen=True, kw_only=True)
class _Instructions:
    parts: JsonParts
    places: Mapping[str, int]
    relations: Mapping[str, Any]
    pictures: _Pictures
    options: MimicItOptions

    def parse(self, record: Mapping[str, Any]) -> forms.Record:
        own = str(record["id"])
        related = self.relations.get(own, record.get("rel_ins_ids") or [])
        if not isinstance(related, list):
            raise SampleError("its related instructions are not a list")
        # the instruction itself is among its relations in some files
        names = [name for name in related if name != own][-self.options.context :] if self.options.context else []
        turns: list[Message] = []
        images: list[str | bytes] = []
        for member in [*(self._related(name) for name in names), record]:
            pictures = self._images(member, opens=not turns)
            front: tuple[Part, ...] = tuple(ImageRef(len(images) + n) for n in range(len(pictures)))
            images += pictures
            turns.append(Message(role="user", content=(*front, _text(member, "instruction"))))
            turns.append(Message(role="assistant", content=(_text(member, "answer"),)))
        return forms.Record(
            messages=forms.checked_turns(turns), images=tuple(images), meta={"id": own, "task": _task(own)}
        )

    def _related(self, name: str) -> Mapping[str, Any]:
        if name not in self.places:
            raise SampleError(f"the related instruction '{name}' is not in the file")
        return self.parts.item(self.places[name])[1]

    def _images(self, member: Mapping[str, Any], *, opens: bool) -> list[str | bytes]:
        if self.options.group == "text_only" or (not opens and self.options.group != "image_text_in_context"):
            return []
        ids = [str(one) for one in member.get("image_ids") or []]
        if not ids:
            raise SampleError(f"it has no image_ids, which the group {self.options.group} needs")
        if self.options.group == "video_text":
            ids = [ids[place] for place in evenly(len(ids), self.options.frames)]
        return [self.pictures.read(one) for one in ids]


def _task(own: str) -> str:
    """``LACONV`` of ``LACONV_00_INS_2``."""
    return _NUMBERING.sub("", own)


def _open_pictures(source: Path, options: MimicItOptions) -> _Pictures:
    if not options.pictures:
        return _Folder()
    path = beside(source, options.pictures)
    return _InParquet(ParquetRows(path)) if path.suffix == ".parquet" else _InJson(JsonParts(path))


class _Folder:
    def read(self, name: str) -> str:
        return f"{name}.jpg"


class _InJson:
    def __init__(self, parts: JsonParts) -> None:
        self.parts = parts
        self.places = {name: number for number, name in enumerate(parts.names())}

    def read(self, name: str) -> bytes:
        if name not in self.places:
            raise SampleError(f"picture '{name}' is not in {self.parts.path.name}")
        return _decoded(self.parts.item(self.places[name])[1], name)


class _InParquet:
    def __init__(self, table: ParquetRows) -> None:
        self.table = table
        names = set(table.read(0)) - {"base64"}
        if len(names) != 1:
            raise DataError(
                f"{table.path}: expected the column base64 and one of ids; it has {', '.join(table.read(0))}"
            )
        self.places = {name: number for number, name in enumerate(table.column(names.pop()))}

    def read(self, name: str) -> bytes:
        if name not in self.places:
            raise SampleError(f"picture '{name}' is not in {self.table.path.name}")
        return _decoded(self.table.read(self.places[name])["base64"], name)


def _decoded(text: Any, name: str) -> bytes:  # noqa: ANN401  (whatever the file holds)
    if not isinstance(text, str):
        raise SampleError(f"picture '{name}' is no base64 text")
    # the set's own code reads the URL alphabet, the standard one is what is mostly written
    plain = text.strip().translate(str.maketrans("-_", "+/"))
    try:
        return base64.b64decode(plain + "=" * (-len(plain) % 4), validate=True)
    except binascii.Error as error:
        raise SampleError(f"picture '{name}' is no base64: {error}") from None


def _text(member: Mapping[str, Any], name: str) -> str:
    value = member.get(name)
    if not isinstance(value, str):
        raise SampleError(f"'{name}' of an instruction is no text")
    return value.strip()
