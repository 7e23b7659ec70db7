"""The loss on held-out samples while a stage trains, and what the pictures are worth in it; collective.

The held-out samples lie in a plan of their own, so that every rank runs as many forward passes, of empty rows where it
has none. Nothing of training changes: no gradient is made, and each step seeds its own random numbers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import nn

from mmit.config import Data, Log, RunConfig, Source, Stage
from mmit.data import ShardSet, make_plan
from mmit.data.frames import FewerFrames
from mmit.data.held_out import HeldOutSet, Pictures, lenders
from mmit.data.plan import numbered
from mmit.distributed import Readers, all_reduce_sum, logger
from mmit.errors import DataError
from mmit.train.apart import check_apart
from mmit.train.engine import device
from mmit.train.feed import Feed, chosen_samples, lengths_of, open_shards
from mmit.train.records import EvaluationRecord
from mmit.train.text_watch import text_feed

if TYPE_CHECKING:
    from mmit.data import LengthTable, Plan
    from mmit.train.engine import Engine

Sums = np.ndarray
"""(2, sets) float64: the sum of -log p and the trained tokens of each set of a plan."""


@dataclass(frozen=True, kw_only=True)
class Evaluation:
    """What is measured, and when.

    names: of the sources. feeds: a plan for each kind of picture, of one or two sets for each source; owners: the
    source of each set. with_pictures: the sets of the plan with true pictures that the other plans hold again.
    text: what ``evaluate.text`` names; measured before step 1 too.
    """

    every_steps: int
    names: tuple[str, ...]
    feeds: Mapping[Pictures, Feed]
    owners: Mapping[Pictures, tuple[int, ...]]
    with_pictures: tuple[bool, ...]
    text: Feed | None = None

    @property
    def fingerprint(self) -> str:
        """Changes with anything that changes what is measured."""
        feeds = [*self.feeds.values(), *([] if self.text is None else [self.text])]
        return " ".join(feed.plan.fingerprint for feed in feeds)

    def measure(self, engine: Engine, step: int, mark: Callable[[Sequence[str]], None]) -> EvaluationRecord:
        """The losses after ``step``, the same on every rank; collective. mark: told the samples that pass the model."""
        started = time.perf_counter()
        with measuring(engine.module):
            sums = {pictures: _sums(feed, engine, mark) for pictures, feed in self.feeds.items()}
            text = None if self.text is None else _sums(self.text, engine, mark)
        true = sums["true"]
        compared = true * np.array(self.with_pictures)
        gains = {
            pictures: self._by_source(found, pictures) - self._by_source(compared, "true")
            for pictures, found in sums.items()
            if pictures != "true"
        }
        return EvaluationRecord(
            step=step,
            loss=float(_mean(true.sum(axis=1))),
            loss_by_source=dict(zip(self.names, self._by_source(true, "true").tolist(), strict=True)),
            visual_gain={
                pictures: float(_mean(sums[pictures].sum(axis=1)) - _mean(compared.sum(axis=1))) for pictures in gains
            },
            visual_gain_by_source={
                name: {pictures: float(gain[number]) for pictures, gain in gains.items()}
                for number, name in enumerate(self.names)
                if gains and all(np.isfinite(gain[number]) for gain in gains.values())
            },
            trained_tokens=int(true[1].sum()),
            samples=self.feeds["true"].plan.samples,
            seconds=time.perf_counter() - started,
            text_loss=None if text is None else float(_mean(text.sum(axis=1))),
        )

    def _by_source(self, sums: Sums, pictures: Pictures) -> np.ndarray:
        """The loss of each source; NaN where it has no trained token."""
        owners = np.array(self.owners[pictures])
        whole = [[row[owners == number].sum() for number in range(len(self.names))] for row in sums]
        return _mean(np.array(whole))


def plan_evaluation(config: RunConfig, name: str, feed: Feed) -> Evaluation | None:
    """What the section ``evaluate`` of a stage asks for; None where there is none. The same on every rank.

    feed: of the stage. Raises DataError and ConfigError, also where a held-out sample is trained on.
    """
    stage = config.stages[name]
    asked = stage.evaluate
    if asked is None:
        return None
    # what does not fit a row is left out (and told), whatever training does with such
    data = stage.data.model_copy(update={"too_long": "drop"})
    held = stage.model_copy(update={"data": data, "log": Log(by_source=True)})
    parts: dict[Pictures, list[tuple[int, _Part]]] = {"true": []}
    if asked.visual_gain:
        parts |= {"blank": [], "other": []}
    with_pictures: list[bool] = []
    sources = [
        _open(source, data, config, where=f"stages.{name}.evaluate", samples=asked.samples, plan=feed.plan)
        for source in asked.mix
    ]
    for number, (shards, samples) in enumerate(sources):
        for found in _parts(shards, samples, held, feed, list(parts), seed=config.seed):
            with_pictures.append("blank" in found)
            for pictures, part in found.items():
                parts[pictures].append((number, part))
    if not all(parts.values()):
        raise DataError(
            f"stages.{name}.evaluate: no held-out sample has pictures that another could lend; take visual_gain out"
        )
    evaluation = Evaluation(
        every_steps=asked.every_steps,
        names=numbered([shards.name for shards, _ in sources]),
        feeds={kind: replace(feed, plan=_plan(some, held, config.seed), stage=held) for kind, some in parts.items()},
        owners={kind: tuple(number for number, _ in some) for kind, some in parts.items()},
        with_pictures=tuple(with_pictures),
        text=text_feed(asked.text, asked.samples, held, feed, seed=config.seed, where=f"stages.{name}.evaluate.text"),
    )
    plan = evaluation.feeds["true"].plan
    logger.info("held out: %d samples, measured every %d steps and at the end", plan.samples, asked.every_steps)
    return evaluation


@dataclass(frozen=True)
class _Part:
    """A set of a plan: its samples, their lengths, and those that take part."""

    samples: HeldOutSet | FewerFrames
    table: LengthTable
    taking_part: np.ndarray


def _open(
    source: Source, data: Data, config: RunConfig, *, where: str, samples: int, plan: Plan
) -> tuple[ShardSet, np.ndarray]:
    """The shards of a held-out source, and the numbers of the samples to measure; none of them is trained on."""
    shards = open_shards(source, data, beside=config.file)
    limit = min(samples, source.limit or samples)
    chosen = chosen_samples(shards, source.model_copy(update={"limit": limit}), seed=config.seed)
    numbers = np.arange(len(shards), dtype=np.uint32) if chosen is None else chosen
    numbers = np.setdiff1d(numbers, shards.quarantined)
    check_apart(shards, numbers, plan, where=where)
    return shards, numbers


def _parts(
    shards: ShardSet, numbers: np.ndarray, stage: Stage, feed: Feed, kinds: Sequence[Pictures], *, seed: int
) -> Iterator[dict[Pictures, _Part]]:
    """The samples that pictures can be lent to, with each kind of picture, then the others with their own."""
    if len(kinds) == 1:
        yield {"true": _fitted([HeldOutSet(shards, numbers)], stage, feed)[0]}
        return
    has_lender, partners = lenders(shards, numbers, seed=seed)
    if has_lender.any():
        own = numbers[has_lender]
        sets = [
            HeldOutSet(shards, own, pictures=kind, partners=partners if kind == "other" else None) for kind in kinds
        ]
        yield dict(zip(kinds, _fitted(sets, stage, feed), strict=True))
    if not has_lender.all():
        yield {"true": _fitted([HeldOutSet(shards, numbers[~has_lender])], stage, feed)[0]}


def _fitted(sets: Sequence[HeldOutSet], stage: Stage, feed: Feed) -> list[_Part]:
    """Sets of the same samples with their lengths; those that fit a row with all kinds of picture take part."""
    frames = stage.data.frames
    shown = [one if frames is None else FewerFrames(one, frames) for one in sets]
    tables = [lengths_of(one, stage, feed.encode) for one in shown]
    fits = np.logical_and.reduce([table.tokens > 0 for table in tables])
    taking_part = np.flatnonzero(fits).astype(np.uint32)
    if not len(taking_part):
        raise DataError(f"{sets[0].name}: no held-out sample of it fits a row; take it out of evaluate.mix")
    return [_Part(one, table, taking_part) for one, table in zip(shown, tables, strict=True)]


def _plan(parts: Sequence[tuple[int, _Part]], stage: Stage, seed: int) -> Plan:
    batch = stage.batch
    return make_plan(
        [(part.samples, len(part.taking_part)) for _, part in parts],
        [part.table for _, part in parts],
        length=batch.length,
        rows_per_step=Readers(stage.parallel.sequence).count * batch.rows_per_micro_batch,  # a micro-batch of each rank
        packing=batch.packing,
        tiles_per_row=batch.images_per_row,
        seed=seed,
        chosen=[part.taking_part for _, part in parts],
    )


@contextmanager
def measuring(model: nn.Module) -> Generator[None]:
    """Evaluation mode without gradients; afterwards every module is in the mode of before."""
    before = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, training in before:
            module.training = training


def _sums(feed: Feed, engine: Engine, mark: Callable[[Sequence[str]], None]) -> Sums:
    """Of all ranks; collective."""
    sums = torch.zeros((2, len(feed.plan.sources)), dtype=torch.float64, device=device())
    for step in feed.loader(start_step=0):
        for _, sample in step.skipped if feed.readers.speaks else ():
            logger.warning("held out, skipped: %s", sample)
        for batch in step.batches:
            mark(batch.sample_ids)
            here = batch.to(device())
            engine.forward(here)
            assert here.by_source is not None, "the held-out stage asks for it"
            sums[0] += here.by_source.nll
            if feed.readers.speaks:
                sums[1] += torch.tensor(here.by_source.trained_tokens, device=device())
    return all_reduce_sum(sums).cpu().numpy()


def _mean(sums: np.ndarray) -> np.ndarray:
    """Sum over tokens, (2, ...); NaN for no token."""
    return np.divide(sums[0], sums[1], out=np.full_like(sums[0], np.nan), where=sums[1] > 0)
