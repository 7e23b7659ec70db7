"""How much a stage has to compute, and what its fullest row holds: from its plan, or from what is stated."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from mmit.config import RunConfig, Stage
from mmit.data import Plan, ShardSet
from mmit.data.lengths import is_measured
from mmit.errors import DataError
from mmit.models import LoadedModel
from mmit.models.absent import AbsentTower
from mmit.models.activations import RowLoad
from mmit.models.flops import shape_of, tower_flops
from mmit.train.feed import Encode, make_encode, open_shards, plan_stage

TEXT_TOKENS, TRAINED_TOKENS = 200, 100
"""Of a sample, where lengths are not measured: about those of LLaVA's instruction mix."""

_TOWER_TRAINS = 3
"""Operations of a tower that trains, forward and backward, over those of its forward pass."""


@dataclass(frozen=True, kw_only=True)
class Workload:
    """One epoch of a stage. flops: without recomputation, which adds ``again``. row: the fullest row.

    samples, steps, flops are 0 where the data is not there. source: where the numbers come from, for the screen.
    """

    samples: int
    steps: int
    tokens: int
    flops: int
    again: int
    row: RowLoad
    source: str


def workload_of(config: RunConfig, name: str, loaded: LoadedModel) -> Workload:
    """The workload of a stage; its data is opened, and read only where its lengths are measured already."""
    stage = config.stages[name]
    encode = make_encode(stage.data, loaded)
    stated = _stated_row(loaded, stage.batch.length)
    try:
        sets = [open_shards(source, stage.data, beside=config.file) for source in stage.data.mix]
    except DataError as error:
        return Workload(
            samples=0, steps=0, tokens=0, flops=0, again=0, row=stated, source=f"no data yet ({error}); {_assumed()}"
        )
    if _can_plan(config, name, sets, encode):
        return _planned(stage, loaded, plan_stage(config, stage, encode))
    per_tile = loaded.model.spec.tokens_per_tile
    samples = sum(round(len(shards) * source.epochs) for shards, source in zip(sets, stage.data.mix, strict=True))
    tiles = sum(
        round(int(shards.images.sum()) * source.epochs) for shards, source in zip(sets, stage.data.mix, strict=True)
    )
    tokens = samples * TEXT_TOKENS + tiles * per_tile
    squares = tokens * tokens // max(1, samples)
    sums = _Sums(tokens=tokens, squares=squares, labels=samples * TRAINED_TOKENS, tiles=tiles)
    flops, again = _flops(loaded, sums)
    return Workload(
        samples=samples,
        steps=-(-tokens // stage.batch.tokens_per_step),
        tokens=tokens,
        flops=flops,
        again=again,
        row=stated,
        source=f"lengths are not measured (`mmit data plan` does it); {_assumed()}",
    )


def _assumed() -> str:
    return f"a sample is taken as {TEXT_TOKENS} tokens of text, {TRAINED_TOKENS} of them trained, and its pictures"


def _stated_row(loaded: LoadedModel, length: int) -> RowLoad:
    """A row full of samples with one picture each."""
    samples = max(1, length // (TEXT_TOKENS + loaded.model.spec.tokens_per_tile))
    return RowLoad(tokens=length, trained=min(length, samples * TRAINED_TOKENS), tiles=samples, samples=samples)


def _can_plan(config: RunConfig, name: str, sets: list[ShardSet], encode: Encode) -> bool:
    """Whether the plan takes no pass over the data."""
    data = config.stages[name].data
    if data.control != "none" or data.frames is not None or any(source.per_task for source in data.mix):
        return False
    return all(is_measured(shards, fingerprint=encode.fingerprint()) for shards in sets)


@dataclass(frozen=True, kw_only=True)
class _Sums:
    """Over an epoch; squares: of the samples' lengths."""

    tokens: int
    squares: int
    labels: int
    tiles: int


def _planned(stage: Stage, loaded: LoadedModel, plan: Plan) -> Workload:
    count = plan.samples
    lengths, labels, tiles = (np.zeros(count, dtype=np.int64) for _ in range(3))
    for number, table in enumerate(plan.tables):
        own = np.flatnonzero(plan.source_of[:count] == number)
        samples = plan.sample_of[own]
        lengths[own], labels[own], tiles[own] = table.tokens[samples], table.trained[samples], table.tiles[samples]
    rows = plan.steps * plan.rows_per_step
    starts = plan.starts[: rows + 1]
    filled = np.flatnonzero(np.diff(starts))
    most = [int(np.add.reduceat(column, starts[:-1][filled]).max()) for column in (lengths, labels, tiles)]
    sums = _Sums(
        tokens=int(lengths.sum()), squares=int((lengths**2).sum()), labels=int(labels.sum()), tiles=int(tiles.sum())
    )
    flops, again = _flops(loaded, sums)
    tokens = stage.batch.length if stage.batch.packing else most[0]
    return Workload(
        samples=count // stage.epochs,
        steps=-(-plan.steps // stage.epochs),
        tokens=int(lengths.sum()) // stage.epochs,
        flops=flops // stage.epochs,
        again=again // stage.epochs,
        row=RowLoad(tokens=tokens, trained=most[1], tiles=most[2], samples=max(1, int(np.diff(starts).max()))),
        source="the plan of the data",
    )


def _flops(loaded: LoadedModel, sums: _Sums) -> tuple[int, int]:
    """Operations of an epoch, and those that recomputation adds."""
    shape = shape_of(loaded.model.language_model)
    flops = shape.flops(tokens=sums.tokens, squares=sums.squares, labels=sums.labels)
    tower = loaded.model.vision_tower
    if not isinstance(tower, AbsentTower):
        times = _TOWER_TRAINS if any(parameter.requires_grad for parameter in tower.parameters()) else 1
        flops += sums.tiles * tower_flops(tower, loaded.model.spec) * times
    again = 2 * shape.parameters * sums.tokens + 2 * shape.layers * shape.attention_width * sums.squares
    return flops, again
