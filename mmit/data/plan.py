"""The plan of a stage: which samples lie in which row of which step, known before the first one.

A pure function of the seed, the data and the batch settings. It knows nothing of ranks, workers or accumulation, so
a run can stop at any step and go on with another number of them; the only state is the number of the step.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from mmit.data.lengths import LengthTable
from mmit.data.order import CHUNK, WINDOW, draws_of_epoch, interleaved, key
from mmit.data.packing import best_fit
from mmit.data.shard_set import SampleSet
from mmit.data.steps import NO_ROW, Batches, arrange, deal, row_cost
from mmit.errors import DataError

VERSION = 2


@dataclass(frozen=True)
class Row:
    """One row: its samples as (source, number) in order; ``tokens`` and ``tiles`` of all of them."""

    samples: tuple[tuple[int, int], ...]
    tokens: int
    tiles: int


EMPTY = Row((), 0, 0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """Every row of every step.

    sources, tables: the data sets and their lengths. source_of, sample_of: (draws of all epochs,) source and sample of
    each draw, in the order of the rows. starts: row r holds draws [starts[r], starts[r + 1]); step s holds rows
    [s * rows_per_step, ...), the costliest first and empty ones last. tokens, tiles: of each row.
    parts: digests of what the plan was made from, by name; fingerprint: of all of them.
    """

    sources: tuple[SampleSet, ...]
    tables: tuple[LengthTable, ...]
    rows_per_step: int
    steps: int
    source_of: np.ndarray
    sample_of: np.ndarray
    starts: np.ndarray
    tokens: np.ndarray
    tiles: np.ndarray
    parts: Mapping[str, str]

    @property
    def fingerprint(self) -> str:
        """Changes with anything that changes which sample is seen when."""
        return hashlib.sha256(json.dumps(self.parts, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def names(self) -> tuple[str, ...]:
        """A name for each source; data sets of one name are numbered."""
        return numbered([source.name for source in self.sources])

    @property
    def rows(self) -> int:
        """Rows that hold samples, over all steps."""
        return int(np.count_nonzero(self.tokens[: self.steps * self.rows_per_step]))

    @property
    def samples(self) -> int:
        """Samples over all steps, repetitions counted."""
        return int(self.starts[self.steps * self.rows_per_step])

    @property
    def costs(self) -> np.ndarray:
        """What each row of each step costs, in tokens: (steps, rows_per_step) int64; 0 for an empty one."""
        rows = self.steps * self.rows_per_step
        return row_cost(self.tokens[:rows], self.tiles[:rows]).reshape(self.steps, self.rows_per_step)

    def step(self, number: int) -> list[Row]:
        """The ``rows_per_step`` rows of a step, the costliest first, empty ones last."""
        if not 0 <= number < self.steps:
            raise IndexError(number)
        first = number * self.rows_per_step
        return [self._row(row) for row in range(first, first + self.rows_per_step)]

    def step_of_rank(self, number: int, *, rank: int, world: int) -> list[Row]:
        """The rows that one rank takes of a step, in order: all ranks together take each once."""
        if not 0 <= number < self.steps:
            raise IndexError(number)
        first = number * self.rows_per_step
        span = slice(first, first + self.rows_per_step)
        own = deal(row_cost(self.tokens[span], self.tiles[span])[None], world)[0, :, rank]
        return [self._row(first + row) for row in own.tolist() if row != NO_ROW]

    def _row(self, number: int) -> Row:
        span = slice(int(self.starts[number]), int(self.starts[number + 1]))
        samples = tuple(zip(self.source_of[span].tolist(), self.sample_of[span].tolist(), strict=True))
        return Row(samples, int(self.tokens[number]), int(self.tiles[number]))


def numbered(names: Sequence[str]) -> tuple[str, ...]:
    """The names, each that comes twice with its number: ``photos#1``, ``photos#2``."""
    return tuple(
        name if names.count(name) == 1 else f"{name}#{1 + names[:number].count(name)}"
        for number, name in enumerate(names)
    )


def make_plan(
    sources: Sequence[tuple[SampleSet, int]],
    lengths: Sequence[LengthTable],
    *,
    length: int,
    rows_per_step: int,
    packing: bool,
    tiles_per_row: int,
    seed: int,
    epochs: int = 1,
    max_steps: int | None = None,
    chosen: Sequence[np.ndarray | None] = (),
    batches: Batches = "mixed",
    text_share: float = 0.0,
) -> Plan:
    """Plan all epochs of a stage.

    sources: data sets, each with the number of samples drawn from it per epoch (see ``mixture``).
    lengths: one table for each, already fitted to ``length`` (``lengths.fit``); samples it leaves out are passed over.
    packing: False puts one sample into each row. tiles_per_row: the most in one row.
    chosen: for each source the numbers of the samples that take part, ascending; None is all of them.
    batches, text_share: which rows share a step, see ``steps.arrange``.
    Raises DataError where nothing is left to train on.
    """
    chosen = chosen or [None] * len(sources)
    source_of, sample_of = _order(sources, chosen, seed, epochs)
    tokens = _gather([table.tokens for table in lengths], source_of, sample_of, np.uint32)
    if not tokens.any():
        names = ", ".join(source.name for source, _ in sources)
        raise DataError(f"{names}: no sample is left to train on; see the refused samples in the log")
    if not tokens.all():
        kept = tokens > 0
        source_of, sample_of, tokens = source_of[kept], sample_of[kept], tokens[kept]
    tiles = _gather([table.tiles for table in lengths], source_of, sample_of, np.uint16)
    order, starts = _rows(tokens, tiles, length, tiles_per_row, packing=packing, by_kind=batches != "mixed")
    row_tokens, row_tiles = _sums(tokens, order, starts), _sums(tiles, order, starts)
    del tokens, tiles  # of ten million samples every array counts
    steps = arrange(
        row_cost(row_tokens, row_tiles),
        row_tiles == 0,
        batches=batches,
        text_share=text_share,
        rows_per_step=rows_per_step,
        stream=key(seed, "steps"),
    )
    rows = steps.reshape(-1)
    (source_of, sample_of), new_starts = _laid_out([source_of, sample_of], order, starts, rows)
    return Plan(
        sources=tuple(source for source, _ in sources),
        tables=tuple(lengths),
        rows_per_step=rows_per_step,
        steps=len(steps) if max_steps is None else min(len(steps), max_steps),
        source_of=source_of,
        sample_of=sample_of,
        starts=new_starts,
        tokens=np.where(rows == NO_ROW, np.uint32(0), row_tokens[rows]),
        tiles=np.where(rows == NO_ROW, np.uint32(0), row_tiles[rows]),
        parts={
            "version": str(VERSION),
            "data": " ".join(
                f"{source.fingerprint} x {draws}"
                + ("" if some is None else f" of {_digest(some)}")
                + (f" in windows of {WINDOW}" if source.blocks else "")
                for (source, draws), some in zip(sources, chosen, strict=True)
            ),
            "lengths (tokenizer, template, image tokens, too_long)": " ".join(t.digest() for t in lengths),
            "quarantine": " ".join(t.quarantine for t in lengths),
            "length": str(length),
            "rows_per_step": str(rows_per_step),
            "packing": str(packing),
            "images_per_row": str(tiles_per_row),
            "seed": str(seed),
            "epochs": str(epochs),
            "batches": f"{batches} {text_share:g}",
        },
    )


def _order(
    sources: Sequence[tuple[SampleSet, int]], chosen: Sequence[np.ndarray | None], seed: int, epochs: int
) -> tuple[np.ndarray, np.ndarray]:
    """Source and sample of every draw, epoch after epoch: uint16, uint32."""
    draws = [drawn for _, drawn in sources]
    parts_source, parts_sample = [], []
    for epoch in range(epochs):
        source_of = interleaved(draws, epoch, seed=seed)
        sample_of = np.empty(len(source_of), dtype=np.uint32)
        for number, ((source, drawn), some) in enumerate(zip(sources, chosen, strict=True)):
            count = len(source) if some is None else len(some)
            blocks = source.blocks if some is None else _chosen_of(source.blocks, some)
            found = draws_of_epoch(count, drawn, epoch, seed=seed, source=number, blocks=blocks)
            drawn_samples = found if some is None else some[found]
            if len(sources) == 1:
                sample_of = drawn_samples
            else:
                sample_of[source_of == number] = drawn_samples
        parts_source.append(source_of)
        parts_sample.append(sample_of)
    if epochs == 1:
        return parts_source[0], parts_sample[0]
    return np.concatenate(parts_source), np.concatenate(parts_sample)


def _chosen_of(blocks: Sequence[int], some: np.ndarray) -> list[int]:
    """How many of the chosen samples lie in each block."""
    return np.diff(np.searchsorted(some, np.cumsum([0, *blocks]))).tolist()


def _gather(
    columns: Sequence[np.ndarray], source_of: np.ndarray, sample_of: np.ndarray, dtype: type[np.unsignedinteger]
) -> np.ndarray:
    found = np.zeros(len(source_of), dtype=dtype)
    for first in range(0, len(found), CHUNK):  # no temporary as large as the plan
        part = slice(first, first + CHUNK)
        for source, column in enumerate(columns):
            here = source_of[part] == source
            found[part][here] = column[sample_of[part][here]]
    return found


def _rows(
    tokens: np.ndarray, tiles: np.ndarray, length: int, tiles_per_row: int, *, packing: bool, by_kind: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Draws in the order of their rows, and where each row starts; by_kind: text alone in rows of its own."""
    if not packing:
        return np.arange(len(tokens), dtype=np.uint32), np.arange(len(tokens) + 1)
    if not by_kind:
        return best_fit(tokens, tiles, length=length, tiles_per_row=tiles_per_row)
    order, starts = [np.zeros(0, dtype=np.uint32)], [np.zeros(1, dtype=np.int64)]
    for here in (np.flatnonzero(tiles), np.flatnonzero(tiles == 0)):
        own, at = best_fit(tokens[here], tiles[here], length=length, tiles_per_row=tiles_per_row)
        order.append(here[own].astype(np.uint32))
        starts.append(at[1:] + starts[-1][-1])
    return np.concatenate(order), np.concatenate(starts)


def _sums(values: np.ndarray, order: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """The sum over each row, uint32; no temporary is as large as the plan."""
    found = np.empty(len(starts) - 1, dtype=np.uint32)
    for first in range(0, len(found), CHUNK):
        at = starts[first : first + CHUNK + 1]
        found[first : first + CHUNK] = np.add.reduceat(values[order[at[0] : at[-1]]], at[:-1] - at[0], dtype=np.uint32)
    return found


def _laid_out(
    columns: Sequence[np.ndarray], order: np.ndarray, starts: np.ndarray, rows: np.ndarray
) -> tuple[list[np.ndarray], np.ndarray]:
    """The columns of the draws in the order of ``rows``, so that a row is one slice, and where each of these begins."""
    sizes = np.where(rows == NO_ROW, 0, np.diff(starts)[rows])
    new_starts = np.concatenate([[0], np.cumsum(sizes)])
    found = [np.empty(new_starts[-1], dtype=column.dtype) for column in columns]
    for first in range(0, len(rows), CHUNK):
        here = slice(first, first + CHUNK)
        base, stop = int(new_starts[first]), int(new_starts[min(first + CHUNK, len(rows))])
        shift = np.repeat(starts[rows[here]] - new_starts[:-1][here], sizes[here])
        draws = order[np.arange(base, stop) + shift]
        for column, laid in zip(columns, found, strict=True):
            laid[base:stop] = column[draws]
    return found, new_starts


def _digest(chosen: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(chosen).data).hexdigest()[:16]
