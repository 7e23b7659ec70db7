"""The schema of a run file: one YAML is one run.

Every model is frozen and refuses unknown keys; ``mmit.config_file`` reads the YAML, applies ``a.b=c`` overrides and
turns all mistakes of a file into one message. A config builds nothing: components take plain values.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    PositiveFloat,
    PositiveInt,
    PrivateAttr,
    Tag,
    field_validator,
    model_validator,
)

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_COUNT = re.compile(r"(\d+)\s*([kKmM]?)")


def parse_count(value: object) -> object:
    """``"160k"`` -> 163840: k is 1024 and m is 1024 squared, as in context lengths."""
    if isinstance(value, str) and (match := _COUNT.fullmatch(value.strip())):
        return int(match[1]) * {"": 1, "k": 1024, "m": 1024 * 1024}[match[2].lower()]
    return value


MANY = 10_000
"""Most epochs; a typing mistake beyond it would plan for ever."""

Count = Annotated[PositiveInt, BeforeValidator(parse_count)]
Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]


class Section(BaseModel):
    """What all sections share: frozen, no unknown keys, docstrings under fields are their documentation."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _true_is_no_number(cls, content: object) -> object:
        """YAML's yes, no, true and false would pass as 1 and 0."""
        if isinstance(content, dict):
            for name, field in cls.model_fields.items():
                if isinstance(content.get(name), bool) and field.annotation in (int, float):
                    raise ValueError(f"{name}: {str(content[name]).lower()} is no number")
        return content


# ------------------------------------------------------------------------------------------------ model


class TransformersEncoder(Section):
    """A CLIP or SigLIP tower read by transformers."""

    type: Literal["transformers"] = "transformers"
    path: str
    """Directory or hub name of a CLIP or SigLIP model."""
    layer: int = -2
    """Hidden state to take, counted as in transformers: -1 the last layer, -2 the one before it, 0 the embeddings."""
    cls: Literal["drop", "keep"] = "drop"
    """What becomes of the class token (SigLIP has none)."""
    resize: Literal["pad", "squash", "crop"] = "pad"
    """How a picture becomes square: padded with the mean colour, squashed, or cropped at the centre."""
    exact_resize: bool = False
    """True: resize with Pillow, bit for bit as LLaVA does; False: the faster route, at most two grey levels off."""


class OpenClipEncoder(Section):
    """A vision transformer read by open_clip."""

    type: Literal["open_clip"]
    name: str
    """open_clip's model name, such as ``ViT-L-14-336``, or a JSON file with a model configuration."""
    pretrained: str
    """open_clip's tag, such as ``openai``, or a weight file."""
    layer: int = -2
    """Hidden state to take, counted as in transformers: -1 the last layer, -2 the one before it."""
    cls: Literal["drop", "keep"] = "drop"
    """What becomes of the class token."""
    resize: Literal["pad", "squash", "crop"] = "pad"
    """How a picture becomes square: padded with the mean colour, squashed, or cropped at the centre."""
    exact_resize: bool = False
    """True: resize with Pillow, bit for bit as LLaVA does; False: the faster route, at most two grey levels off."""


class CustomPart(Section):
    """An encoder or connector of one's own: ``type: package.module:Class``."""

    type: str
    args: dict[str, Any] = {}
    """Keyword arguments of the class."""


class LinearConnector(Section):
    """One linear layer (LLaVA 1.0, arXiv 2304.08485)."""

    type: Literal["linear"]


class MlpConnector(Section):
    """Linear layers with GELU between them (LLaVA 1.5, arXiv 2310.03744, uses two)."""

    type: Literal["mlp"] = "mlp"
    depth: Annotated[int, Field(ge=2, le=8)] = 2
    """Number of linear layers."""


def _kind(value: object) -> str:
    kind = value.get("type", "") if isinstance(value, dict) else getattr(value, "type", "")
    return "custom" if isinstance(kind, str) and ":" in kind else str(kind)


Encoder = Annotated[
    Annotated[TransformersEncoder, Tag("transformers")]
    | Annotated[OpenClipEncoder, Tag("open_clip")]
    | Annotated[CustomPart, Tag("custom")],
    Discriminator(
        _kind,
        custom_error_type="unknown_type",
        custom_error_message="'type' must be one of transformers, open_clip, or package.module:Class",
    ),
]
Connector = Annotated[
    Annotated[LinearConnector, Tag("linear")]
    | Annotated[MlpConnector, Tag("mlp")]
    | Annotated[CustomPart, Tag("custom")],
    Discriminator(
        _kind,
        custom_error_type="unknown_type",
        custom_error_message="'type' must be one of linear, mlp, or package.module:Class",
    ),
]


class LanguageModel(Section):
    """The causal language model."""

    path: str
    """Directory or hub name, anything that ``AutoModelForCausalLM`` builds."""
    template: str = "own"
    """Chat template: ``own`` (the tokenizer's), a ``.jinja`` file, or a built-in name such as ``vicuna``."""
    text_style: Literal["hf", "llava"] = "hf"
    """How text around images is tokenized: in one piece (``hf``), or each piece on its own as in LLaVA's code."""


class ComposedModel(Section):
    """A model composed of parts; the connector starts fresh."""

    encoder: Encoder
    connector: Connector = MlpConnector()
    language_model: LanguageModel


class WholeModel(Section):
    """A model that exists: written by mmit, or a LLaVA directory in the layout of transformers."""

    path: str
    """The model directory, or a run's stage folder."""
    template: str = "own"
    """Chat template: ``own`` (the one the directory carries), a ``.jinja`` file, or a built-in name."""


Model = Annotated[
    Annotated[ComposedModel, Tag("parts")] | Annotated[WholeModel, Tag("whole")],
    Discriminator(
        lambda v: "whole" if ("path" in v if isinstance(v, dict) else isinstance(v, WholeModel)) else "parts"
    ),
]


# ------------------------------------------------------------------------------------------------ data


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
    """Most images in one row."""

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


# ------------------------------------------------------------------------------------------------ training


class Optim(Section):
    """AdamW and its schedule."""

    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """How the learning rate falls after the warm-up."""
    warmup_fraction: Fraction = 0.03
    """Share of the steps in which the learning rate rises linearly from 0."""
    min_lr_fraction: Fraction = 0.0
    """Where the schedule ends, as a share of the peak."""
    weight_decay: Annotated[float, Field(ge=0.0)] = 0.0
    """Applied to matrices only; biases, norms and embeddings are left out."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    clip_norm: Annotated[float, Field(ge=0.0)] = 1.0
    """Largest norm of the gradient over all trained parameters; 0 does not clip."""


class Zero(Section):
    """DeepSpeed ZeRO (arXiv 1910.02054)."""

    stage: Annotated[int, Field(ge=0, le=3)] = 2
    """What is partitioned over the ranks: 0 nothing, 1 optimizer state, 2 gradients too, 3 parameters too."""
    offload_optimizer: Literal["none", "cpu"] = "none"
    """Where the optimizer state lives and is updated."""
    extra: dict[str, Any] = {}
    """Merged last into DeepSpeed's dictionary; keys that mmit sets itself are refused."""


class Save(Section):
    """Checkpoints of a stage."""

    every_steps: PositiveInt = 500
    """Steps between checkpoints."""
    keep_last: PositiveInt = 2
    """Complete checkpoints that are kept; older ones are removed."""


class Log(Section):
    """What is written while training."""

    every_steps: PositiveInt = 1
    """Steps between lines of the log; metrics.jsonl holds every step."""
    by_source: bool = False
    """Also write the loss of each source of the mixture, as ``loss_by_source``."""
    tensorboard: bool = False
    """Also write event files (needs the extra ``track``)."""


class Stage(Section):
    """One stage of training."""

    init_from: str = "parts"
    """Where the weights come from: ``parts`` (the ``model`` section), a stage of this file, or a model directory."""
    train: Annotated[dict[str, Annotated[float, Field(ge=0.0)]], Field(min_length=1)]
    """What is trained: part name (connector, language_model, vision_tower) or regular expression -> peak learning rate.
    Later rules win; 0 freezes."""
    data: Data
    batch: Batching
    epochs: Annotated[int, Field(ge=1, le=MANY)] = 1
    """Passes over the mixture."""
    max_steps: PositiveInt | None = None
    """End earlier; the schedule is that of the shorter run."""
    optim: Optim = Optim()
    zero: Zero = Zero()
    activation_checkpointing: bool = False
    """Recompute activations in the backward pass: less memory, 20 to 25 percent more time."""
    save: Save = Save()
    log: Log = Log()

    @field_validator("train")
    @classmethod
    def _patterns_compile(cls, rules: dict[str, float]) -> dict[str, float]:
        for pattern in rules:
            try:
                re.compile(pattern)
            except re.error as error:
                raise ValueError(f"'{pattern}' is no regular expression: {error}") from None
        if not any(rules.values()):
            raise ValueError("every learning rate is 0: nothing would be trained")
        return rules


class Launch(Section):
    """How ``mmit train`` starts the ranks."""

    cpu_ranks: PositiveInt = 1
    """Ranks where there is no accelerator; with accelerators there is one for each."""
    threads_per_rank: Annotated[int, Field(ge=0)] = 0
    """CPU threads of each rank; 0 is cores / ranks."""


class RunConfig(Section):
    """A whole run."""

    name: str
    """Name of the run; letters, digits, '.', '_' and '-'."""
    output: str = "runs/{name}"
    """Folder of the run, ``{name}`` being its name; one folder per stage inside."""
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    """``auto`` is bf16 on an accelerator and fp32 on CPU."""
    model: Model
    stages: Annotated[dict[str, Stage], Field(min_length=1)]
    """Trained in this order."""
    launch: Launch = Launch()

    @field_validator("name")
    @classmethod
    def _is_a_file_name(cls, name: str) -> str:
        if not NAME.fullmatch(name):
            raise ValueError("only letters, digits, '.', '_' and '-', since it names a folder")
        return name

    @field_validator("stages")
    @classmethod
    def _stage_names(cls, stages: dict[str, Stage]) -> dict[str, Stage]:
        for name in stages:
            if not NAME.fullmatch(name) or name == "parts":
                raise ValueError(f"'{name}' cannot name a stage: letters, digits, '.', '_' and '-', and not 'parts'")
        return stages

    @model_validator(mode="after")
    def _stages_start_from_earlier_ones(self) -> RunConfig:
        names = list(self.stages)
        for name, stage in self.stages.items():
            if stage.init_from in names and names.index(stage.init_from) >= names.index(name):
                raise ValueError(f"stages.{name}.init_from: '{stage.init_from}' is not a stage before it")
        return self

    _file: Path | None = PrivateAttr(default=None)

    @property
    def file(self) -> Path | None:
        """The file that this was read from; recipes are also looked for beside it."""
        return self._file

    def read_from(self, file: Path) -> RunConfig:
        """The same config, knowing its file."""
        self._file = file
        return self

    @property
    def folder(self) -> Path:
        """The folder of the run."""
        return Path(self.output.replace("{name}", self.name))

    def stage_folder(self, stage: str) -> Path:
        """The folder of one stage."""
        return self.folder / stage


def load_config(path: str | Path, overrides: list[str] | None = None) -> RunConfig:
    """The checked run file at ``path`` with ``a.b=c`` overrides applied.

    Raises ConfigError with every mistake of the file, each with its path.
    """
    from mmit.config_file import read

    return read(Path(path), overrides or [])
