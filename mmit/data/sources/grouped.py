"""Records put together: joined over several files, found by their keys, or grouped into one conversation each."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mmit.data import rows
from mmit.data.faults import SampleError
from mmit.data.sources.json_parts import JsonParts
from mmit.errors import DataError

GROUP = "group"
"""The key under which a grouped record holds its members."""


class Parts:
    """The objects of a list, or of a mapping by name (the name becomes ``id``), inside a JSON file.

    chosen: the names to keep, and more that each of these records then says. Raises DataError.
    """

    def __init__(
        self, parts: JsonParts, chosen: Iterable[str] | None = None, more: Mapping[str, Any] | None = None
    ) -> None:
        self.parts = parts
        self.more = more or {}
        self.numbers: Sequence[int] = range(len(parts))
        if chosen is not None:
            place = {name: number for number, name in enumerate(parts.names())}
            wanted = [str(name) for name in chosen]
            missing = [name for name in wanted if name not in place]
            if missing:
                raise DataError(f"{parts.path}: has no record '{missing[0]}', which the split names")
            self.numbers = [place[name] for name in wanted]

    def __len__(self) -> int:
        return len(self.numbers)

    def read(self, number: int) -> Mapping[str, Any]:
        """One record. Raises SampleError."""
        name, value = self.parts.item(self.numbers[number])
        if not isinstance(value, dict):
            raise SampleError(f"the record is {type(value).__name__}, not an object")
        return {**({"id": name} if name else {}), **self.more, **value}

    def digest(self) -> str:
        """The SHA-256 of the file."""
        return self.parts.digest()


class Joined:
    """The records of one file with the fields of the matching record of another added; their own fields win.

    Field ``ours`` equals field ``theirs``. Raises DataError where that is not unique.
    """

    def __init__(self, first: rows.Rows, other: JsonParts, *, ours: str, theirs: str) -> None:
        self.first, self.other, self.ours = first, other, ours
        self._place: dict[Any, int] = {}
        for number, (_, record) in enumerate(other.items()):
            value = record.get(theirs) if isinstance(record, dict) else None
            if value is None:
                raise DataError(f"{other.path}: element {number} has no '{theirs}' to join on")
            if value in self._place:
                raise DataError(
                    f"{other.path}: '{theirs}' {value} comes twice; make this file the source and join the other"
                )
            self._place[value] = number

    def __len__(self) -> int:
        return len(self.first)

    def read(self, number: int) -> Mapping[str, Any]:
        """The record with the other's fields. Raises SampleError where there is no other."""
        record = self.first.read(number)
        place = self._place.get(record.get(self.ours))
        if place is None:
            raise SampleError(f"{self.other.path.name} has nothing for {self.ours} {record.get(self.ours)!r}")
        return {**self.other.item(place)[1], **record}

    def digest(self) -> str:
        """Changes with either file."""
        return hashlib.sha256(f"{self.first.digest()} {self.other.digest()}".encode()).hexdigest()


class Grouped:
    """The records with the same value of a field as one record ``{"group": [records]}``, at most ``most`` in each.

    Records stand in the order of the file, groups in the order of their first records.
    """

    def __init__(self, single: rows.Rows, by: str, *, most: int) -> None:
        self.single = single
        groups: dict[Any, list[int]] = {}
        for number in range(len(single)):
            value = _value(single, number, by)
            # one that is bad or cannot be grouped stands alone, so that no other is lost with it
            groups.setdefault((by, number) if value in (None, "") else value, []).append(number)
        self.groups = [
            numbers[start : start + most] for numbers in groups.values() for start in range(0, len(numbers), most)
        ]

    @property
    def members(self) -> int:
        """The number of records before grouping."""
        return len(self.single)

    def __len__(self) -> int:
        return len(self.groups)

    def read(self, number: int) -> Mapping[str, Any]:
        """One group. Raises SampleError where any of its records is bad."""
        found = [self.single.read(member) for member in self.groups[number]]
        return {**{k: v for k, v in found[0].items() if k == "id"}, GROUP: found}

    def digest(self) -> str:
        """That of the records."""
        return self.single.digest()


def _value(single: rows.Rows, number: int, name: str) -> Any:  # noqa: ANN401  (whatever JSON holds)
    """A field of a record, from its own file where that has it; None for a record that is bad or lacks it."""
    try:
        value = single.first.read(number).get(name) if isinstance(single, Joined) else None
        return single.read(number).get(name) if value is None else value
    except SampleError:
        return None


def beside(source: Path, name: str) -> Path:
    """The file ``name`` next to ``source`` (or in it, where it is a folder). Raises DataError."""
    path = (source if source.is_dir() else source.parent) / name
    if not path.exists():
        raise DataError(f"{path}: there is no such file; an option of the recipe names it")
    return path
