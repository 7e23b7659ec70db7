"""The elements of a list or a mapping anywhere in a JSON file, one by one, without holding the file in memory.

``rows.open_json`` reads the form that instruction sets have, a list of records. Annotation files have a list among
other things (``{"info": ..., "questions": [...]}``), or records by id (``{"1": {...}, "2": {...}}``).
"""

from __future__ import annotations

import hashlib
import json
import mmap
import re
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mmit.errors import DataError

_PIECE = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|["\[\]{}]', re.DOTALL)
_SPACE = b" \t\r\n"


class JsonParts:
    """The elements below ``key`` of the outermost object, or of the outermost list or object where ``key`` is "".

    ``items`` gives (name, value) pairs; the name is "" in a list. Raises DataError for a file that is not so.
    """

    def __init__(self, path: Path, key: str = "") -> None:
        self.path = path
        self._starts, self._sizes = array("Q"), array("Q")
        self._content = content = _mapped(path)
        start = _container(path, content, key)
        self._named = content[start : start + 1] == b"{"
        for first, last in _elements(path, content, start):
            self._starts.append(first)
            self._sizes.append(last - first)

    def __len__(self) -> int:
        return len(self._starts)

    def item(self, number: int) -> tuple[str, Any]:
        """The name and the value of one element. Raises DataError where the JSON is broken."""
        start = self._starts[number]
        return self._parsed(self._content[start : start + self._sizes[number]], start)

    def items(self) -> Iterator[tuple[str, Any]]:
        """All elements in order."""
        return map(self.item, range(len(self)))

    def names(self) -> list[str]:
        """The names of a mapping's elements, without reading their values."""
        if not self._named:
            raise DataError(f"{self.path}: holds a list where names with values are expected")
        found = []
        for start in self._starts:
            piece = _PIECE.match(self._content, start)
            assert piece is not None, "the scanner starts an element at its name"
            found.append(json.loads(piece[0]))
        return found

    def digest(self) -> str:
        """The SHA-256 of the file."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _parsed(self, text: bytes, start: int) -> tuple[str, Any]:
        try:
            if not self._named:
                return "", json.loads(text)
            ((name, value),) = json.loads(b"{" + text + b"}").items()
        except ValueError as error:
            raise DataError(f"{self.path}: the JSON element at byte {start} is broken: {error}") from None
        return name, value


def _mapped(path: Path) -> mmap.mmap:
    try:
        with path.open("rb") as file:
            return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except ValueError:
        raise DataError(f"{path}: the file is empty") from None


def _container(path: Path, content: mmap.mmap, key: str) -> int:
    """Where the list or object below ``key`` begins."""
    pieces = _PIECE.finditer(content)
    outer = next(pieces, None)
    if outer is None or outer[0] not in (b"[", b"{") or (key and outer[0] == b"["):
        raise DataError(f"{path}: begins with no object" + (f" that could hold '{key}'" if key else " and no list"))
    if not key:
        return outer.start()
    depth, names = 1, []
    for piece in pieces:
        mark = piece[0]
        if mark in (b"[", b"{"):
            depth += 1
        elif mark in (b"]", b"}"):
            depth -= 1
        elif depth == 1 and content[piece.end() : piece.end() + 20].lstrip(_SPACE)[:1] == b":":
            names.append(json.loads(mark))
            if names[-1] == key:
                inner = next(pieces, None)
                if inner is None or inner[0] not in (b"[", b"{"):
                    break
                return inner.start()
        if depth == 0:
            break
    raise DataError(f"{path}: has no list or object '{key}'; it has {', '.join(names) or 'nothing'}")


def _elements(path: Path, content: mmap.mmap, start: int) -> Iterator[tuple[int, int]]:
    """Where each element of the container at ``start`` begins and ends; commas are between them at depth one.

    Only brackets and strings are looked at, so a number or a word stands where nothing else does.
    """
    depth, first, after = 0, start + 1, start + 1  # of the element; after: end of the last piece at depth one
    for piece in _PIECE.finditer(content, start):
        mark = piece[0]
        if mark == b'"':
            raise DataError(f"{path}: byte {piece.start()}: the JSON is broken: a string is not closed")
        if depth == 1:
            comma = content.find(b",", after, piece.start())
            while comma >= 0:
                yield _trimmed(content, first, comma)
                first = after = comma + 1
                comma = content.find(b",", after, piece.start())
        if mark in (b"[", b"{"):
            depth += 1
        elif mark in (b"]", b"}"):
            depth -= 1
            if depth == 0:
                if content[first : piece.start()].strip(_SPACE):
                    yield _trimmed(content, first, piece.start())
                return
        if depth == 1:
            after = max(after, piece.end())
    raise DataError(f"{path}: the JSON is broken: it ends inside a list or object; was it downloaded whole?")


def _trimmed(content: mmap.mmap, first: int, last: int) -> tuple[int, int]:
    text = content[first:last]
    return first + len(text) - len(text.lstrip(_SPACE)), last - (len(text) - len(text.rstrip(_SPACE)))
