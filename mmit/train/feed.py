"""What a stage reads: from the run file's words to sources, lengths, a plan and a loader."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path

import torch
from rich.table import Table
from transformers import PreTrainedTokenizerBase

from mmit.batch import Encoded
from mmit.config import Data, RunConfig, Source, Stage
from mmit.conversation import Conversation
from mmit.data import (
    BadSample,
    LengthTable,
    Loader,
    Plan,
    ShardSet,
    draws_per_epoch,
    fit,
    load_recipe,
    make_plan,
    measure_lengths,
    open_source,
)
from mmit.data.summary import summarize, summary_table
from mmit.distributed import logger, rank, world_size
from mmit.encoding import Style, encode_conversation
from mmit.images import ImageSpec
from mmit.models import LoadedModel
from mmit.templates import ChatTemplate


@dataclass(frozen=True)
class Encode:
    """Makes a conversation ready for the model; goes to the loader's processes as it is."""

    template: ChatTemplate
    tokenizer: PreTrainedTokenizerBase
    spec: ImageSpec
    image_id: int
    style: Style

    def __call__(self, conversation: Conversation) -> Encoded:
        """Ids, labels and pixels. Raises DataError."""
        return self._encode(conversation, pixels=True)

    def measure(self, conversation: Conversation) -> tuple[int, int]:
        """Tokens and trained tokens, without decoding an image. Raises DataError."""
        encoded = self._encode(conversation, pixels=False)
        return encoded.length, encoded.trained_tokens

    def _encode(self, conversation: Conversation, *, pixels: bool) -> Encoded:
        return encode_conversation(
            conversation,
            template=self.template,
            tokenizer=self.tokenizer,
            spec=self.spec,
            image_id=self.image_id,
            style=self.style,
            pixels=pixels,
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

    def loader(self, *, start_step: int) -> Loader:
        """This rank's batches from ``start_step`` on."""
        return Loader(
            self.plan,
            self.encode,
            rank=rank(),
            world=world_size(),
            rows_per_micro_batch=self.stage.batch.rows_per_micro_batch,
            workers=self.stage.data.workers,
            pad_id=self.pad_id,
            image_size=self.encode.spec.size,
            start_step=start_step,
            max_skipped=self.stage.data.max_skipped,
            on_missing_shard=self.stage.data.on_missing_shard,
        )


class SkippedRecord:
    """The broken samples of this rank, one JSON line each in ``skipped-rankN.jsonl``; rank 0 also logs them."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / f"skipped-rank{rank()}.jsonl"

    def note(self, skipped: Sequence[BadSample], *, step: int) -> None:
        """Write down what was left out of a step."""
        if not skipped:
            return
        with self._path.open("a", encoding="utf-8") as file:
            for sample in skipped:
                logger.warning("skipped: %s", sample)
                file.write(json.dumps({"step": step, **asdict(sample)}) + "\n")


def make_encode(data: Data, loaded: LoadedModel) -> Encode:
    """How the samples of a stage are encoded for ``loaded``."""
    template = loaded.template
    if data.template != "model":
        template = ChatTemplate.load(data.template, loaded.tokenizer)
    return Encode(template, loaded.tokenizer, loaded.model.spec, loaded.image_id, loaded.style)


def make_feed(config: RunConfig, stage: Stage, loaded: LoadedModel) -> Feed:
    """The plan of a stage, from the lengths of all its samples; the same on every rank.

    Raises DataError and ConfigError for what is wrong with the data or the recipe.
    """
    encode = make_encode(stage.data, loaded)
    return Feed(plan_stage(config, stage, encode), encode, stage, loaded.pad_id)


def plan_stage(config: RunConfig, stage: Stage, encode: Encode) -> Plan:
    """The plan alone. Raises DataError and ConfigError."""
    batch = stage.batch
    sets = [open_shards(source, stage.data, beside=config.file) for source in stage.data.mix]
    tables = [_lengths(shards, stage, encode) for shards in sets]
    draws = [
        (shards, draws_per_epoch(len(shards), epochs=source.epochs, samples=source.samples))
        for shards, source in zip(sets, stage.data.mix, strict=True)
    ]
    return make_plan(
        draws,
        tables,
        length=batch.length,
        rows_per_step=batch.rows_per_step,
        packing=batch.packing,
        images_per_row=batch.images_per_row,
        seed=config.seed,
        epochs=stage.epochs,
        max_steps=stage.max_steps,
    )


def open_shards(source: Source, data: Data, *, beside: Path | None) -> ShardSet:
    """The shards that an entry of a mixture means; ``beside`` is the run file. Raises DataError and ConfigError."""
    where: str | Path
    if source.shards is not None:
        where = source.shards
    else:
        assert source.recipe is not None, "the schema asks for one of the two"
        where = load_recipe(source.recipe, beside=beside).directory
    return open_source(where, cache=Path(data.cache), cache_bytes=round(data.cache_gb * 1e9))


def _lengths(shards: ShardSet, stage: Stage, encode: Encode) -> LengthTable:
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
        images_per_row=stage.batch.images_per_row,
        too_long=stage.data.too_long,
    )
    if over:
        logger.warning(
            "%s: %d of %d samples are longer than %d tokens or %d images (too_long: %s)",
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
    from mmit.models import build_model

    loaded = build_model(config.model, dtype=torch.float32, seed=config.seed)
    for name in stages:
        stage = config.stages[name]
        plan = plan_stage(config, stage, make_encode(stage.data, loaded))
        table = summary_table(summarize(plan, length=stage.batch.length, world=ranks))
        table.title = f"stage {name}: {table.title}"
        yield table
