"""What a set is made of: turns, words, pictures and their sizes, from the texts alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from rich.table import Table

from mmit.data.faults import StorageError
from mmit.data.parallel import run, usable_cores, with_progress
from mmit.data.shard_set import open_source
from mmit.errors import DataError

CHUNK = 512
PERCENTILES = (5, 50, 95, 100)


@dataclass
class Stats:
    """Numbers of each sample, by name: turns, images, words of questions and of answers; width and height by image."""

    name: str
    shards: int
    size: int
    columns: dict[str, np.ndarray] = field(default_factory=dict)
    unreadable: int = 0

    @property
    def samples(self) -> int:
        """Samples in the shards, unreadable ones included."""
        return len(self.columns["turns"]) + self.unreadable

    def percentiles(self) -> Mapping[str, list[int]]:
        """For each column the PERCENTILES; a column without a value is left out."""
        return {
            name: [int(np.percentile(values, share, method="lower")) for share in PERCENTILES]
            for name, values in self.columns.items()
            if len(values)
        }

    def table(self) -> Table:
        """The numbers for rich to print."""
        images = self.columns["images"]
        title = (
            f"{self.name}: {self.samples:,} samples in {self.shards} shards of {self.size / 1e6:,.1f} MB; "
            f"{int(images.sum()):,} images, {int((images == 0).sum()):,} text-only, {self.unreadable} unreadable"
        )
        table = Table("", title=title)
        for share in PERCENTILES:
            table.add_column("most" if share == 100 else f"{share} %", justify="right")
        for name, numbers in self.percentiles().items():
            table.add_row(name, *(f"{number:,}" for number in numbers))
        return table


def stats(source: str | Path, *, processes: int | None = None, progress: bool = True) -> Stats:
    """Measure the shards at ``source``. Raises DataError where they cannot be opened or read."""
    shards = open_source(source)

    def work(start: int) -> tuple[dict[str, list[int]], int]:
        columns: dict[str, list[int]] = {name: [] for name in _COLUMNS}
        unreadable = 0
        for number in range(start, min(start + CHUNK, len(shards))):
            try:
                sample = shards.read_text(number)
            except StorageError:
                raise
            except DataError:
                unreadable += 1
                continue
            words = Counter[str]()
            for message in sample.messages:
                words[message.role] += len(message.text.split())
            columns["turns"].append(len(sample.messages))
            columns["images"].append(len(sample.sizes))
            columns["words of questions"].append(words["user"])
            columns["words of answers"].append(words["assistant"])
            columns["image width"] += [width for width, _ in sample.sizes]
            columns["image height"] += [height for _, height in sample.sizes]
        return columns, unreadable

    found = Stats(shards.name, len(shards.tars), shards.size)
    parts: list[dict[str, list[int]]] = []
    results = run(work, range(0, len(shards), CHUNK), processes=processes or usable_cores())
    for columns, unreadable in with_progress(
        results, title=f"reading {shards.name}", total=len(shards), count=lambda r: len(r[0]["turns"]), shown=progress
    ):
        parts.append(columns)
        found.unreadable += unreadable
    found.columns = {name: np.concatenate([np.array(part[name], np.int64) for part in parts]) for name in _COLUMNS}
    return found


_COLUMNS = ("turns", "images", "words of questions", "words of answers", "image width", "image height")
