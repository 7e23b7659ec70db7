"""Readers: published files plus a folder of pictures, read as conversations.

A reader is a layout of records (``rows``) and a form of a record (``forms``); ``READERS`` is the list of those that
have a name, most of them in ``sources``. Pictures are looked up below one root and nowhere else.
"""

from __future__ import annotations

import difflib
import errno
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np

from mmit.conversation import Conversation
from mmit.data import forms, rows
from mmit.data.faults import SampleError, SkippedError, StorageError
from mmit.data.index import IMAGE_TYPES
from mmit.data.order import key, permutation, windowed
from mmit.data.sources import box_texts, instructions, templated
from mmit.data.sources.custom import open_custom
from mmit.data.sources.edits import EditOptions, open_edits
from mmit.data.sources.grouped import Grouped
from mmit.data.sources.instructions import InstructionOptions
from mmit.data.sources.mimicit import MimicItOptions, open_mimicit
from mmit.data.sources.names import PictureOptions, candidates
from mmit.data.sources.options import checked, split_options
from mmit.data.sources.own import QuestionOptions, open_questions
from mmit.data.sources.parquet import KEPT_GROUPS, ParquetRows
from mmit.data.sources.prompt_target import PromptTargetOptions, open_prompt_target
from mmit.data.sources.videos import VideoOptions, open_videos
from mmit.errors import DataError
from mmit.images import read_size

_ID_KEYS = ("id", "idx", "question_id", "unique_id")
_TASK_KEYS = ("task", "task_name", "task_type", "data_source")
"""What published sets call the task of a record: LRV; MULTIINSTRUCT and Vision-Flan; LAMM; LLaVA-NeXT and OneVision."""
_AS_NAMED = PictureOptions()
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

    @property
    def published(self) -> int:
        """How many records the files hold, before any were put together into one conversation."""
        return self.rows.members if isinstance(self.rows, Grouped) else len(self.rows)

    def order(self, seed: int) -> np.ndarray:
        """The numbers of all conversations, shuffled as far as the files can be read in any order, int64."""
        stream = key(seed, "convert")
        if isinstance(self.rows, ParquetRows):
            return windowed(self.rows.blocks(), stream, window=KEPT_GROUPS)
        return permutation(len(self), stream)

    def read(self, number: int) -> Conversation:
        """Conversation ``number``; its id is ``name/number``, the record's own id is in ``meta``.

        Boxes in its texts are in the convention that ``meta["boxes"]`` names; ``meta["task"]`` is its task, where the
        record names one. Raises SampleError for a bad record,
        SkippedError for one that is left out on purpose, DataError where the source itself is broken.
        """
        found = self.parse(self.rows.read(number))
        images = tuple(image if isinstance(image, bytes) else self.images.read(image) for image in found.images)
        sizes = tuple(_size(image, source) for image, source in zip(images, found.images, strict=True))
        options = self.images.options
        messages, boxes = box_texts.settle(
            found.messages, sizes, given=found.meta.get("boxes", options.boxes), wanted=options.boxes_to
        )
        stated = {name: value for name, value in _with_task(found.meta).items() if name != "boxes"}
        return Conversation(
            id=f"{self.name}/{number:08d}",
            messages=messages,
            images=images,
            sizes=sizes,
            source=self.name,
            meta={**stated, "boxes": boxes} if boxes else stated,
        )

    def record_id(self, number: int) -> str:
        """The id that the record itself states, for messages; empty where it has none."""
        try:
            record = self.rows.read(number)
        except DataError:
            return ""
        return next((str(record[name]) for name in _ID_KEYS if name in record), "")


class ImageRoot:
    """A folder of pictures: reads what lies below it, refuses every way out of it.

    options: the names to look under. follow_links: also read through symbolic links that lead out of the folder.
    """

    def __init__(self, root: Path, options: PictureOptions = _AS_NAMED, *, follow_links: bool = False) -> None:
        self.root = os.path.realpath(root)
        self.options = options
        self.follow_links = follow_links

    def read(self, reference: str) -> bytes:
        """The bytes of the picture that a record names. Raises SampleError, SkippedError, StorageError."""
        if "\0" in reference:
            raise SampleError(f"image {reference!r} is no file name")
        names = list(candidates(reference.removeprefix("file://"), self.options))
        for name in names:
            content = self._read(name)
            if content is not None:
                return content
        if self.options.missing_images == "skip":
            raise SkippedError("a picture is missing")
        also = f", nor as {' or '.join(names[1:])}" if names[1:] else ""
        raise SampleError(f"image '{names[0]}' is not below {self.root}{also}{self._hint(names[0])}")

    def _hint(self, reference: str) -> str:
        """The file that was perhaps meant: of the same name but for its case or its extension."""
        folder, _, name = reference.rpartition("/")
        stems = _stems(os.path.join(self.root, folder))
        meant = stems.get(name.lower()) or stems.get(name.lower().rpartition(".")[0])
        return f"; there is '{meant}'" if meant else ""

    def _read(self, reference: str) -> bytes | None:
        """The bytes of one file; None where there is none."""
        path = os.path.normpath(os.path.join(self.root, reference))
        if not self._holds(path):
            raise SampleError(f"image '{reference}' leads out of the image root {self.root}")
        if not self.follow_links and not self._holds(os.path.realpath(path)):
            raise SampleError(f"image '{reference}' is a link that leads out of the image root; follow_links allows it")
        try:
            with open(path, "rb") as file:
                content = file.read()
        except OSError as error:
            if error.errno in _MISSING:
                return None
            if error.errno in (errno.EACCES, errno.EPERM):
                raise SampleError(f"image '{reference}' may not be read: {error.strerror}") from None
            raise StorageError(f"{path}: cannot be read: {error.strerror}") from None
        if not content:
            raise SampleError(f"image '{reference}' is an empty file")
        return content

    def _holds(self, path: str) -> bool:
        return path.startswith(self.root.rstrip("/") + "/")


@lru_cache(maxsize=16)
def _stems(folder: str) -> dict[str, str]:
    """The pictures in a folder by their names in lower case, with and without extension."""
    try:
        names = [name for name in sorted(os.listdir(folder)) if name.rpartition(".")[2].lower() in IMAGE_TYPES]
    except OSError:
        return {}
    return {name.lower().rpartition(".")[0]: name for name in names} | {name.lower(): name for name in names}


def _with_task(meta: Mapping[str, Any]) -> dict[str, Any]:
    """The facts of a record, its task under one name whatever the set calls it."""
    stated = next((name for name in _TASK_KEYS if meta.get(name)), None)
    if stated is None:
        return dict(meta)
    return {**{name: value for name, value in meta.items() if name != stated}, "task": meta[stated]}


def open_reader(
    reader: str,
    source: Path,
    *,
    name: str,
    images: Path | None = None,
    prompt: str = "",
    follow_links: bool = False,
    options: Mapping[str, Any] | None = None,
) -> Reader:
    """The conversations that ``reader`` finds at ``source``; ``reader`` is a key of READERS or ``package.module:name``.

    images: folder that the records' paths start from; None is the folder of the source.
    prompt: the question of a caption; other readers refuse one. options: those of the reader's dataclass and of
    ``PictureOptions``. Raises DataError.
    """
    if prompt and reader != "captions":
        raise DataError(f"the reader {reader} takes no prompt: its records have their own")
    own, pictures = reader_options(reader, options or {})
    if not source.exists():
        raise DataError(f"{source}: there is no such file or folder")
    if images is not None and not images.is_dir():
        raise DataError(f"{images}: the image root is not a folder")
    root = images or (source if source.is_dir() else source.parent)
    opened, parse = _kind(reader).open(source, own, root)
    found = Reader(
        name=name,
        rows=opened,
        parse=_with_prompt(prompt) if prompt else parse,
        images=ImageRoot(root, pictures, follow_links=follow_links),
    )
    if not len(found):
        raise DataError(f"{source}: the reader {reader} finds no records in it")
    return found


def reader_options(reader: str, given: Mapping[str, Any]) -> tuple[Any, PictureOptions]:
    """The options of ``reader`` and of its pictures, checked. Raises DataError naming the option."""
    kind = _kind(reader)
    place = f"reader {reader}"
    if kind.options is None:  # a user's own function: what is not about pictures is its own
        known = {one.name for one in fields(PictureOptions)}
        own: Any = {name: value for name, value in given.items() if name not in known}
        about = {name: value for name, value in given.items() if name in known}
    else:
        mine, about = split_options(given, (kind.options, PictureOptions), place=place)
        own = checked(kind.options, mine, place=place)
    return own, checked(PictureOptions, about, place=place)


@dataclass(frozen=True)
class Kind:
    """A reader by name: ``open(source, options, image root)`` gives its rows and the function that reads one."""

    options: type | None
    open: Callable[[Path, Any, Path], tuple[rows.Rows, forms.Parse]]


@dataclass(frozen=True)
class NoOptions:
    """A reader that has none of its own."""


def _kind(reader: str) -> Kind:
    if ":" in reader:
        return Kind(None, lambda source, options, _: open_custom(reader, source, options))
    if reader not in READERS:
        near = difflib.get_close_matches(reader, READERS, n=1)
        hint = f"did you mean '{near[0]}'?" if near else "one's own is package.module:name"
        raise DataError(f"there is no reader '{reader}'; there are {', '.join(READERS)}; {hint}")
    return READERS[reader]


def _with_prompt(prompt: str) -> forms.Parse:
    def parse(record: Mapping[str, Any]) -> forms.Record:
        return forms.caption(record, prompt)

    return parse


def _messages(source: Path, _options: NoOptions, _root: Path) -> tuple[rows.Rows, forms.Parse]:
    if source.is_dir():
        raise DataError(f"{source}: is a folder; name the JSON or JSONL file in it")
    return rows.open_json(source), forms.messages


def _captions(source: Path, _options: NoOptions, _root: Path) -> tuple[rows.Rows, forms.Parse]:
    if source.is_dir():
        return rows.FolderRows(source), forms.caption
    is_table = source.suffix.lower() in (".csv", ".tsv")
    return rows.open_table(source) if is_table else rows.open_json(source), forms.caption


def _size(image: bytes, source: str | bytes) -> tuple[int, int]:
    try:
        return read_size(image)
    except DataError as error:
        name = f"image '{source}'" if isinstance(source, str) else "an image in a data URL"
        raise SampleError(f"{name}: {error}") from None


READERS: Mapping[str, Kind] = {
    "llava_json": Kind(InstructionOptions, instructions.open_llava),
    "messages": Kind(NoOptions, _messages),
    "captions": Kind(NoOptions, _captions),
    "questions": Kind(QuestionOptions, open_questions),
    "rows": Kind(InstructionOptions, instructions.open_rows),
    "table": Kind(templated.TemplateOptions, templated.open_table),
    "join": Kind(templated.JoinOptions, templated.open_join),
    "keyed": Kind(templated.KeyedOptions, templated.open_keyed),
    "mimicit": Kind(MimicItOptions, open_mimicit),
    "prompt_target": Kind(PromptTargetOptions, open_prompt_target),
    "videoqa": Kind(VideoOptions, open_videos),
    "edit": Kind(EditOptions, open_edits),
}
