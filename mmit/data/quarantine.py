"""Samples that are left out of training: ``quarantine.txt`` beside the manifest, one line for each.

    shard <tab> row in the shard <tab> checksum of its header <tab> key <tab> reason

``mmit data check --quarantine`` writes it; lines may be removed by hand. The checksum ties a line to its sample, so a
list that was made for other shards is refused and never leaves out the wrong ones.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmit.data.atomic import cannot_write, write_whole
from mmit.data.faults import StorageError

QUARANTINE = "quarantine.txt"
_HEAD = "# shard\trow\tchecksum\tkey\treason: left out of training; written by mmit data check --quarantine\n"


@dataclass(frozen=True)
class Entry:
    """One sample that is left out; ``check`` is that of its index row."""

    shard: str
    row: int
    check: int
    key: str
    reason: str


def read(content: str, *, where: str) -> list[Entry]:
    """The entries of a list. Raises StorageError naming the line that is none."""
    entries = []
    for number, line in enumerate(content.splitlines(), start=1):
        if not line.strip() or line.startswith("#"):
            continue
        fields = line.split("\t", 4)
        try:
            shard, row, check = fields[0], int(fields[1]), int(fields[2], 16)
        except (IndexError, ValueError):
            raise StorageError(
                f"{where}, line {number}: is not 'shard, row, checksum, key, reason' with tabs between; "
                "remove the line or run `mmit data check --quarantine` again"
            ) from None
        entries.append(Entry(shard, row, check, *[*fields[3:], "", ""][:2]))
    return entries


def write(directory: Path, entries: Sequence[Entry]) -> Path:
    """Put the list beside the manifest, together with what stands there already. Raises DataError, StorageError."""
    path = directory / QUARANTINE
    old = read(path.read_text(encoding="utf-8"), where=str(path)) if path.is_file() else []
    merged = {(entry.shard, entry.row): entry for entry in [*old, *entries]}
    lines = [
        f"{e.shard}\t{e.row}\t{e.check:08x}\t{_flat(e.key)}\t{_flat(e.reason)}\n"
        for _, e in sorted(merged.items(), key=lambda pair: pair[0])
    ]
    try:
        write_whole(path, (_HEAD + "".join(lines)).encode("utf-8", errors="replace"))
    except OSError as error:
        raise cannot_write(path, error) from None
    return path


def numbers(entries: Sequence[Entry], rows: Mapping[str, tuple[int, np.ndarray]], *, where: str) -> np.ndarray:
    """The numbers of the samples that entries mean, sorted int64; entries of shards that are not here mean none.

    rows: for each shard its first sample's number and its index. Raises StorageError for a list of other shards.
    """
    found = set()
    for entry in entries:
        if entry.shard not in rows:
            continue
        first, index = rows[entry.shard]
        if not 0 <= entry.row < len(index) or int(index[entry.row]["check"]) != entry.check:
            raise StorageError(
                f"{where}: '{entry.key}' does not stand at row {entry.row} of {entry.shard}: the shards were made anew "
                "after the list; remove the file, and run `mmit data check --quarantine` again"
            )
        found.add(first + entry.row)
    return np.array(sorted(found), dtype=np.int64)


def digest(samples: np.ndarray) -> str:
    """A name for which samples are left out; empty where none is."""
    return hashlib.sha256(samples.tobytes()).hexdigest()[:16] if len(samples) else ""


def _flat(text: str) -> str:
    return " ".join(text.split())
