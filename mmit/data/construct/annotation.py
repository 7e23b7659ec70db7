"""The form of an annotated record: one JSON object a picture, with whatever is known of it.

{"id": "000000000139", "image": "val/000000000139.jpg",       also "width", "height": checked against the picture
 "caption": "..." or "captions": ["...", "..."],              one sentence each
 "description": "...",                                        several sentences
 "question": "...", "answer": "..." or "answers": [...],      also as a list "qa": [{"question", "answer", ...}, ...]
 "choices": ["...", "..."],                                   of a question; the answer is one of them, or its letter
 "class": "tabby cat",
 "text": "..." or ["line", "line"],                           what is written in the picture
 "boxes": [{"box": [a, b, c, d], "label": "dog", "phrase": "the dog on the left", "colour": "brown", "text": "REX",
            "crowd": false}, ...],                            everything but box is optional
 "boxes_are": "xywh_px",                                      the convention, where it is not that of the whole source
 "absent": ["horse", ...]}                                    labels that are surely not in the picture

Plain values under other names go into the sample's ``meta``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from mmit.data.construct.boxes import CONVENTIONS, Box, Convention, Size, read_box
from mmit.data.faults import SampleError

_OWN = frozenset(
    {"id", "image", "width", "height", "caption", "captions", "description", "question", "answer", "answers"}
    | {"qa", "choices", "class", "text", "boxes", "boxes_are", "absent"}
)


@dataclass(frozen=True, kw_only=True)
class Region:
    """A box, as its four numbers stand in the record, and what is known of it; "" is unknown."""

    box: tuple[float, ...]
    label: str = ""
    phrase: str = ""
    colour: str = ""
    text: str = ""
    crowd: bool = False


@dataclass(frozen=True, kw_only=True)
class Question:
    """A question with the answers that people gave, and the choices where there are some."""

    question: str
    answers: tuple[str, ...]
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Annotation:
    """What is known of one picture; ``size`` is the (width, height) that the record states, (0, 0) if it does not."""

    id: str
    image: str
    size: Size = (0, 0)
    captions: tuple[str, ...] = ()
    description: str = ""
    questions: tuple[Question, ...] = ()
    label: str = ""
    lines: tuple[str, ...] = ()
    regions: tuple[Region, ...] = ()
    convention: Convention = "xyxy_px"
    absent: tuple[str, ...] = ()
    meta: Mapping[str, Any]

    def box(self, region: Region, size: Size) -> Box:
        """The box of a region in a picture of ``size``. Raises SampleError."""
        return read_box(region.box, self.convention, size)

    @property
    def labels(self) -> tuple[str, ...]:
        """The labels of the regions, each once, in their order."""
        return tuple(dict.fromkeys(region.label for region in self.regions if region.label))

    @cached_property
    def names(self) -> Mapping[str, int]:
        """How many regions each name means: a region has that of its phrase and that of its label."""
        return Counter(name for region in self.regions for name in {region.phrase, region.label} if name)


def read_annotation(record: Mapping[str, Any], *, convention: Convention = "xyxy_px") -> Annotation:
    """The annotation in a parsed JSON object; ``convention`` of its boxes unless it states one. Raises SampleError."""
    stated = record.get("boxes_are", convention)
    if stated not in CONVENTIONS:
        raise SampleError(f"boxes_are is {stated!r}; known are {', '.join(CONVENTIONS)}")
    given = _objects(record, "qa")
    if "question" in record:
        given = [record, *given]
    return Annotation(
        id=str(record.get("id", "")),
        image=_text(record, "image"),
        size=(_pixels(record, "width"), _pixels(record, "height")),
        captions=(*_texts(record, "caption"), *_texts(record, "captions")),
        description=_text(record, "description"),
        questions=tuple(_question(each) for each in given),
        label=_text(record, "class"),
        lines=tuple(line.strip() for text in _texts(record, "text") for line in text.splitlines() if line.strip()),
        regions=tuple(_region(each) for each in _objects(record, "boxes")),
        convention=stated,
        absent=_texts(record, "absent"),
        meta={k: v for k, v in record.items() if k not in _OWN and isinstance(v, str | int | float | bool)},
    )


def _question(record: Mapping[str, Any]) -> Question:
    answers = (*_texts(record, "answer"), *_texts(record, "answers"))
    question = _text(record, "question")
    if not question or not answers:
        raise SampleError("a question has no text" if not question else f"'{question[:60]}' has no answer")
    return Question(question=question, answers=answers, choices=_texts(record, "choices"))


def _region(record: Mapping[str, Any]) -> Region:
    box = record.get("box")
    if not isinstance(box, list) or len(box) != 4:
        raise SampleError(f"a box is {box!r}, not a list of four numbers")
    colour = _text(record, "colour") or _text(record, "color")
    return Region(
        box=tuple(box),
        label=_text(record, "label"),
        phrase=_text(record, "phrase"),
        colour=colour,
        text=_text(record, "text"),
        crowd=bool(record.get("crowd", False)),
    )


def _text(record: Mapping[str, Any], key: str) -> str:
    found = _texts(record, key)
    if len(found) > 1:
        raise SampleError(f"'{key}' holds {len(found)} texts and one is expected")
    return found[0] if found else ""


def _texts(record: Mapping[str, Any], key: str) -> tuple[str, ...]:
    found = record.get(key)
    values = [] if found is None else found if isinstance(found, list) else [found]
    if not all(isinstance(value, str | int | float) and not isinstance(value, bool) for value in values):
        raise SampleError(f"'{key}' is neither a text nor a list of texts")
    return tuple(text for value in values if (text := str(value).strip()))


def _objects(record: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    found = record.get(key) or []
    if not isinstance(found, list) or not all(isinstance(each, dict) for each in found):
        raise SampleError(f"'{key}' is not a list of objects")
    return found


def _pixels(record: Mapping[str, Any], key: str) -> int:
    found = record.get(key, 0)
    if not isinstance(found, int) or isinstance(found, bool) or found < 0:
        raise SampleError(f"'{key}' is {found!r}, not a number of pixels")
    return found
