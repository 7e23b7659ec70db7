"""Sets whose records are conversations already: LLaVA's JSON and its many relatives, and tables with pictures inside.

    {"image": ..., "conversations": [{"from", "value"}]}        LLaVA and whoever followed it
    {"images": [...], "texts": [{"user", "assistant"}]}         the_cauldron, FineVision
    {"image": ..., "QA": [{"q", "a"}]}                          VideoChat's pictures
    {"images": [...], "messages": [{"role", "content"}]}        OpenAI's form

The form is told by the keys of each record. What sets do differently is an option.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from mmit.conversation import Role
from mmit.data import forms, rows
from mmit.data.faults import SampleError, SkippedError
from mmit.data.sources import filters
from mmit.data.sources.parquet import ParquetRows
from mmit.errors import DataError


@dataclass(frozen=True, kw_only=True)
class InstructionOptions:
    """How the records of a set differ from the plain form.

    roles: what other names for the speakers mean. columns: their name for each key of ours (``image: picture``).
    placeholder: the one picture of a turn goes to its front, or stays where ``<image>`` is.
    empty_answers: such a record is bad, or loses those questions and answers, or is left out and counted.
    skip_with: keys that only records to be left out have (``pcl``). only: the values that others must have.
    system, system_field: the system message by the value of a field; "*" stands for all other values.
    min_ratings: turns whose ``NAME_ratings`` are lower are left out (FineVision).
    """

    roles: Mapping[str, Role] = field(default_factory=dict)
    columns: Mapping[str, str] = field(default_factory=dict)
    placeholder: Literal["front", "keep"] = "front"
    empty_answers: Literal["error", "drop", "skip"] = "error"
    skip_with: tuple[str, ...] = ()
    only: Mapping[str, tuple[str | int | bool | None, ...]] = field(default_factory=dict)
    system: Mapping[str, str] = field(default_factory=dict)
    system_field: str = ""
    min_ratings: Mapping[str, int] = field(default_factory=dict)


def open_llava(source: Path, options: InstructionOptions, _root: Path) -> tuple[rows.Rows, forms.Parse]:
    """Records of a JSON or JSONL file. Raises DataError."""
    if source.is_dir():
        raise DataError(f"{source}: is a folder; name the JSON or JSONL file in it")
    return rows.open_json(source), reading(options)


def open_rows(source: Path, options: InstructionOptions, _root: Path) -> tuple[rows.Rows, forms.Parse]:
    """Rows of a Parquet file or of a folder of them. Raises DataError, MissingExtra."""
    return ParquetRows(source), reading(options)


def reading(options: InstructionOptions) -> forms.Parse:
    """The function that turns a record into a conversation. It raises SampleError and SkippedError."""

    def parse(record: Mapping[str, Any]) -> forms.Record:
        named = _renamed(record, options.columns)
        filters.refuse(named, only=options.only, skip_with=options.skip_with)
        given, pictures = _named_pictures(named)
        found = _conversation(given, options)
        return replace(found, images=tuple(pictures.get(i, i) if isinstance(i, str) else i for i in found.images))

    return parse


def _conversation(record: Mapping[str, Any], options: InstructionOptions) -> forms.Record:
    if "messages" in record and "conversations" not in record:
        return forms.messages(record)
    turns = _answered(_rated(_turns(record), record, options.min_ratings), options.empty_answers)
    roles = {"human": "user", "gpt": "assistant", **options.roles}
    turns = [(roles.get(role, role) if isinstance(role, str) else role, text) for role, text in turns]
    rest = {key: value for key, value in record.items() if key not in ("conversations", *_PAIRS)}
    if options.system:
        rest["system"] = _system(record, options)
    if options.placeholder == "front":
        return forms.llava({**rest, "conversations": [{"from": role, "value": text} for role, text in turns]})
    opening = [("system", rest.pop("system"))] if rest.get("system") else []
    return forms.messages({**rest, "messages": [{"role": r, "content": t} for r, t in [*opening, *turns]]})


_PAIRS = {"texts": ("user", "assistant"), "QA": ("q", "a")}
Turns = list[tuple[Any, Any]]  # (role, text) as the record has them


def _turns(record: Mapping[str, Any]) -> Turns:
    key = next((key for key in _PAIRS if key in record and "conversations" not in record), "conversations")
    found = record.get(key)
    if not isinstance(found, list) or not all(isinstance(turn, dict) for turn in found):
        raise SampleError(
            f"'{key}' is missing or not a list of objects; the record has {', '.join(record) or 'no keys'}"
        )
    if key in _PAIRS:
        asks, answers = _PAIRS[key]
        return [side for turn in found for side in (("user", turn.get(asks)), ("assistant", turn.get(answers)))]
    return [(turn.get("from", turn.get("role")), turn.get("value", turn.get("content"))) for turn in found]


def _rated(turns: Turns, record: Mapping[str, Any], least: Mapping[str, int]) -> Turns:
    """The turns without the questions and answers that are rated too low."""
    low: set[int] = set()
    for name, bound in least.items():
        ratings = record.get(f"{name}_ratings")
        if not isinstance(ratings, list) or len(ratings) * 2 != len(turns):
            raise SampleError(f"'{name}_ratings' is not a list of one rating for each of {len(turns) // 2} answers")
        low |= {number for number, rating in enumerate(ratings) if rating is None or rating < bound}
    if low and len(low) * 2 == len(turns):
        raise SkippedError("every answer is rated below min_ratings")
    return _without(turns, {2 * number + 1 for number in low})


def _answered(turns: Turns, policy: str) -> Turns:
    """The turns without empty answers, by policy; the error for an empty one is raised where all turns are checked."""
    empty = {n for n, (_, text) in enumerate(turns) if n % 2 and (text is None or not str(text).strip())}
    if not empty or policy == "error":
        return turns
    if policy == "skip":
        raise SkippedError("an answer is empty")
    if 2 * len(empty) >= len(turns):
        raise SampleError("every answer is empty")
    return _without(turns, empty)


def _without(turns: Turns, answers: set[int]) -> Turns:
    """The turns without these answers and their questions; placeholders of a lost question move to the next one."""
    kept: Turns = []
    waiting = ""
    for number, (role, text) in enumerate(turns):
        if number + 1 in answers:
            waiting += forms.IMAGE_MARK * str(text).count(forms.IMAGE_MARK)
        elif number not in answers:
            kept.append((role, f"{waiting}\n{text}" if waiting and number % 2 == 0 else text))
            waiting = "" if number % 2 == 0 else waiting
    return kept


def _system(record: Mapping[str, Any], options: InstructionOptions) -> str:
    value = str(record.get(options.system_field, ""))
    text = options.system.get(value, options.system.get("*"))
    if text is None:
        raise SampleError(
            f"there is no system message for '{options.system_field}' {value!r}; there are {', '.join(options.system)}"
        )
    return text


def _renamed(record: Mapping[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    theirs = {other: own for own, other in columns.items()}
    return {theirs.get(key, key): value for key, value in record.items() if value is not None}


def _named_pictures(record: dict[str, Any]) -> tuple[dict[str, Any], dict[str, bytes]]:
    """The record with a name in place of every picture whose bytes are in it, and those bytes."""
    pictures: dict[str, bytes] = {}

    def name(value: Any) -> Any:  # noqa: ANN401  (whatever a table holds)
        content = value.get("bytes") if isinstance(value, dict) else value
        if not isinstance(content, bytes):
            return value
        pictures[key := f"\0picture {len(pictures)}"] = content
        return key

    named = dict(record)
    for key in ("image", "images"):
        value = named.get(key)
        if isinstance(value, Sequence) and not isinstance(value, str | bytes):
            named[key] = [name(one) for one in value if one is not None]
        elif value is not None:
            named[key] = name(value)
    return named, pictures
