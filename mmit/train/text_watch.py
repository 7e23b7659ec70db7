"""Text without pictures that is measured beside the held-out samples: a plan of its own, never trained on."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from mmit.config import Stage
from mmit.data import ShardSet, make_plan, open_source
from mmit.data.held_out import HeldOutSet
from mmit.data.text_probe import TextProbe
from mmit.distributed import world_size
from mmit.errors import DataError
from mmit.train.apart import check_apart
from mmit.train.feed import Feed, lengths_of


def text_feed(text: str, samples: int, held: Stage, feed: Feed, *, seed: int, where: str) -> Feed | None:
    """What ``evaluate.text`` names, at most ``samples`` of it; None for ``none``.

    held: the stage as held-out samples are read. feed: of the stage. where: the key, for messages. Raises DataError
    where nothing of it fits a row, ConfigError where it is trained on too.
    """
    if text == "none":
        return None
    found: TextProbe | HeldOutSet = TextProbe(Path(held.data.cache))
    if text != "probe":
        shards = open_source(text, cache=Path(held.data.cache), cache_bytes=round(held.data.cache_gb * 1e9))
        numbers = _without_pictures(shards, samples, seed=seed, where=where)
        check_apart(shards, numbers, feed.plan, where=where)
        found = HeldOutSet(shards, numbers)
    table = lengths_of(found, held, feed.encode)
    taking_part = np.flatnonzero(table.tokens).astype(np.uint32)
    if not len(taking_part):
        raise DataError(f"{where}: no sample of {found.name} fits a row of {held.batch.length} tokens")
    plan = make_plan(
        [(found, len(taking_part))],
        [table],
        length=held.batch.length,
        rows_per_step=world_size() * held.batch.rows_per_micro_batch,
        packing=held.batch.packing,
        tiles_per_row=held.batch.images_per_row,
        seed=seed,
        chosen=[taking_part],
    )
    return replace(feed, plan=plan, stage=held)


def _without_pictures(shards: ShardSet, samples: int, *, seed: int, where: str) -> np.ndarray:
    numbers = np.flatnonzero(np.asarray(shards.images) == 0)
    if not len(numbers):
        raise DataError(f"{where}: {shards.name} holds no sample without pictures; name another set, or take probe")
    drawn = np.random.default_rng(seed).permutation(len(numbers))[:samples]
    return np.sort(numbers[drawn]).astype(np.uint32)
