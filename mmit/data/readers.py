"""Readers: published files plus a folder of pictures, read as conversations.

A reader is a layout of records (``rows``) and a form of a record (``forms``); ``READERS`` is the list of those that
have a name. Pictures are looked up below one root and nowhere else.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmit.conversation import Conversation
from mmit.data import forms, rows
from mmit.data.faults import SampleError, StorageError
from mmit.errors import DataError
from mmit.images import read_size

_MISSING = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG)


@dataclass(frozen=True, kw_only=True)
class Reader:
    """The conversations of a source, numbered as its records are.

    Each is read on its own, pictures included, so that several processes can share the work.
    """

    name: str
    rows: rows.Rows
    parse: forms.Parse
    images: ImageRoot

    def __len__(self) -> int:
        return len(self.rows)

    def read(self, number: int) -> Conversation:
        """Conversation ``number``; its id is ``name/number``, the record's own id is in ``meta``.

        Raises SampleError for a bad record, DataError where the source itself is broken.
        """
        found = self.parse(self.rows.read(number))
        images = tuple(image if isinstance(image, bytes) else self.images.read(image) for image in found.images)
        return Conversation(
            id=f"{self.name}/{number:08d}",
            messages=found.messages,
            images=images,
            sizes=tuple(_size(image, source) for image, source in zip(images, found.images, strict=True)),
            source=self.name,
            meta=found.meta,
        )

    def record_id(self, number: int) -> str:
        """The id that the record itself states, for messages; empty where it has none."""
        try:
            record = self.rows.read(number)
        except DataError:
            return ""
        return str(record.get("id", record.get("idx", "")))


class ImageRoot:
    """A folder of pictures: reads what lies below it, refuses every way out of it.

    follow_links: also read through symbolic links that lead out of the folder.
    """

    def __init__(self, root: Path, *, follow_links: bool = False) -> None:
        self.root = os.path.realpath(root)
        self.follow_links = follow_links

    def read(self, reference: str) -> bytes:
        """The bytes of the picture that a record names. Raises SampleError, StorageError."""
        if "\0" in reference:
            raise SampleError(f"image {reference!r} is no file name")
        path = os.path.normpath(os.path.join(self.root, reference.removeprefix("file://")))
        if not self._holds(path):
            raise SampleError(f"image '{reference}' leads out of the image root {self.root}")
        if not self.follow_links and not self._holds(os.path.realpath(path)):
            raise SampleError(f"image '{reference}' is a link that leads out of the image root; follow_links allows it")
        try:
            with open(path, "rb") as file:
                content = file.read()
        except OSError as error:
            if error.errno in _MISSING:
                raise SampleError(f"image '{reference}' is not below {self.root}") from None
            if error.errno in (errno.EACCES, errno.EPERM):
                raise SampleError(f"image '{reference}' may not be read: {error.strerror}") from None
            raise StorageError(f"{path}: cannot be read: {error.strerror}") from None
        if not content:
            raise SampleError(f"image '{reference}' is an empty file")
        return content

    def _holds(self, path: str) -> bool:
        return path.startswith(self.root.rstrip("/") + "/")


def open_reader(
    reader: str, source: Path, *, name: str, images: Path | None = None, prompt: str = "", follow_links: bool = False
) -> Reader:
    """The conversations that ``reader`` finds at ``source``; ``reader`` is a key of READERS.

    images: folder that the records' paths start from; None is the folder of the source.
    prompt: the question of a caption; other readers refuse one. Raises DataError.
    """
    if reader not in READERS:
        raise DataError(f"there is no reader '{reader}'; there are {', '.join(READERS)}")
    if prompt and reader != "captions":
        raise DataError(f"the reader {reader} takes no prompt: its records have their own")
    if not source.exists():
        raise DataError(f"{source}: there is no such file or folder")
    if images is not None and not images.is_dir():
        raise DataError(f"{images}: the image root is not a folder")
    root = images or (source if source.is_dir() else source.parent)
    open_rows, parse = READERS[reader]
    found = Reader(
        name=name,
        rows=open_rows(source),
        parse=_with_prompt(prompt) if prompt else parse,
        images=ImageRoot(root, follow_links=follow_links),
    )
    if not len(found):
        raise DataError(f"{source}: the reader {reader} finds no records in it")
    return found


def _with_prompt(prompt: str) -> forms.Parse:
    def parse(record: Mapping[str, Any]) -> forms.Record:
        return forms.caption(record, prompt)

    return parse


def _json_file(source: Path) -> rows.Rows:
    if source.is_dir():
        raise DataError(f"{source}: is a folder; name the JSON or JSONL file in it")
    return rows.open_json(source)


def _captions(source: Path) -> rows.Rows:
    if source.is_dir():
        return rows.FolderRows(source)
    return rows.open_table(source) if source.suffix.lower() in (".csv", ".tsv") else rows.open_json(source)


def _size(image: bytes, source: str | bytes) -> tuple[int, int]:
    try:
        return read_size(image)
    except DataError as error:
        name = f"image '{source}'" if isinstance(source, str) else "an image in a data URL"
        raise SampleError(f"{name}: {error}") from None


READERS: Mapping[str, tuple[Callable[[Path], rows.Rows], forms.Parse]] = {
    "llava_json": (_json_file, forms.llava),
    "messages": (_json_file, forms.messages),
    "captions": (_captions, forms.caption),
}
