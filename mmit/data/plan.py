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
from mmit.data.order import draws_of_epoch, interleaved, key
from mmit.data.packing import balanced_steps, best_fit
from mmit.data.shard_set import SampleSet
from mmit.errors import DataError

VERSION = 1


@dataclass(frozen=True)
class Row:
    """One row: its samples as (source, number) in order; ``tokens`` and ``images`` of all of them."""

    samples: tuple[tuple[int, int], ...]
    tokens: int
    images: int


EMPTY = Row((), 0, 0)


@dataclass(frozen=True, kw_only=True, eq=False)
class Plan:
    """Every row of every step.

    sources, tables: the data sets and their lengths. draws: (epochs x draws,) arrays of source and sample, in the order
    of the rows; row r holds draws [starts[r], starts[r + 1]); step s holds rows [s * rows_per_step, ...).
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
    images: np.ndarray
    parts: Mapping[str, str]

    @property
    def fingerprint(self) -> str:
        """Changes with anything that changes which sample is seen when."""
        return hashlib.sha256(json.dumps(self.parts, sort_keys=True).encode()).hexdigest()[:32]

    @property
    def rows(self) -> int:
        """Rows that hold samples, over all steps."""
        return min(len(self.starts) - 1, self.steps * self.rows_per_step)

    @property
    def samples(self) -> int:
        """Samples over all steps, repetitions counted."""
        return int(self.starts[self.rows])

    def step(self, number: int) -> list[Row]:
        """The ``rows_per_step`` rows of a step, the longest first; the last step may end with empty ones."""
        if not 0 <= number < self.steps:
            raise IndexError(number)
        first = number * self.rows_per_step
        found = [self._row(r) for r in range(first, min(first + self.rows_per_step, len(self.starts) - 1))]
        return found + [EMPTY] * (self.rows_per_step - len(found))

    def _row(self, number: int) -> Row:
        span = slice(int(self.starts[number]), int(self.starts[number + 1]))
        samples = tuple(zip(self.source_of[span].tolist(), self.sample_of[span].tolist(), strict=True))
        return Row(samples, int(self.tokens[number]), int(self.images[number]))


def make_plan(
    sources: Sequence[tuple[SampleSet, int]],
    lengths: Sequence[LengthTable],
    *,
    length: int,
    rows_per_step: int,
    packing: bool,
    images_per_row: int,
    seed: int,
    epochs: int = 1,
    max_steps: int | None = None,
) -> Plan:
    """Plan all epochs of a stage.

    sources: data sets, each with the number of samples drawn from it per epoch (see ``draws_per_epoch``).
    lengths: one table for each, already fitted to ``length`` (``lengths.fit``); samples it leaves out are passed over.
    packing: False puts one sample into each row.
    Raises DataError where nothing is left to train on.
    """
    source_of, sample_of = _order([draws for _, draws in sources], [len(s) for s, _ in sources], seed, epochs)
    tokens = _gather([table.tokens for table in lengths], source_of, sample_of)
    images = _gather([table.images for table in lengths], source_of, sample_of)
    kept = np.flatnonzero(tokens)
    if not len(kept):
        names = ", ".join(source.name for source, _ in sources)
        raise DataError(f"{names}: no sample is left to train on; see the refused samples in the log")
    tokens, images = tokens[kept], images[kept]
    if packing:
        order, starts = best_fit(tokens, images, length=length, images_per_row=images_per_row)
    else:
        order, starts = np.arange(len(kept)), np.arange(len(kept) + 1)
    row_tokens = np.add.reduceat(tokens[order].astype(np.int64), starts[:-1])
    row_images = np.add.reduceat(images[order].astype(np.int64), starts[:-1])
    rows = balanced_steps(row_tokens, rows_per_step=rows_per_step, stream=key(seed, "steps"))
    # lay the draws out in the order of the rows, so that a row is one slice
    sizes = np.diff(starts)[rows]
    new_starts = np.concatenate([[0], np.cumsum(sizes)])
    within = np.arange(len(order)) - np.repeat(new_starts[:-1], sizes)
    draws = kept[order[np.repeat(starts[:-1][rows], sizes) + within]]
    steps = -(-len(rows) // rows_per_step)
    return Plan(
        sources=tuple(source for source, _ in sources),
        tables=tuple(lengths),
        rows_per_step=rows_per_step,
        steps=steps if max_steps is None else min(steps, max_steps),
        source_of=source_of[draws].astype(np.uint16),
        sample_of=sample_of[draws].astype(np.uint32),
        starts=new_starts,
        tokens=row_tokens[rows],
        images=row_images[rows],
        parts={
            "version": str(VERSION),
            "data": " ".join(f"{source.fingerprint} x {draws}" for source, draws in sources),
            "lengths (tokenizer, template, image tokens, too_long)": " ".join(t.digest() for t in lengths),
            "length": str(length),
            "rows_per_step": str(rows_per_step),
            "packing": str(packing),
            "images_per_row": str(images_per_row),
            "seed": str(seed),
            "epochs": str(epochs),
        },
    )


def draws_per_epoch(count: int, *, epochs: float = 1.0, samples: int | None = None) -> int:
    """Samples that a source of ``count`` contributes to an epoch: ``samples``, or ``epochs`` of all (at least one)."""
    return samples if samples is not None else max(1, round(epochs * count))


def _order(draws: Sequence[int], counts: Sequence[int], seed: int, epochs: int) -> tuple[np.ndarray, np.ndarray]:
    """Source and sample of every draw, epoch after epoch."""
    sources, samples = [], []
    for epoch in range(epochs):
        source_of = interleaved(draws, epoch, seed=seed)
        sample_of = np.empty(len(source_of), dtype=np.int64)
        for source, (drawn, count) in enumerate(zip(draws, counts, strict=True)):
            sample_of[source_of == source] = draws_of_epoch(count, drawn, epoch, seed=seed, source=source)
        sources.append(source_of)
        samples.append(sample_of)
    return np.concatenate(sources), np.concatenate(samples)


def _gather(columns: Sequence[np.ndarray], source_of: np.ndarray, sample_of: np.ndarray) -> np.ndarray:
    found = np.zeros(len(source_of), dtype=np.uint32)
    for source, column in enumerate(columns):
        here = source_of == source
        found[here] = column[sample_of[here]]
    return found
