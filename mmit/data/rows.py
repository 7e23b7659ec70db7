"""The records of a source file, one by one and in any order, without holding the file in memory.

A JSON list, a JSONL file and a CSV table are all kept as byte spans of the file, and a record is parsed when it is
asked for: a 1 GB list costs 16 bytes a record. A folder is a list of pictures with a text beside each.
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import mmap
import os
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from mmit.data.faults import SampleError
from mmit.data.index import IMAGE_TYPES
from mmit.errors import DataError

# a whole JSON string, a stray quote (a string that never closes), or a bracket
_JSON_PIECE = re.compile(rb'"[^"\\]*(?:\\.[^"\\]*)*"|["\[\]{}]', re.DOTALL)
_SPACE = b" \t\r\n"
_BOM = b"\xef\xbb\xbf"


class Rows(Protocol):
    """Records with random access."""

    def __len__(self) -> int: ...

    def read(self, number: int) -> Mapping[str, Any]:
        """One record. Raises SampleError for a bad one, DataError where the file is broken."""
        ...

    def digest(self) -> str:
        """A hash that changes with the content."""
        ...


def open_json(path: Path) -> Rows:
    """The records of a JSON list or a JSONL file, told apart by the first character. Raises DataError."""
    with _mapped(path) as content:
        start = len(_BOM) if content[:3] == _BOM else 0
        while start < len(content) and content[start : start + 1] in _SPACE:
            start += 1
        is_list = content[start : start + 1] == b"["
        spans = _array(_list_spans(path, content, start) if is_list else _lines(content, start))
    hint = "" if is_list else "; a file that is no list holds one object per line"
    return _Spans(path, spans, partial(_parse_json, hint))


def open_table(path: Path) -> Rows:
    """The rows of a CSV or TSV file with column names in its first line, also one with semicolons. Raises DataError."""
    delimiter = _delimiter(path)
    spans: list[tuple[int, int]] = []
    at = 0

    def lines(file: io.BufferedReader) -> Iterator[str]:
        nonlocal at
        for line in file:
            at += len(line)
            try:
                yield line.decode("utf-8-sig" if at == len(line) else "utf-8")
            except UnicodeDecodeError:
                raise DataError(
                    f"{path}: the line at byte {at - len(line)} is not UTF-8; save the table as UTF-8 (Excel calls it "
                    "CSV UTF-8)"
                ) from None

    with _opened(path) as file:
        start, names = 0, None
        try:
            for cells in csv.reader(lines(file), delimiter=delimiter, strict=True):
                if names is None:
                    names = [cell.strip() for cell in cells]
                elif cells:
                    spans.append((start, at - start))
                start = at
        except csv.Error as error:
            raise DataError(f"{path}:{_line_of(path, start)}: the table is broken: {error}") from None
    return _Spans(path, _array(spans), partial(_parse_table, tuple(names or ()), delimiter))


def _delimiter(path: Path) -> str:
    """What parts the cells of a table: Excel takes semicolons where the comma is a decimal sign."""
    if path.suffix.lower() == ".tsv":
        return "\t"
    with _opened(path) as file:
        names = file.readline()
    return ";" if b";" in names and b"," not in names else ","


class FolderRows:
    """The pictures below a folder, each with a caption in a .txt file of the same name."""

    def __init__(self, path: Path) -> None:
        self.path = path
        names = (
            os.path.relpath(os.path.join(folder, name), path)
            for folder, _, files in os.walk(path)
            for name in files
            if name.rpartition(".")[2].lower() in IMAGE_TYPES
        )
        self.names = sorted(names)

    def __len__(self) -> int:
        return len(self.names)

    def read(self, number: int) -> Mapping[str, Any]:
        """The picture's path, and the text beside it."""
        image = self.names[number]
        text = (self.path / image).with_suffix(".txt")
        try:
            return {"id": image, "image": image, "caption": text.read_text(encoding="utf-8")}
        except FileNotFoundError:
            raise SampleError(f"{image} has no caption: {text.name} is missing beside it") from None
        except UnicodeDecodeError as error:
            raise SampleError(f"{text.name} is not UTF-8: {error.reason} at byte {error.start}") from None

    def digest(self) -> str:
        """Changes with any name, caption or picture size."""
        state = hashlib.sha256()
        for name in self.names:
            text = (self.path / name).with_suffix(".txt")
            sizes = (self.path / name).stat().st_size, text.stat().st_mtime_ns if text.is_file() else 0
            state.update(f"{name} {sizes}\n".encode())
        return state.hexdigest()


Parse = Callable[[Path, int, bytes], Mapping[str, Any]]


class _Spans:
    """Records that are spans of a file."""

    def __init__(self, path: Path, spans: np.ndarray, parse: Parse) -> None:
        self.path = path
        self.spans = spans
        self._parse = parse

    def __len__(self) -> int:
        return len(self.spans)

    def read(self, number: int) -> Mapping[str, Any]:
        """The parsed record. Raises SampleError for one that is no object, DataError where the file is broken."""
        start, count = self.spans[number].tolist()
        with _opened(self.path) as file:
            file.seek(start)
            text = file.read(count)
        return self._parse(self.path, start, text)

    def digest(self) -> str:
        """The SHA-256 of the file."""
        with _opened(self.path) as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def _array(spans: Iterable[tuple[int, int]]) -> np.ndarray:
    """(start, count) of each record, (n, 2) uint64, without a Python object for each."""
    return np.fromiter(chain.from_iterable(spans), dtype=np.uint64).reshape(-1, 2)


def _parse_json(hint: str, path: Path, start: int, text: bytes) -> Mapping[str, Any]:
    try:
        record = json.loads(text.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise SampleError(f"the record is not UTF-8: {error.reason} at byte {start + error.start} of {path}") from None
    except json.JSONDecodeError as error:
        raise _broken(path, start + len(error.doc[: error.pos].encode()), error.msg + hint) from None
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, a deep nest
        raise SampleError(f"the record cannot be read: {error}") from None
    if not isinstance(record, dict):
        raise SampleError(f"the record is {type(record).__name__}, not an object")
    return record


def _parse_table(columns: tuple[str, ...], delimiter: str, path: Path, start: int, text: bytes) -> Mapping[str, Any]:
    cells = next(csv.reader(io.StringIO(text.decode("utf-8"), newline=""), delimiter=delimiter))
    if len(cells) != len(columns):
        raise SampleError(f"{path}:{_line_of(path, start)} has {len(cells)} cells for {len(columns)} columns")
    return dict(zip(columns, cells, strict=True))


def _list_spans(path: Path, content: mmap.mmap, start: int) -> Iterator[tuple[int, int]]:
    """Where the elements of a JSON list stand: between its commas at depth one."""
    depth, element, previous, end = 0, 0, start + 1, 0
    for piece in _JSON_PIECE.finditer(content, start):
        mark = content[piece.start()]
        if mark in b"[{":
            depth += 1
            if depth == 2:
                element = piece.start()
                _check_between(path, content, previous, element, first=not end)
        elif mark in b"]}":
            depth -= 1
            if depth == 1:
                previous = end = piece.end()
                yield element, previous - element
            elif depth == 0:
                if rest := content[previous : piece.start()].strip(_SPACE):
                    if rest != b",":
                        raise _no_object(path, previous)
                    raise _broken(path, previous, "Expecting an object behind the ',', or the end of the list")
                if content[piece.end() :].strip(_SPACE):
                    raise _broken(path, piece.end(), "Extra data after the list")
                return
        elif piece.end() - piece.start() == 1:
            raise _broken(path, piece.start(), "Unterminated string")
        elif depth == 1:
            raise _no_object(path, piece.start())
    raise _broken(path, len(content), "The list is not closed: the file was cut off")


def _check_between(path: Path, content: mmap.mmap, previous: int, element: int, *, first: bool) -> None:
    between = content[previous:element].strip(_SPACE)
    if between.strip(b"," + _SPACE):
        raise _no_object(path, previous)
    if between != (b"" if first else b","):
        raise _broken(path, previous, "Expecting an object" if first else "Expecting ',' delimiter")


def _no_object(path: Path, offset: int) -> DataError:
    return DataError(f"{_place(path, offset)}: the list holds what is no object {{...}}, and every record is one")


def _lines(content: mmap.mmap, start: int) -> Iterator[tuple[int, int]]:
    while start < len(content):
        end = content.find(b"\n", start)
        end = len(content) if end < 0 else end
        if content[start:end].strip(_SPACE):
            yield start, end - start
        start = end + 1


def _broken(path: Path, offset: int, reason: str) -> DataError:
    return DataError(f"{_place(path, offset)}: the JSON is broken: {reason}")


def _place(path: Path, offset: int) -> str:
    """File, line and column of a byte."""
    with _mapped(path) as content:
        line = content[:offset].count(b"\n") + 1
        column = offset - (content.rfind(b"\n", 0, offset) + 1) + 1
    return f"{path}:{line}:{column}"


def _line_of(path: Path, offset: int) -> int:
    with _mapped(path) as content:
        return content[:offset].count(b"\n") + 1


def _opened(path: Path) -> io.BufferedReader:
    try:
        return path.open("rb")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None


def _mapped(path: Path) -> mmap.mmap:
    with _opened(path) as file:
        if not os.fstat(file.fileno()).st_size:
            raise DataError(f"{path}: the file is empty")
        return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
