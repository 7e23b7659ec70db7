"""Annotated sets: records of fields, turned into questions and answers by the templates of a recipe.

table   rows of a CSV, TSV, JSON, JSONL or Parquet file
join    a list inside a JSON file, with the fields of matching records elsewhere (questions and annotations)
keyed   records by name (ScienceQA, GQA), optionally those of one split
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mmit.conversation import ImageRef, Message
from mmit.data import forms, rows
from mmit.data.faults import SampleError, SkippedError
from mmit.data.order import hashes, key
from mmit.data.sources import filters
from mmit.data.sources.choices import LETTERS, read_choices
from mmit.data.sources.grouped import GROUP, Grouped, Joined, Parts, beside
from mmit.data.sources.json_parts import JsonParts
from mmit.data.sources.parquet import ParquetRows
from mmit.data.sources.templates import fill
from mmit.errors import DataError

_IDS = ("id", "idx", "question_id", "unique_id", "qid")


@dataclass(frozen=True, kw_only=True)
class TemplateOptions:
    """How a record becomes a question and an answer; see ``templates.fill`` for the places in the texts.

    image: the picture's name; "" for text alone. image_if: a field that is empty in records without a picture.
    question: one wording, or several of which a hash of the record's id chooses one. answer, system: likewise texts.
    columns: other spellings of a field. extract: a new field, from (a field, a pattern whose first group it is).
    choices: the fields of the choices, or the one that lists them; the texts may then use ``{choices}``, ``{letter}``
    and ``{choice}``. choice_answer, choice_label: the fields that say which is right. choice: how one is written.
    vote: the field whose list of answers is counted, ``{vote}`` the most frequent one; vote_key: their text.
    group_by: questions with the same value become one conversation of at most ``max_turns``.
    empty_answers: such a record is bad, or left out and counted. only, skip_with: see ``filters``. meta: kept fields.
    """

    question: str | tuple[str, ...]
    answer: str = "{answer}"
    system: str = ""
    image: str = "{image}"
    image_if: str = ""
    columns: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    extract: Mapping[str, tuple[str, str]] = field(default_factory=dict)
    choices: tuple[str, ...] = ()
    choice: str = "{letter}. {text}"
    choice_separator: str = "\n"
    choice_answer: str = "answer"
    choice_label: str = ""
    shuffle_choices: bool = False
    vote: str = ""
    vote_key: str = "answer"
    group_by: str = ""
    max_turns: int = 20
    seed: int = 0
    empty_answers: Literal["error", "skip"] = "error"
    only: Mapping[str, tuple[str | int | bool | None, ...]] = field(default_factory=dict)
    skip_with: tuple[str, ...] = ()
    meta: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Join:
    """Another list: the field ``ours`` equals ``theirs`` (the same name if ""). file: "" is the source itself."""

    ours: str
    theirs: str = ""
    file: str = ""
    list: str = ""


@dataclass(frozen=True, kw_only=True)
class JoinOptions(TemplateOptions):
    """Also: ``list``, the key of the records inside the source, and what is joined to them."""

    list: str = ""
    join: tuple[Join, ...] = ()


@dataclass(frozen=True, kw_only=True)
class KeyedOptions(TemplateOptions):
    """Also: ``list``, the key of the records inside the source; ``splits``, a file of names by split, and which."""

    list: str = ""
    splits: str = ""
    split: str = ""


def open_table(source: Path, options: TemplateOptions, _root: Path) -> tuple[rows.Rows, forms.Parse]:
    """One question for every row. Raises DataError, MissingExtra."""
    suffix = source.suffix.lower()
    if source.is_dir() or suffix == ".parquet":
        return _opened(ParquetRows(source), options)
    return _opened(rows.open_table(source) if suffix in (".csv", ".tsv") else rows.open_json(source), options)


def open_join(source: Path, options: JoinOptions, _root: Path) -> tuple[rows.Rows, forms.Parse]:
    """One question for every record of the list, with the fields of the others. Raises DataError."""
    found: rows.Rows = Parts(JsonParts(_file(source), options.list))
    for join in options.join:
        other = JsonParts(beside(source, join.file) if join.file else source, join.list)
        found = Joined(found, other, ours=join.ours, theirs=join.theirs or join.ours)
    return _opened(found, options)


def open_keyed(source: Path, options: KeyedOptions, _root: Path) -> tuple[rows.Rows, forms.Parse]:
    """One question for every named record. Raises DataError."""
    parts = JsonParts(_file(source), options.list)
    if not options.splits:
        return _opened(Parts(parts), options)
    splits = dict(JsonParts(beside(source, options.splits)).items())
    if options.split not in splits:
        raise DataError(f"{options.splits}: has no split '{options.split}'; it has {', '.join(splits)}")
    return _opened(Parts(parts, splits[options.split], {"split": options.split}), options)


def _opened(single: rows.Rows, options: TemplateOptions) -> tuple[rows.Rows, forms.Parse]:
    if options.group_by:
        single = Grouped(single, options.group_by, most=options.max_turns)
    return single, _reading(options)


def _file(source: Path) -> Path:
    if source.is_dir():
        raise DataError(f"{source}: is a folder; name the JSON file in it")
    return source


def _reading(options: TemplateOptions) -> forms.Parse:
    def parse(record: Mapping[str, Any]) -> forms.Record:
        members = record.get(GROUP) or [record]
        kept, reason = [], SkippedError("nothing is left of it")
        for member in members:
            try:
                kept.append(_fields(member, options))
            except SkippedError as error:
                reason = error
        if not kept:
            raise reason
        return _conversation(kept, options)

    return parse


def _conversation(members: list[dict[str, Any]], options: TemplateOptions) -> forms.Record:
    first = members[0]
    has_picture = bool(options.image) and (not options.image_if or bool(first.get(options.image_if)))
    turns = [Message(role="system", content=(fill(options.system, first),))] if options.system else []
    for number, member in enumerate(members):
        question = fill(_wording(options, member), member).strip()
        front = (ImageRef(0),) if has_picture and not number else ()
        turns.append(Message(role="user", content=(*front, question)))
        turns.append(Message(role="assistant", content=(fill(options.answer, member).strip(),)))
    meta = {name: first[name] for name in options.meta if isinstance(first.get(name), str | int | float | bool)}
    own = _id(first)
    return forms.Record(
        messages=forms.checked_turns(turns),
        images=(fill(options.image, first),) if has_picture else (),
        meta={**({} if own is None else {"id": own}), **meta},
    )


def _fields(record: Mapping[str, Any], options: TemplateOptions) -> dict[str, Any]:
    """The fields of a record that the templates may use. Raises SampleError, SkippedError."""
    found = dict(record)
    for name, spellings in options.columns.items():
        spelling = next((s for s in spellings if record.get(s) is not None), None)
        if spelling is not None:
            found[name] = record[spelling]
    filters.refuse(found, only=options.only, skip_with=options.skip_with)
    for name, (column, pattern) in options.extract.items():
        match = re.search(pattern, fill(f"{{{column}}}", found))
        if match is None:
            raise SampleError(f"'{column}' is {found[column]!r}, which is not of the form {pattern}")
        found[name] = match[1]
    if options.vote:
        found["vote"] = _vote(found.get(options.vote), options)
    if options.choices:
        choices = read_choices(
            found,
            options.choices,
            answer=found.get(options.choice_answer),
            label=found.get(options.choice_label) if options.choice_label else None,
        )
        if options.shuffle_choices:
            choices = choices.shuffled(options.seed, str(_id(found) or found))
        written = [fill(options.choice, {"letter": a, "text": t}) for a, t in zip(LETTERS, choices.texts, strict=False)]
        found["choices"] = options.choice_separator.join(written)
        found["letter"], found["choice"] = choices.letter, choices.texts[choices.right]
    if options.empty_answers == "skip" and not fill(options.answer, found).strip():
        raise SkippedError("the answer is empty")
    return found


def _vote(answers: Any, options: TemplateOptions) -> str:  # noqa: ANN401  (whatever JSON holds)
    """The most frequent answer; of several, the one that was given first."""
    if not isinstance(answers, Sequence) or isinstance(answers, str) or not answers:
        raise SampleError(f"'{options.vote}' is not a list of answers")
    texts = [a.get(options.vote_key) if isinstance(a, dict) else a for a in answers]
    given = [text.strip() for text in texts if isinstance(text, str)]
    if len(given) != len(texts):
        raise SampleError(f"an answer in '{options.vote}' has no text '{options.vote_key}'")
    return Counter(given).most_common(1)[0][0]


def _wording(options: TemplateOptions, record: Mapping[str, Any]) -> str:
    if isinstance(options.question, str):
        return options.question
    return options.question[int(hashes(1, key(options.seed, "wording", str(_id(record))))[0] % len(options.question))]


def _id(record: Mapping[str, Any]) -> Any:  # noqa: ANN401
    return next((record[name] for name in _IDS if record.get(name) is not None), None)
