"""One's own tables: rows of picture, question and answer, and which reader fits a file that nobody described.

image,question,answer
a.jpg,What is broken?,The left hinge.
a.jpg,How old is it?,About ten years.      the same picture: one conversation
,What is a hinge?,A joint that swings.     no picture: text alone
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmit.data import forms, rows
from mmit.data.faults import SampleError
from mmit.data.sources.grouped import GROUP, Grouped
from mmit.errors import DataError

QUESTION_KEYS = ("question", "prompt", "instruction")
ANSWER_KEYS = ("answer", "response", "output")
_TABLES = (".csv", ".tsv")
_HEAD = 1 << 16
_JSON_KEYS = {"conversations": "llava_json", "messages": "messages", "question": "questions", "caption": "captions"}


@dataclass(frozen=True, kw_only=True)
class QuestionOptions:
    """max_turns: most questions of one conversation; those about the same picture are put together, 1 leaves each
    alone."""

    max_turns: int = 20


def open_questions(source: Path, options: QuestionOptions, _root: Path) -> tuple[rows.Rows, forms.Parse]:
    """Rows of a CSV, TSV, JSON or JSONL file with a question and an answer each. Raises DataError."""
    if source.is_dir():
        raise DataError(f"{source}: is a folder; name the file in it")
    single = rows.open_table(source) if _is_table(source) else rows.open_json(source)
    found = _columns(single)
    question, answer = (
        _column(found, keys, what, source) for keys, what in ((QUESTION_KEYS, "question"), (ANSWER_KEYS, "answer"))
    )
    image = next((column for column in found if column.lower() in forms.IMAGE_KEYS), None)

    def parse(record: Mapping[str, Any]) -> forms.Record:
        members = record.get(GROUP) or [record]
        return _conversation(members, question=question, answer=answer, image=image)

    together = image is not None and options.max_turns > 1
    return Grouped(single, image, most=options.max_turns) if image and together else single, parse


def fitting_reader(source: Path) -> str:
    """The name of the reader for ``source``, from the columns of a table or the first keys of a JSON file.

    Raises DataError for a table whose columns no reader takes; a file that says nothing is left to ``llava_json``.
    """
    if not source.exists():
        raise DataError(f"{source}: there is no such file or folder")
    if source.is_dir():
        return "captions"
    if not _is_table(source):
        try:
            with source.open("rb") as file:
                match = re.search(rb'"(conversations|messages|question|caption)"\s*:', file.read(_HEAD))
        except OSError as error:
            raise DataError(f"{source}: cannot be read: {error.strerror}") from None
        return _JSON_KEYS[match[1].decode()] if match else "llava_json"
    table = rows.open_table(source)
    if not len(table):
        raise DataError(f"{source}: has no rows below the line of column names")
    names = {column.lower() for column in _columns(table)}
    if names.intersection(QUESTION_KEYS) and names.intersection(ANSWER_KEYS):
        return "questions"
    if names.intersection(forms.IMAGE_KEYS) and names.intersection(forms.CAPTION_KEYS):
        return "captions"
    raise DataError(
        f"{source}: its first line names the columns {', '.join(_columns(table))}; call them image, question and "
        "answer, or image and caption"
    )


def _is_table(source: Path) -> bool:
    return source.suffix.lower() in _TABLES


def _columns(single: rows.Rows) -> list[str]:
    """The names in the first record that can be read."""
    for number in range(min(len(single), 100)):
        try:
            return list(single.read(number))
        except SampleError:
            continue
    return []


def _column(found: Sequence[str], keys: tuple[str, ...], what: str, source: Path) -> str:
    column = next((column for column in found if column.lower() in keys), None)
    if column is None:
        raise DataError(
            f"{source}: no column holds the {what} ({' or '.join(keys)}); it has {', '.join(found) or 'no columns'}"
        )
    return column


def _conversation(
    members: Sequence[Mapping[str, Any]], *, question: str, answer: str, image: str | None
) -> forms.Record:
    """The turns of all members, with the picture in front of the first; their other columns are those of the first."""
    turns: list[dict[str, Any]] = []
    for member in members:
        asked = member.get(question)
        text = asked.replace(forms.IMAGE_MARK, "").strip() if isinstance(asked, str) else asked
        turns += [{"from": "human", "value": text}, {"from": "gpt", "value": member.get(answer)}]
    first = members[0]
    picture = first.get(image) if image else None
    others = {name: value for name, value in first.items() if name not in (question, answer, image)}
    named = {"image": picture.strip()} if isinstance(picture, str) and picture.strip() else {}
    return forms.llava({**others, **named, "conversations": turns})
