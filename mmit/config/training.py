"""One stage of training, and the launch."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Annotated, Any, Literal

from pydantic import (
    Field,
    PositiveFloat,
    PositiveInt,
    field_validator,
    model_validator,
)

from mmit.config.data import Batching, Data
from mmit.config.insight import Evaluate, Log, Spike
from mmit.config.sections import MANY, BelowOne, Fraction, Section


def check_patterns(patterns: Iterable[str]) -> None:
    """Raise ValueError for the first that is no regular expression."""
    for pattern in patterns:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"'{pattern}' is no regular expression: {error}") from None


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

    stage: Annotated[int, Field(ge=0, le=3)] | Literal["auto"] = "auto"
    """What is partitioned over the ranks: 0 nothing, 1 optimizer state, 2 gradients too, 3 parameters too. ``auto``
    takes the lowest that leaves room in the memory of a rank, and says why."""
    offload_optimizer: Literal["none", "cpu", "nvme"] = "none"
    """Where the optimizer state lives: ``cpu`` memory (stages 1 to 3), or files below ``nvme_path`` (stage 3; ZeRO-
    Infinity, arXiv 2104.07857). It is updated on the CPU."""
    offload_parameters: Literal["none", "cpu"] = "none"
    """Where parameters lie while they are not used (stage 3)."""
    nvme_path: str | None = None
    """A folder on a local disk for what is offloaded to ``nvme``; it is empty again after the stage."""
    extra: dict[str, Any] = Field(default_factory=dict)
    """Merged last into DeepSpeed's dictionary; keys that mmit sets itself are refused."""

    @field_validator("offload_parameters", mode="before")
    @classmethod
    def _parameters_stay_in_memory(cls, place: object) -> object:
        if place == "nvme":
            raise ValueError(
                "parameters are not offloaded to nvme, where DeepSpeed empties their folder each time that a part of "
                "the model is partitioned; take cpu"
            )
        return place

    @model_validator(mode="after")
    def _what_moves_is_partitioned(self) -> Zero:
        if self.offload_optimizer == "cpu" and self.stage == 0:
            raise ValueError("offload_optimizer: cpu needs stage 1, 2 or 3; stage 0 partitions nothing to be moved")
        if self.offload_optimizer == "nvme" and self.stage not in (3, "auto"):
            raise ValueError("offload_optimizer: nvme needs stage 3")
        if self.offload_parameters != "none" and self.stage not in (3, "auto"):
            raise ValueError(f"offload_parameters: {self.offload_parameters} needs stage 3")
        uses_disk = self.offload_optimizer == "nvme"
        if uses_disk and self.nvme_path is None:
            raise ValueError("nvme_path: offloading to nvme needs a folder on a local disk")
        if self.nvme_path is not None and not uses_disk:
            raise ValueError("nvme_path: nothing is offloaded to it; set offload_optimizer: nvme")
        return self

    @property
    def number(self) -> int:
        """The stage, once it is chosen."""
        assert self.stage != "auto", "mmit.train.zero_choice puts a number in its place"
        return self.stage


class Parallel(Section):
    """What several ranks do together beside ZeRO."""

    sequence: PositiveInt = 1
    """So many ranks share each row, for rows that do not fit one (DeepSpeed-Ulysses, arXiv 2309.14509): everything but
    attention runs on a part of the row, attention on a part of the heads. It divides the ranks, and the heads."""


class Save(Section):
    """Checkpoints of a stage."""

    every_steps: PositiveInt = 500
    """Steps between checkpoints."""
    keep_last: PositiveInt = 2
    """Complete checkpoints that are kept; older ones are removed."""
    keep_best: bool = False
    """Also save where the held-out loss (``evaluate``) is lower than ever before, and keep that checkpoint."""
    background: bool | Literal["auto"] = "auto"
    """Copy weights and moments in the step, and write the copy while the next steps run. ``auto``: where the hosts have
    twice the memory free that the copies take; else all is written in the step."""


class Lora(Section):
    """Low-rank adapters (LoRA, arXiv 2106.09685) beside weights that stay; trained by the rule ``lora``."""

    rank: Annotated[int, Field(ge=1, le=2**16)] = 64
    """Width of the adapters."""
    alpha: PositiveInt = 128
    """What an adapter gives is multiplied by alpha / rank."""
    dropout: BelowOne = 0.0
    """Share of an adapter's inputs that is set to 0 while training."""
    targets: Annotated[tuple[str, ...], Field(min_length=1)] = ("language_model",)
    """Which linear layers: part names (language_model is all of it but the head), or regular expressions over names."""
    dora: bool = False
    """Also train the length of each row of an adapted weight (DoRA, arXiv 2402.09353)."""
    rslora: bool = False
    """Multiply by alpha / sqrt(rank) instead (rsLoRA, arXiv 2312.03732)."""
    quantize: Literal["none", "nf4"] = "none"
    """``nf4`` keeps the linear layers of the language model in four bits while training (QLoRA, arXiv 2305.14314; needs
    the extra ``qlora``)."""

    @field_validator("targets")
    @classmethod
    def _expressions_compile(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        check_patterns(targets)
        return targets


class Stage(Section):
    """One stage of training."""

    init_from: str = "parts"
    """Where the weights come from: ``parts`` (the ``model`` section), a stage of this file, or a model directory."""
    train: Annotated[dict[str, Annotated[float, Field(ge=0.0)]], Field(min_length=1)]
    """What is trained: part name (connector, language_model, vision_tower, lora), layers of a part
    (``vision_tower.layers.12-``, ``language_model.layers.0-3``) or regular expression -> peak learning rate. Later
    rules win; 0 freezes."""
    lora: Lora | None = None
    """Adapters that are trained in this stage; ``train`` needs the rule ``lora``."""
    data: Data
    batch: Batching
    epochs: Annotated[int, Field(ge=1, le=MANY)] = 1
    """Passes over the mixture."""
    max_steps: PositiveInt | None = None
    """End earlier; the schedule is that of the shorter run."""
    optim: Optim = Optim()
    zero: Zero = Zero()
    parallel: Parallel = Parallel()
    attention: Literal["auto", "mmit_packed", "sdpa", "eager", "flash_attention_2", "flex_attention"] = "auto"
    """How the language model attends: ``auto`` takes what keeps packed samples apart without a mask of T x T, where
    the model can; the others are transformers' implementations. What cannot run is refused."""
    kernels: Literal["auto", "torch", "liger"] = "auto"
    """What norms, gated feed-forward parts and rotary positions of the language model run with: ``auto`` takes Liger's
    kernels (the extra ``gpu``) on GPUs where they know the model and give its states, else torch's."""
    activation_checkpointing: bool | Literal["auto"] | Annotated[int, Field(ge=1, le=MANY)] = False
    """Recompute activations in the backward pass: less memory, 20 to 25 percent more time. A number k recomputes every
    k-th layer of the language model only, which costs and spares the k-th part. ``auto`` recomputes no more than the
    memory of a rank asks for: nothing, every fourth, every second, or every layer."""
    compile: bool = False
    """Let torch compile the layers of the language model but the last (ZeRO 0 to 2): the first step takes longer, the
    others less. Same numbers up to rounding."""
    save: Save = Save()
    log: Log = Log()
    evaluate: Evaluate | None = None
    """Measure the loss on held-out samples while training."""
    spike: Spike | None = None
    """What to do with a step whose loss jumps; without it nothing is judged."""

    @property
    def recompute(self) -> int:
        """Which layers recompute their activations, once it is chosen: none (0), all (1), every k-th (k)."""
        assert self.activation_checkpointing != "auto", "mmit.train.zero_choice puts a number in its place"
        return int(self.activation_checkpointing)

    @field_validator("train")
    @classmethod
    def _patterns_compile(cls, rules: dict[str, float]) -> dict[str, float]:
        check_patterns(rules)
        if not any(rules.values()):
            raise ValueError("every learning rate is 0: nothing would be trained")
        return rules

    @model_validator(mode="after")
    def _pictures_can_be_measured(self) -> Stage:
        if self.evaluate is not None and self.data.features != "none":
            raise ValueError("evaluate: held-out pictures need the encoder, which data.features leaves out; drop one")
        return self

    @model_validator(mode="after")
    def _the_best_is_known(self) -> Stage:
        if self.save.keep_best and self.evaluate is None:
            raise ValueError("save.keep_best: the best is told by held-out samples; add 'evaluate', or take it out")
        return self

    @model_validator(mode="after")
    def _what_is_compiled_is_whole(self) -> Stage:
        if self.compile and self.zero.stage == 3:
            raise ValueError("compile: layers that zero.stage 3 partitions are not compiled; take 0, 1 or 2")
        if self.compile and self.lora is not None and self.lora.quantize == "nf4":
            raise ValueError("compile: weights in four bits (lora.quantize) are not compiled; set it to false")
        if self.compile and self.parallel.sequence > 1:
            raise ValueError("compile: layers whose rows are shared (parallel.sequence) are not compiled; drop one")
        if self.compile and self.kernels == "liger":
            raise ValueError("compile: layers with Liger's kernels (kernels: liger) are not compiled; drop one")
        return self

    @model_validator(mode="after")
    def _adapters_train(self) -> Stage:
        has_rule = any(lr > 0 and (rule == "lora" or "lora_" in rule) for rule, lr in self.train.items())
        if self.lora is not None and not has_rule:
            raise ValueError("lora: needs a learning rate above 0, as in train: {lora: 2e-4}")
        if self.lora is None and "lora" in self.train:
            raise ValueError("train: the rule 'lora' needs the section 'lora' of the stage")
        if self.lora is not None and self.lora.quantize == "nf4":
            if self.zero.stage == 3:
                raise ValueError("lora.quantize: nf4 cannot be partitioned by zero.stage 3; take 0, 1 or 2")
            whole = ("language_model", "language_model.layers")
            if rule := next((rule for rule, lr in self.train.items() if lr and rule.startswith(whole)), None):
                raise ValueError(f"lora.quantize: weights in four bits cannot be trained by the rule '{rule}'")
        return self


class Launch(Section):
    """How ``mmit train`` starts the ranks."""

    cpu_ranks: PositiveInt = 1
    """Ranks where there is no accelerator; with accelerators there is one for each."""
    threads_per_rank: Annotated[int, Field(ge=0)] = 0
    """CPU threads of each rank; 0 is cores / ranks."""
    stall_seconds: Annotated[float, Field(ge=0.0)] = 25.0
    """A rank that reads or computes one thing for longer, and for ten times as long as ever before, ends the run with
    its name; so does one that is silent for so long. 0 waits for ever."""
