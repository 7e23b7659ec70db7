"""What a stage reads: from the run file's words to sources, lengths, a plan and a loader."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from mmit.batch import Encoded
from mmit.config import Data, RunConfig, Source, Stage
from mmit.conversation import Conversation
from mmit.data import (
    Choice,
    LengthTable,
    Loader,
    Plan,
    ShardSet,
    choose,
    draws_by_root,
    draws_by_weight,
    draws_per_epoch,
    fit,
    load_recipe,
    make_plan,
    measure_lengths,
    open_source,
    usable,
)
from mmit.data.control import ControlledSet
from mmit.data.facts import read_facts
from mmit.data.frames import FewerFrames
from mmit.data.side_files import TextSet
from mmit.data.summary import summarize, summary_table
from mmit.distributed import Readers, logger, rank
from mmit.encoding import Style, encode_conversation
from mmit.errors import DataError
from mmit.images import ImageSpec
from mmit.instructions import InstructionReader
from mmit.models import LoadedModel, Outline
from mmit.templates import ChatTemplate

if TYPE_CHECKING:
    from mmit.train.feature_maker import CachedFeatures
    from mmit.train.features import StageFeatures


@dataclass(frozen=True)
class Encode:
    """Makes a conversation ready for the model; goes to the loader's processes as it is."""

    template: ChatTemplate
    tokenizer: PreTrainedTokenizerBase
    spec: ImageSpec
    image_id: int
    style: Style
    instructions: InstructionReader | None = None
    features: CachedFeatures | None = None

    def __call__(self, conversation: Conversation) -> Encoded:
        """Ids, labels and pixels. Raises DataError."""
        return self._encode(conversation, pixels=True)

    def measure(self, conversation: Conversation) -> tuple[int, int, int]:
        """Tokens, trained tokens and tiles, without decoding an image. Raises DataError."""
        encoded = self._encode(conversation, pixels=False)
        return encoded.length, encoded.trained_tokens, sum(plan.tiles for plan in encoded.plans)

    def _encode(self, conversation: Conversation, *, pixels: bool) -> Encoded:
        return encode_conversation(
            conversation,
            template=self.template,
            tokenizer=self.tokenizer,
            spec=self.spec,
            image_id=self.image_id,
            style=self.style,
            pixels=pixels,
            features=self.features,
            instructions=self.instructions if pixels else None,
        )

    def fingerprint(self) -> str:
        """Changes with anything that changes a length."""
        parts = [
            self.tokenizer.backend_tokenizer.to_str(),
            self.template.jinja,
            self.template.name,
            str(self.spec.fingerprint()),
            self.style,
            *(version(package) for package in ("mmit", "transformers", "tokenizers")),
        ]
        return hashlib.sha256("\0".join(parts).encode()).hexdigest()[:32]


@dataclass(frozen=True)
class Feed:
    """The plan of a stage and how it is read."""

    plan: Plan
    encode: Encode
    stage: Stage
    pad_id: int
    feature_size: tuple[int, int] | None = None

    @property
    def readers(self) -> Readers:
        """Who reads the rows of the plan."""
        return Readers(self.stage.parallel.sequence)

    def loader(self, *, start_step: int) -> Loader:
        """This rank's batches from ``start_step`` on."""
        return Loader(
            self.plan,
            self.encode,
            rank=self.readers.number,
            world=self.readers.count,
            rows_per_micro_batch=self.stage.batch.rows_per_micro_batch,
            workers=self.stage.data.workers,
            pad_id=self.pad_id,
            image_size=self.encode.spec.canvas,
            feature_size=self.feature_size,
            start_step=start_step,
            max_skipped=self.stage.data.max_skipped,
            on_missing_shard=self.stage.data.on_missing_shard,
            by_source=self.stage.log.by_source,
        )


def make_encode(data: Data, loaded: LoadedModel | Outline) -> Encode:
    """How the samples of a stage are encoded for a model."""
    template = loaded.template
    if data.template != "model":
        template = ChatTemplate.load(data.template, loaded.tokenizer)
    return Encode(template, loaded.tokenizer, loaded.spec, loaded.image_id, loaded.style, loaded.instructions)


def make_feed(config: RunConfig, stage: Stage, loaded: LoadedModel, features: StageFeatures | None = None) -> Feed:
    """The plan of a stage, from the lengths of all its samples; the same on every rank.

    features: what is read in place of pictures, with the plan that they were found for.
    Raises DataError and ConfigError for what is wrong with the data or the recipe.
    """
    encode = make_encode(stage.data, loaded)
    if features is None:
        return Feed(plan_stage(config, stage, encode), encode, stage, loaded.pad_id)
    return Feed(features.plan, replace(encode, features=features.read), stage, loaded.pad_id, features.size)


def plan_stage(config: RunConfig, stage: Stage, encode: Encode) -> Plan:
    """The plan alone. Raises DataError and ConfigError."""
    batch, data = stage.batch, stage.data
    whole = [open_shards(source, data, beside=config.file) for source in data.mix]
    chosen = [chosen_samples(shards, source, seed=config.seed) for shards, source in zip(whole, data.mix, strict=True)]
    sets = [_as_asked(shards, data, seed=config.seed) for shards in whole]
    tables = [lengths_of(shards, stage, encode) for shards in sets]
    taking_part = [usable(table.tokens, some) for table, some in zip(tables, chosen, strict=True)]
    counts = [len(shards) if some is None else len(some) for shards, some in zip(sets, taking_part, strict=True)]
    for shards, count in zip(sets, counts, strict=True):
        if not count:
            raise DataError(f"{shards.name}: no sample of it is left to train on; take it out of data.mix")
    return make_plan(
        list(zip(sets, _draws(data, counts), strict=True)),
        tables,
        length=batch.length,
        rows_per_step=batch.rows_per_step,
        packing=batch.packing,
        tiles_per_row=batch.images_per_row,
        seed=config.seed,
        epochs=stage.epochs,
        max_steps=stage.max_steps,
        chosen=taking_part,
        batches=data.batches,
        text_share=data.text_share,
    )


def chosen_samples(shards: ShardSet, source: Source, *, seed: int) -> np.ndarray | None:
    """The samples of an entry that take part. Raises DataError, also for a cap by task where no sample has a task."""
    choice = Choice(subset=source.subset, per_task=source.per_task, limit=source.limit)
    tasks = None
    if source.per_task:
        facts = read_facts(shards, progress=rank() == 0)
        if not facts.tasks:
            raise DataError(f"{shards.name}: per_task is set and no sample names its task in meta.task; take it out")
        tasks = facts.task
    return choose(shards.name, len(shards), choice, seed=seed, tasks=tasks)


def _as_asked(shards: ShardSet, data: Data, *, seed: int) -> ShardSet | ControlledSet | FewerFrames:
    """The set as the stage sees it: with a control, and with fewer frames."""
    changed = _controlled(shards, data, seed=seed)
    return changed if data.frames is None else FewerFrames(changed, data.frames)


def _controlled(shards: ShardSet, data: Data, *, seed: int) -> ShardSet | ControlledSet:
    if data.control == "none":
        return shards
    changed = ControlledSet(shards, data.control, seed=seed, progress=rank() == 0)
    if changed.alone:
        logger.warning(
            "%s: %d samples have no partner to change with and stay as they are (control: %s)",
            shards.name,
            changed.alone,
            data.control,
        )
    return changed


def _draws(data: Data, counts: Sequence[int]) -> list[int]:
    """Samples drawn from each source in one epoch; ``counts`` take part."""
    if data.samples_per_epoch is None:
        return [
            draws_per_epoch(count, epochs=source.epochs, samples=source.samples)
            for count, source in zip(counts, data.mix, strict=True)
        ]
    if data.sampling == "sqrt":
        return draws_by_root(counts, data.samples_per_epoch)
    return draws_by_weight([source.weight or 0.0 for source in data.mix], data.samples_per_epoch)


def open_shards(source: Source, data: Data, *, beside: Path | None) -> ShardSet:
    """The shards that an entry of a mixture means; ``beside`` is the run file. Raises DataError and ConfigError."""
    where = location(source, beside=beside)
    return open_source(where, cache=Path(data.cache), cache_bytes=round(data.cache_gb * 1e9))


def location(source: Source, *, beside: Path | None) -> str | Path:
    """Where the shards of an entry of a mixture are. Raises ConfigError."""
    if source.shards is not None:
        return source.shards
    assert source.recipe is not None, "the schema asks for one of the two"
    return load_recipe(source.recipe, beside=beside).directory


def lengths_of(shards: TextSet, stage: Stage, encode: Encode) -> LengthTable:
    """The lengths of a set for the rows of a stage; what was left out is logged. Raises DataError."""
    fingerprint = encode.fingerprint()
    table = measure_lengths(
        shards, encode.measure, fingerprint=fingerprint, max_skipped=stage.data.max_skipped, progress=rank() == 0
    )
    for sample in table.refused[:10]:
        logger.warning("left out: %s", sample)
    fitted, over = fit(
        table,
        shards,
        encode.measure,
        fingerprint=fingerprint,
        length=stage.batch.length,
        tiles_per_row=stage.batch.images_per_row,
        too_long=stage.data.too_long,
    )
    if over:
        logger.warning(
            "%s: %d of %d samples are longer than %d tokens or %d tiles (too_long: %s)",
            shards.name,
            over,
            len(shards),
            stage.batch.length,
            stage.batch.images_per_row,
            stage.data.too_long,
        )
    return fitted


def summaries(config: RunConfig, stages: Sequence[str], *, ranks: int) -> Iterator[Table]:
    """A table for each stage: what it will read, for rich to print. Raises DataError and ConfigError."""
    from mmit.models import read_outline

    loaded = read_outline(config.model)
    for name in stages:
        stage = config.stages[name]
        plan = plan_stage(config, stage, make_encode(stage.data, loaded))
        table = summary_table(
            summarize(
                plan,
                length=stage.batch.length,
                world=max(1, ranks // stage.parallel.sequence),
                rows_per_micro_batch=stage.batch.rows_per_micro_batch,
            )
        )
        table.title = f"stage {name}: {table.title}"
        yield table
