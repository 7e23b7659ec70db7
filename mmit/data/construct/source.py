"""An annotated source as conversations, ready for the conversion: one record for each picture and task that fit."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from mmit.conversation import Conversation
from mmit.data import rows
from mmit.data.construct.annotation import read_annotation
from mmit.data.construct.boxes import Convention
from mmit.data.construct.draw import Draw
from mmit.data.construct.instruct import instruct, tasks_for
from mmit.data.construct.pools import Pool, load_pool
from mmit.data.convert import Conversion, convert
from mmit.data.faults import SampleError, SkippedError
from mmit.data.forms import Record
from mmit.data.parallel import run, usable_cores
from mmit.data.readers import ImageRoot, Reader
from mmit.data.shards import Manifest
from mmit.errors import DataError
from mmit.images import read_size

_CHUNK = 4096  # annotations that one process looks through at a time


@dataclass(frozen=True, kw_only=True)
class Construction:
    """What to construct, and into what; two equal ones over equal sources give the same bytes.

    annotations: JSON list or JSONL, see ``annotation``. images: folder that their paths start from; None is theirs.
    pool: name or file. tasks: these of the pool only; () takes all. one_task: each picture gives one record, of a task
    drawn among those that fit, and not one of each. boxes: the convention in which the annotations state theirs.
    max_bad: share of bad records that is tolerated.
    """

    annotations: Path
    target: Path
    pool: str
    images: Path | None = None
    tasks: tuple[str, ...] = ()
    one_task: bool = False
    boxes: Convention = "xyxy_px"
    seed: int = 0
    max_bad: float = 0.001
    licence: str = ""


def construct(
    construction: Construction, *, processes: int | None = None, overwrite: bool = False, progress: bool = True
) -> Manifest:
    """Write the shards of a construction and return their manifest; a run that was stopped is continued.

    Raises ConfigError for the pool, DataError as ``convert`` does.
    """
    given = construction
    conversion = Conversion(
        reader="annotations",
        source=given.annotations,
        target=given.target,
        name=given.target.name,
        images=given.images,
        seed=given.seed,
        max_bad=given.max_bad,
        licence=given.licence,
    )
    processes = processes or usable_cores()
    reader = open_annotations(construction, processes=processes)
    return convert(conversion, reader=reader, processes=processes, overwrite=overwrite, progress=progress)


def open_annotations(construction: Construction, *, processes: int = 1) -> Reader:
    """The conversations that a construction gives, one by one. Raises ConfigError for the pool, DataError."""
    source = construction.annotations
    if not source.is_file():
        raise DataError(f"{source}: there is no such file of annotations")
    if construction.images is not None and not construction.images.is_dir():
        raise DataError(f"{construction.images}: the image root is not a folder")
    pool = load_pool(construction.pool).only(construction.tasks)
    images = ImageRoot(construction.images or source.parent)
    found = TaskRows(rows.open_json(source), pool, construction, processes=processes)

    if not len(found):
        raise DataError(f"{source}: there are no annotations in it")

    def parse(record: Mapping[str, Any]) -> Record:
        annotation = read_annotation(record["annotation"], convention=construction.boxes)
        picture = images.read(annotation.image) if annotation.image else b""
        conversation = instruct(
            annotation, pool, seed=construction.seed, task=record["task"], size=picture_size(picture, annotation.image)
        )
        return replace(conversation, images=(picture,))

    return AnnotationReader(name=construction.target.name, rows=found, parse=parse, images=images)


class AnnotationReader(Reader):
    """A reader whose texts have their boxes already as the pool writes them."""

    def read(self, number: int) -> Conversation:
        """Conversation ``number``. Raises SampleError, SkippedError, DataError where the source is broken."""
        found = self.parse(self.rows.read(number))
        images = tuple(image for image in found.images if isinstance(image, bytes))
        return Conversation(
            id=f"{self.name}/{number:08d}",
            messages=found.messages,
            images=images,
            sizes=tuple(read_size(image) for image in images),
            source=self.name,
            meta=found.meta,
        )


class TaskRows:
    """The records of an annotated source, each as often as tasks fit it: ``{"id", "task", "annotation"}``.

    A record that no task fits, or that is broken, stands there once, so that it is counted when it is read.
    """

    def __init__(self, annotations: rows.Rows, pool: Pool, construction: Construction, *, processes: int = 1) -> None:
        self.annotations = annotations
        self.names = tuple(pool.tasks)
        self._digest = f"{pool.digest} {self.names} {construction.one_task} {construction.seed} {construction.boxes}"
        chunks = range(0, len(annotations), _CHUNK)

        def work(start: int) -> tuple[int, np.ndarray]:
            numbers = range(start, min(start + _CHUNK, len(annotations)))
            places = [(number, task) for number in numbers for task in self._tasks(number, pool, construction)]
            return start, np.array(places, dtype=np.int64)

        found = dict(run(work, chunks, processes=processes))
        self.places = np.concatenate([found[start] for start in chunks] or [np.zeros((0, 2), dtype=np.int64)])

    def __len__(self) -> int:
        return len(self.places)

    def read(self, number: int) -> Mapping[str, Any]:
        """One annotation and what is asked about it; a record without an id has that of its place in the source."""
        row, task = self.places[number].tolist()
        record = _with_id(self.annotations.read(row), row)
        return {"id": record["id"], "task": self.names[task] if task >= 0 else "", "annotation": record}

    def digest(self) -> str:
        """Changes with the source, the pool and the settings that choose from it."""
        return hashlib.sha256(f"{self.annotations.digest()} {self._digest}".encode()).hexdigest()

    def _tasks(self, number: int, pool: Pool, construction: Construction) -> list[int]:
        try:
            annotation = read_annotation(_with_id(self.annotations.read(number), number), convention=construction.boxes)
            fitting = tasks_for(annotation, pool, seed=construction.seed)
        except (SampleError, SkippedError):
            return [-1]
        if construction.one_task:
            fitting = [fitting[Draw(construction.seed, annotation.id).index("task", len(fitting))]]
        return [self.names.index(task) for task in fitting]


def _with_id(record: Mapping[str, Any], number: int) -> Mapping[str, Any]:
    return record if record.get("id") not in (None, "") else {**record, "id": str(number)}


def picture_size(picture: bytes, name: str) -> tuple[int, int]:
    """The displayed (width, height) of an encoded picture. Raises SampleError naming it."""
    try:
        return read_size(picture)
    except DataError as error:
        raise SampleError(f"image '{name}': {error}") from None
