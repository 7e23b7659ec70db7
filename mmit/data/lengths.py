"""How long every sample is, in tokens, before any is trained on.

The caller gives the rule, ``measure``, and a fingerprint of it (tokenizer, template, image tokens); the table is
computed once, in several processes, and kept beside the shards or in the cache.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
from msgspec import structs

from mmit.conversation import Conversation, ImageRef, Message
from mmit.data import quarantine
from mmit.data.faults import BadSample, StorageError, first_three
from mmit.data.parallel import run, usable_cores, with_progress
from mmit.data.side_files import Table, TextSet, is_kept, kept
from mmit.errors import DataError

ROW = np.dtype([("tokens", "<u4"), ("trained", "<u4"), ("tiles", "<u2"), ("turns", "<u2")])
"""One sample: its tokens (0: it is left out), its trained tokens, its tiles, the turns that are kept (0: all)."""

CHUNK = 256

Measure = Callable[[Conversation], tuple[int, int, int]]
"""Tokens, trained tokens and tiles of a conversation whose images are known by size only. Raises DataError."""


@dataclass(frozen=True, kw_only=True, eq=False)
class LengthTable:
    """The lengths of one data set, one row of ROW for each sample, and the samples that were refused.

    quarantine: a name for which samples its quarantine.txt leaves out; empty where it leaves out none.
    """

    rows: np.ndarray
    refused: tuple[BadSample, ...] = ()
    quarantine: str = ""

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def tokens(self) -> np.ndarray:
        """Tokens of every sample, image tokens included; 0 where it is left out."""
        return self.rows["tokens"]

    @property
    def trained(self) -> np.ndarray:
        """Trained tokens of every sample."""
        return self.rows["trained"]

    @property
    def tiles(self) -> np.ndarray:
        """Tiles of the images of every sample, what the encoder sees of it."""
        return self.rows["tiles"]

    def turns(self, number: int) -> int:
        """How many turns of a sample are kept; 0 is all."""
        return int(self.rows["turns"][number])

    def digest(self) -> str:
        """A hash of the whole table."""
        return hashlib.sha256(np.ascontiguousarray(self.rows).view(np.uint8).data).hexdigest()[:16]


def measure_lengths(
    shards: TextSet,
    measure: Measure,
    *,
    fingerprint: str,
    max_skipped: float,
    processes: int | None = None,
    progress: bool = True,
) -> LengthTable:
    """The length table of ``shards``: read where it exists, computed where not.

    fingerprint: of everything ``measure`` depends on. Of several ranks on a host one computes, the others wait.
    Samples in quarantine are left out.
    Raises DataError where more than ``max_skipped`` of the samples are broken.
    """
    table = _kept(
        shards,
        f"{fingerprint} {shards.fingerprint}",
        lambda: _compute(shards, measure, processes or usable_cores(), progress=progress),
    )
    table = _without_quarantined(table, shards)
    if len(table.refused) > max_skipped * len(table):
        raise DataError(
            f"{shards.name}: {len(table.refused)} of {len(table)} samples cannot be used, max_skipped {max_skipped:g} "
            f"allows {int(max_skipped * len(table))}: {first_three(list(table.refused))}"
        )
    return table


def is_measured(shards: TextSet, *, fingerprint: str) -> bool:
    """Whether ``measure_lengths`` has its table already."""
    return is_kept(shards, f"{fingerprint} {shards.fingerprint}", dtype=ROW)


def fit(
    table: LengthTable,
    shards: TextSet,
    measure: Measure,
    *,
    fingerprint: str,
    length: int,
    tiles_per_row: int,
    too_long: str,
) -> tuple[LengthTable, int]:
    """The table with every sample at most a row long, and how many samples were too long.

    too_long: ``error`` raises DataError naming them, ``drop`` leaves them out, ``drop_turns`` leaves out whole turns
    from their end until they fit (and the sample where its first turns alone do not).
    """
    over = np.flatnonzero((table.tokens > length) | (table.tiles > tiles_per_row))
    if not len(over):
        return table, 0
    if too_long == "error":
        shown = ", ".join(
            f"{shards.place(n)[1]} ({table.tokens[n]} tokens, {table.tiles[n]} tiles)" for n in over[:3].tolist()
        )
        raise DataError(
            f"{shards.name}: {len(over)} of {len(table)} samples are longer than a row of {length} tokens and "
            f"{tiles_per_row} tiles: {shown}{' ...' if len(over) > 3 else ''}. Raise batch.length to "
            f"{int(table.tokens.max())} (batch.images_per_row to {int(table.tiles.max())}), or set data.too_long to "
            "drop or drop_turns"
        )
    rows = table.rows.copy()
    if too_long == "drop":
        rows[over] = 0
    else:
        cut = _kept(
            shards,
            f"{fingerprint} {shards.fingerprint} drop_turns {length} {tiles_per_row} {table.quarantine}".rstrip(),
            lambda: LengthTable(
                rows=np.array([_cut(shards, n, measure, length, tiles_per_row) for n in over.tolist()], dtype=ROW)
            ),
        )
        rows[over] = cut.rows
    return replace(table, rows=rows), len(over)


def cut_turns(conversation: Conversation, turns: int) -> Conversation:
    """The first ``turns`` messages of a conversation, with the images they refer to."""
    messages = conversation.messages[:turns]
    used = [part.index for message in messages for part in message.content if isinstance(part, ImageRef)]
    new = {old: position for position, old in enumerate(used)}
    return structs.replace(
        conversation,
        messages=tuple(_renumbered(message, new) for message in messages),
        images=tuple(conversation.images[old] for old in used) if conversation.images else (),
        sizes=tuple(conversation.sizes[old] for old in used),
    )


def _without_quarantined(table: LengthTable, shards: TextSet) -> LengthTable:
    """The table with the samples in quarantine left out; broken ones among them are no longer counted as such."""
    if not len(shards.quarantined):
        return table
    rows = table.rows.copy()
    rows[shards.quarantined] = 0
    places = {(entry.shard, entry.key) for entry in quarantine.read(shards.left_out, where="")}
    refused = tuple(sample for sample in table.refused if (sample.shard, sample.key) not in places)
    return LengthTable(rows=rows, refused=refused, quarantine=quarantine.digest(shards.quarantined))


def _renumbered(message: Message, new: dict[int, int]) -> Message:
    content = tuple(ImageRef(new[part.index]) if isinstance(part, ImageRef) else part for part in message.content)
    return structs.replace(message, content=content)


def _cut(shards: TextSet, number: int, measure: Measure, length: int, tiles_per_row: int) -> tuple[int, int, int, int]:
    """The row of a too long sample after as few turns as needed were left out; zeros where nothing fits."""
    whole = shards.read_text(number)
    for turns in range(len(whole.messages) - 1, 1, -1):
        if whole.messages[turns - 1].role != "assistant":
            continue
        shorter = cut_turns(whole, turns)
        try:
            tokens, trained, tiles = measure(shorter)
        except StorageError:
            raise
        except DataError:
            continue
        if tokens <= length and tiles <= tiles_per_row:
            return tokens, trained, tiles, turns
    return 0, 0, 0, 0


def _compute(shards: TextSet, measure: Measure, processes: int, *, progress: bool) -> LengthTable:
    def work(start: int) -> tuple[int, np.ndarray, list[BadSample]]:
        rows = np.zeros(min(CHUNK, len(shards) - start), dtype=ROW)
        refused: list[BadSample] = []
        for at in range(len(rows)):
            name = ""
            try:
                conversation = shards.read_text(start + at)
                name = conversation.id
                rows[at] = (*measure(conversation), 0)
            except StorageError:
                raise
            except DataError as error:
                shard, key = shards.place(start + at)
                refused.append(BadSample(id=name, key=key, shard=shard, reason=str(error)))
        return start, rows, refused

    table = np.zeros(len(shards), dtype=ROW)
    bad: list[tuple[int, BadSample]] = []
    results = run(work, range(0, len(shards), CHUNK), processes=processes)
    for start, rows, refused in with_progress(
        results, title=f"measuring {shards.name}", total=len(shards), count=lambda r: len(r[1]), shown=progress
    ):
        table[start : start + len(rows)] = rows
        bad.extend((start, sample) for sample in refused)
    return LengthTable(rows=table, refused=tuple(sample for _, sample in sorted(bad, key=lambda pair: pair[0])))


def _kept(shards: TextSet, fingerprint: str, compute: Callable[[], LengthTable]) -> LengthTable:
    """The table stored under a fingerprint, or the computed one, then stored."""

    def make() -> Table:
        table = compute()
        return table.rows, [vars(sample) for sample in table.refused]

    rows, refused = kept(shards, fingerprint, make, dtype=ROW)
    return LengthTable(rows=rows, refused=tuple(BadSample(**sample) for sample in refused))
