"""From the plan to batches: each rank reads its rows of each step, in worker processes that remember nothing.

The rows of a step are dealt to the ranks by cost and cut into micro-batches, the same number on every rank. A broken
sample is a hole in its row: nothing moves into its place, it is counted and listed, and too many of them end the run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from typing import Literal

import torch
from torch.utils.data import Dataset, get_worker_info

from mmit.batch import Batch, Encoded, collate
from mmit.conversation import Conversation
from mmit.data.ahead import made_ahead
from mmit.data.faults import BadSample, MissingShardError, StorageError, first_three
from mmit.data.lengths import cut_turns
from mmit.data.plan import EMPTY, Plan, Row
from mmit.data.prefetch import Prefetch
from mmit.errors import DataError

Encode = Callable[[Conversation], Encoded]
Made = tuple[Batch, list[tuple[int, BadSample]], str]
"""A micro-batch, the samples left out of it with their sources, and what ends the run (empty: nothing)."""


@dataclass(frozen=True, kw_only=True)
class StepBatches:
    """One optimizer step of one rank: its micro-batches in order, and the samples that were left out of them.

    skipped: each with the number of its source in the plan.
    """

    step: int
    batches: list[Batch]
    skipped: list[tuple[int, BadSample]]


class Loader:
    """Iterates over the steps ``start_step``, ``start_step + 1``, ... of a plan, as one rank sees them.

    encode: makes a sample ready; picklable; raises DataError for a broken one.
    workers: processes that read ahead; 0 reads in this one. The batches do not depend on their number.
    image_size: (H, W) of a tile. feature_size: (P, D_vision) where samples come with features. max_skipped: share of
    the plan's samples that may be broken. on_missing_shard: ``skip`` takes the samples of a shard that went away for
    broken ones; ``error`` ends the run.

    by_source: batches tell whose each label is.

    Iterating raises DataError above that share, for a shard that cannot be read, and for a sample whose length is not
    the one the plan was made with.
    """

    def __init__(
        self,
        plan: Plan,
        encode: Encode,
        *,
        rank: int,
        world: int,
        rows_per_micro_batch: int,
        workers: int,
        pad_id: int,
        image_size: tuple[int, int],
        feature_size: tuple[int, int] | None = None,
        start_step: int = 0,
        max_skipped: float = 0.0,
        by_source: bool = False,
        on_missing_shard: Literal["error", "skip"] = "error",
    ) -> None:
        assert 0 <= rank < world, f"rank {rank} of {world}"
        self.plan = plan
        self.rank = rank
        self.world = world
        self.start_step = start_step
        self.max_skipped = max_skipped
        self.on_missing_shard = on_missing_shard
        self.workers = workers
        rows_of_rank = -(-plan.rows_per_step // world)
        self.micro_batches = -(-rows_of_rank // rows_per_micro_batch)
        self.by_source = by_source
        self.feature_size = feature_size
        self._batches = _MicroBatches(self, encode, rows_per_micro_batch, pad_id, image_size)
        # a line for each process that reads: source + 1 (0: none), sample, monotonic seconds at the start
        self._next_step = start_step
        self._at = torch.zeros((workers + 1, 3), dtype=torch.float64).share_memory_()

    def __iter__(self) -> Iterator[StepBatches]:
        made = made_ahead(self._batches, workers=self.workers, ahead=self.micro_batches)
        with closing(made), Prefetch(self.plan, rank=self.rank, world=self.world) as ahead:
            yield from self._steps(made, ahead)

    def _steps(self, made: Iterator[Made], ahead: Prefetch) -> Iterator[StepBatches]:
        skipped = 0
        for step in range(self.start_step, self.plan.steps):
            self._next_step = step
            batches: list[Batch] = []
            holes: list[tuple[int, BadSample]] = []
            for _ in range(self.micro_batches):
                batch, bad, failure = next(made)
                if failure:
                    raise DataError(failure)
                batches.append(batch)
                holes.extend(bad)
            ahead.reached(step + 1)
            skipped += len(holes)
            self._check_skipped(skipped, [sample for _, sample in holes])
            yield StepBatches(step=step, batches=batches, skipped=holes)

    def rows(self, step: int, micro_batch: int, count: int) -> list[Row]:
        """The rows of this rank in one micro-batch of a step: at most ``count``, at least an empty one."""
        own = self.plan.step_of_rank(step, rank=self.rank, world=self.world)
        return own[micro_batch * count : (micro_batch + 1) * count] or [EMPTY]

    def reading(self) -> str:
        """What is being read right now: the shard and key that have taken longest, or those that come next."""
        busy = [(since, int(source) - 1, int(number)) for source, number, since in self._at.tolist() if source]
        if busy:
            since, source, number = min(busy)
            shard, key = self.plan.sources[source].place(number)
            return f"{shard}: {key}, for {time.monotonic() - since:.0f} s"
        if self._next_step >= self.plan.steps:
            return ""
        rows = self.plan.step_of_rank(self._next_step, rank=self.rank, world=self.world)
        coming = next((sample for row in rows for sample in row.samples), None)
        return "" if coming is None else "next is {}: {}".format(*self.plan.sources[coming[0]].place(coming[1]))

    def note_reading(self, source: int, number: int) -> None:
        """Called by the process that reads, when it begins with a sample; a source of -1 says that it has ended."""
        info = get_worker_info()
        self._at[0 if info is None else info.id + 1] = torch.tensor(
            [source + 1, number, time.monotonic()], dtype=torch.float64
        )

    def _check_skipped(self, skipped: int, holes: list[BadSample]) -> None:
        if holes and skipped > self.max_skipped * self.plan.samples:
            raise DataError(
                f"{skipped} of {self.plan.samples} samples were broken, max_skipped {self.max_skipped:g} allows "
                f"{int(self.max_skipped * self.plan.samples)}; the last: {first_three(holes)}. "
                "`mmit data check` lists all of them"
            )


class _MicroBatches(Dataset[Made]):
    """Micro-batch k of the rest of the run: what a worker makes. Failures travel as text, not as tracebacks."""

    def __init__(self, loader: Loader, encode: Encode, rows: int, pad_id: int, image_size: tuple[int, int]) -> None:
        self.loader = loader
        self.encode = encode
        self.rows = rows
        self.pad_id = pad_id
        self.image_size = image_size

    def __len__(self) -> int:
        return (self.loader.plan.steps - self.loader.start_step) * self.loader.micro_batches

    def __getitem__(self, index: int) -> Made:
        step, micro_batch = divmod(index, self.loader.micro_batches)
        rows = self.loader.rows(self.loader.start_step + step, micro_batch, self.rows)
        bad: list[tuple[int, BadSample]] = []
        made: list[list[tuple[int, Encoded]]] = []
        failure = ""
        try:
            made = [self._row(row, bad) for row in rows]
        except DataError as error:
            failure = str(error)
        batch = collate(
            [[encoded for _, encoded in row] for row in made],
            pad_id=self.pad_id,
            image_size=self.image_size,
            feature_size=self.loader.feature_size,
            sources=[[source for source, _ in row] for row in made] if self.loader.by_source else None,
            source_count=len(self.loader.plan.sources),
        )
        return batch, bad, failure

    def _row(self, row: Row, bad: list[tuple[int, BadSample]]) -> list[tuple[int, Encoded]]:
        found: list[tuple[int, Encoded]] = []
        for source, number in row.samples:
            self.loader.note_reading(source, number)
            made = self._sample(source, number)
            self.loader.note_reading(-1, 0)
            if isinstance(made, BadSample):
                bad.append((source, made))
            else:
                found.append((source, made))
        return found

    def _sample(self, source: int, number: int) -> Encoded | BadSample:
        samples, table = self.loader.plan.sources[source], self.loader.plan.tables[source]
        name = ""
        try:
            conversation = samples.read(number)
            name = conversation.id
            if turns := table.turns(number):
                conversation = cut_turns(conversation, turns)
            encoded = self.encode(conversation)
        except MissingShardError as error:
            if self.loader.on_missing_shard == "error":
                raise
            shard, key = samples.place(number)
            return BadSample(id=f"sample {number}", key=key, shard=shard, reason=str(error))
        except StorageError:
            raise
        except DataError as error:
            shard, key = samples.place(number)
            return BadSample(id=name, key=key, shard=shard, reason=str(error))
        if encoded.length != table.tokens[number]:
            shard, key = samples.place(number)
            raise StorageError(
                f"{shard}: {key} ({name}) is {encoded.length} tokens long and the plan says {table.tokens[number]}: "
                "the length table was made with another tokenizer, template or image size, or the shard was replaced"
            )
        return encoded
