"""What comes more than once, in a set or in two: keys, whole samples by their content, pictures."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from mmit.data.findings import Report
from mmit.data.shard_set import ShardSet, one_shard

PAIR = np.dtype([("row", "<u4"), ("hash", "<u8")])


def _none() -> np.ndarray:
    return np.zeros(0, dtype=PAIR)


@dataclass(frozen=True)
class Contents:
    """What lies in one shard, as 64-bit hashes with their rows: its keys, its samples, its pictures."""

    tar: Path
    keys: np.ndarray = field(default_factory=_none)
    samples: np.ndarray = field(default_factory=_none)
    pictures: np.ndarray = field(default_factory=_none)

    @classmethod
    def of(
        cls,
        tar: Path,
        keys: Sequence[np.uint64],
        samples: Sequence[tuple[int, np.uint64]],
        pictures: Sequence[tuple[int, np.uint64]],
    ) -> Contents:
        """From hashes: of every row in order, and of (row, hash) pairs."""
        return cls(
            tar,
            np.array(list(enumerate(keys)), dtype=PAIR),
            np.array(samples, dtype=PAIR),
            np.array(pictures, dtype=PAIR),
        )


def note_repeats(report: Report, contents: Sequence[Contents]) -> None:
    """Note keys that come in several shards (errors) and samples whose content was there before (warnings)."""
    names = _Names(contents)
    for shard, row, (first, _) in _later(contents, "keys"):
        reason = f"comes in '{contents[first].tar.name}' and '{contents[shard].tar.name}'"
        report.add(f"key {names.key(shard, row)}", reason)
    for shard, row, (first, first_row) in _later(contents, "samples"):
        report.add(
            names.place(shard, row),
            f"has the pictures and the text of '{names.place(first, first_row)}'",
            "warning",
            sample=(contents[shard].tar.name, row),
        )


def note_leaks(report: Report, ours: Sequence[Contents], other: str, theirs: Sequence[Contents]) -> None:
    """Note samples that the other set holds too (errors), and those that only share a picture with it (warnings)."""
    names = _Names(ours)
    samples = np.unique(np.concatenate([contents.samples["hash"] for contents in theirs]))
    pictures = np.unique(np.concatenate([contents.pictures["hash"] for contents in theirs]))
    for number, contents in enumerate(ours):
        whole = set(contents.samples["row"][np.isin(contents.samples["hash"], samples)].tolist())
        partly = set(contents.pictures["row"][np.isin(contents.pictures["hash"], pictures)].tolist()) - whole
        for row in sorted(whole):
            reason = f"is in '{other}' too, with the same pictures and text"
            report.add(names.place(number, row), reason, sample=(contents.tar.name, row))
            if (shard := names.shard(number)) is not None:
                report.broken.append(shard.entry(row, reason))
        for row in sorted(partly):
            reason = f"shares a picture with '{other}'"
            report.add(names.place(number, row), reason, "warning", sample=(contents.tar.name, row))


def _later(contents: Sequence[Contents], what: str) -> list[tuple[int, int, tuple[int, int]]]:
    """Shard and row of every entry whose hash was there before, with shard and row of the first of its kind."""
    columns = [getattr(part, what) for part in contents]
    sizes = [len(column) for column in columns]
    shard_of = np.repeat(np.arange(len(contents)), sizes)
    pairs = np.concatenate([*columns, _none()])
    _, first, inverse = np.unique(pairs["hash"], return_index=True, return_inverse=True)
    later = np.flatnonzero(first[inverse] != np.arange(len(pairs)))
    return [
        (int(shard_of[n]), int(pairs["row"][n]), (int(shard_of[f]), int(pairs["row"][f])))
        for n, f in zip(later, first[inverse][later], strict=True)
    ]


class _Names:
    """Keys of samples, read when asked for: there may be millions, and few are named."""

    def __init__(self, contents: Sequence[Contents]) -> None:
        self._contents = contents
        self._open: dict[int, ShardSet | None] = {}

    def shard(self, number: int) -> ShardSet | None:
        """The shard; None where it came from a URL and has left the cache since."""
        if number not in self._open:
            tar = self._contents[number].tar
            there = tar.is_file()
            self._open[number] = one_shard(tar) if there else None
        return self._open[number]

    def key(self, shard: int, row: int) -> str:
        found = self.shard(shard)
        return f"row {row}" if found is None else found.place(row)[1]

    def place(self, shard: int, row: int) -> str:
        return f"{self._contents[shard].tar.name}: {self.key(shard, row)}"
