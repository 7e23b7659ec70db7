"""The ``data`` and ``batch`` sections of a stage: what it reads, and how samples fill rows and steps."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from mmit.config.sections import MANY, Count, Fraction, Section

SUBSET = re.compile(r"all|(first|last|random) +(\d+(?:\.\d+)?%|\d+)")
"""``first 10%``, ``last 500``, ``random 1%``: which end, and how many or what share."""


class Source(Section):
    """One data set of a mixture: ``recipe`` or ``shards``, and ``epochs``, ``samples`` or ``weight``."""

    recipe: str | None = None
    """Name of a file in data_recipes/, or the path of one."""
    shards: str | None = None
    """Directory of shards (or of any webdataset tars)."""
    epochs: Annotated[float, Field(gt=0, le=MANY)] = 1.0
    """How often each sample is seen in one epoch of the stage; 0.5 is every second one."""
    samples: Annotated[int, Field(ge=1, le=10**9)] | None = None
    """Instead of ``epochs``: how many samples are drawn in one epoch of the stage."""
    weight: PositiveFloat | None = None
    """Instead of ``epochs``: share of ``data.samples_per_epoch``; all sources of the mixture have one, or none."""
    subset: str = "all"
    """Which samples take part: ``all``, ``first 10%``, ``last 500``, ``random 1%``. First and last go by the order of
    the shards. A random subset lies within every larger one of the same data set and seed."""
    per_task: Annotated[int, Field(ge=0)] = 0
    """Most samples of each task (``meta.task``) that take part, chosen at random from the subset; 0 is no cap."""
    limit: Annotated[int, Field(ge=0)] = 0
    """Most samples that take part, chosen at random from what is left; 0 is no limit."""

    @model_validator(mode="after")
    def _one_of_each(self) -> Source:
        if (self.recipe is None) == (self.shards is None):
            raise ValueError("give exactly one of 'recipe' and 'shards'")
        if (self.epochs != 1.0) + (self.samples is not None) + (self.weight is not None) > 1:
            raise ValueError("give only one of 'epochs', 'samples' and 'weight'")
        return self

    @field_validator("subset")
    @classmethod
    def _is_a_subset(cls, subset: str) -> str:
        match = SUBSET.fullmatch(subset)
        number = match and match[2]
        if not match or (number and not 0 < float(number.rstrip("%")) <= (100 if "%" in number else float("inf"))):
            raise ValueError(f"'{subset}' is none of all, first N, last N, random N, with N a number or a share as 10%")
        return subset


class Data(Section):
    """What a stage reads."""

    mix: Annotated[list[Source], Field(min_length=1)]
    """The data sets, interleaved evenly."""
    samples_per_epoch: PositiveInt | None = None
    """Samples in one epoch of the stage, shared out by weights or by ``sampling: sqrt``."""
    sampling: Literal["given", "sqrt"] = "given"
    """``given``: as each source says. ``sqrt``: ``samples_per_epoch`` by the square root of the sources' sizes
    (InstructBLIP, arXiv 2305.06500)."""
    batches: Literal["mixed", "pure", "paired"] = "mixed"
    """``mixed``: as samples come. ``pure``: a step holds rows of samples with images, or rows of text alone.
    ``paired``: every step holds rows of both (MultiModal-GPT, arXiv 2305.04790)."""
    text_share: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Of ``paired``: share of a step's rows that are text alone; the kind that ends first begins anew. 0 spreads both
    kinds evenly, so that nothing is repeated."""
    control: Literal["none", "blank_image", "shuffle_image", "blank_instruction", "shuffle_answer"] = "none"
    """A control run: this part of every sample is blank, or is another sample's of the same source."""
    template: str = "model"
    """Chat template of this stage: ``model`` for the model's own, or as in ``language_model.template``."""
    frames: PositiveInt | None = None
    """Most frames of a video, spread evenly over those in the shard; null takes all of them."""
    too_long: Literal["error", "drop", "drop_turns"] = "error"
    """A sample longer than a row: stop, leave it out (counted), or leave out whole turns from its end."""
    max_skipped: Fraction = 0.001
    """Share of broken samples that is tolerated (each is logged) before the run stops."""
    workers: Annotated[int, Field(ge=0)] = 2
    """Loader processes per rank; 0 loads in the training process."""
    on_missing_shard: Literal["error", "skip"] = "error"
    """A shard that is gone or cut off during training, after several attempts: stop, or leave its samples out, each
    counted as a broken one."""
    cache: str = "~/.cache/mmit"
    """Folder for shards from a URL (and for what cannot be written beside the shards)."""
    cache_gb: PositiveFloat = 100.0
    """Most gigabytes (10^9 bytes) of shards from URLs in ``cache``; the least recently used make room."""
    features: str = "none"
    """Folder with the outputs of the frozen encoder (made by ``mmit data cache``), which are read in place of the
    pictures; the encoder is not loaded then. ``none``: pictures pass the encoder."""
    missing_features: Literal["error", "compute"] = "error"
    """Where the folder lacks pictures of the stage: stop, or make their features before the first step."""

    @model_validator(mode="after")
    def _draws_are_stated_once(self) -> Data:
        weights = [source.weight is not None for source in self.mix]
        if any(weights) and not all(weights):
            raise ValueError("some sources of 'mix' have a weight and some do not; give all of them one, or none")
        if self.sampling == "sqrt" and any(
            source.weight is not None or source.samples is not None or source.epochs != 1.0 for source in self.mix
        ):
            raise ValueError("sampling: sqrt decides the draws; take 'epochs', 'samples' and 'weight' out of 'mix'")
        shared = any(weights) or self.sampling == "sqrt"
        if shared and self.samples_per_epoch is None:
            raise ValueError("weights and sampling: sqrt share out 'samples_per_epoch', which is missing")
        if not shared and self.samples_per_epoch is not None:
            raise ValueError("'samples_per_epoch' is shared out by weights or by sampling: sqrt, and there are none")
        if self.text_share and self.batches != "paired":
            raise ValueError("'text_share' belongs to batches: paired")
        return self


class Batching(Section):
    """How samples fill rows, and rows fill a step. Accumulation is derived from these and the number of ranks."""

    length: Count
    """Tokens of a row, image tokens included; samples are packed into rows whole."""
    tokens_per_step: Count
    """Tokens of an optimizer step over all ranks: a multiple of ``length``. ``160k`` is 160 x 1024."""
    rows_per_micro_batch: PositiveInt = 1
    """Rows that pass the model at a time on one rank."""
    packing: bool = True
    """False: one sample in a row, padded to the longest of the micro-batch."""
    images_per_row: PositiveInt = 64
    """Most images in one row; one that ``model.tiling`` cuts counts as many times as it has tiles."""

    @property
    def rows_per_step(self) -> int:
        """Rows of an optimizer step over all ranks."""
        return self.tokens_per_step // self.length

    @model_validator(mode="after")
    def _whole_rows(self) -> Batching:
        rows, rest = divmod(self.tokens_per_step, self.length)
        if rest:
            below, above = rows * self.length, (rows + 1) * self.length
            near = f"{below} or {above}" if below else str(above)
            raise ValueError(
                f"tokens_per_step {self.tokens_per_step} = {rows} rows x length {self.length} "
                f"+ {rest} left over; take {near}"
            )
        if rows % self.rows_per_micro_batch:
            raise ValueError(
                f"tokens_per_step {self.tokens_per_step} / length {self.length} = {rows} rows per step, "
                f"which rows_per_micro_batch {self.rows_per_micro_batch} does not divide"
            )
        return self
