"""What a stage needs before it is started: peak memory of a rank for each way to train it, what fits, and the time.

Nothing is read but configurations and headers: the model stands on the meta device (see ``mmit.models.activations``)
and what DeepSpeed adds is counted (``zero_memory``). ``mmit plan`` prints it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch

from mmit.config import RunConfig, Stage
from mmit.models import LoadedModel, begin_adapter, build_model
from mmit.models.absent import AbsentTower
from mmit.models.activations import ActivationPeak, RowLoad, activation_peak, likely_last_layer, worst_batch
from mmit.models.four_bits import packed_sizes
from mmit.models.placement import SHAPES, placed
from mmit.train.deepspeed_settings import deepspeed_config
from mmit.train.run_check import check_run, refuse_mistakes
from mmit.train.work import peak
from mmit.train.workload import Workload, workload_of
from mmit.train.zero_memory import RankMemory, Weights, rank_memory, weights_of

FIXED = 2 * 2**30
"""Bytes on a GPU that no tensor holds: the context, the libraries' kernels and workspaces, NCCL's buffers."""

HOLES = 0.05
"""Share of what is allocated that the allocator cannot use, between tensors of many sizes."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What trains. memory: bytes of a device; rate: operations per second of its matrix products; 0 where unknown."""

    ranks: int
    memory: int
    rate: float

    @classmethod
    def given(cls, *, ranks: int | None, gib: float | None, rate: float | None) -> Machine:
        """What is said on the command line, and else what is here."""
        here = torch.accelerator.is_available()
        found = 0
        if gib is None and here:
            found = torch.accelerator.get_memory_info()[1]
        return cls(
            ranks=ranks or (torch.accelerator.device_count() if here else 1),
            memory=found if gib is None else round(gib * 2**30),
            rate=(peak(torch.bfloat16) if here else 0.0) if rate is None else rate * 1e12,
        )


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to train a stage. offload: what lies in the host's memory."""

    zero_stage: int
    offload: str = "none"
    recompute: bool = False

    def __str__(self) -> str:
        told = [f"ZeRO-{self.zero_stage}"]
        told += [] if self.offload == "none" else [f"offload {self.offload}"]
        return " + ".join([*told, "recompute"] if self.recompute else told)

    def apply(self, stage: Stage) -> Stage:
        """The stage, trained this way."""
        zero = stage.zero.model_copy(
            update={
                "stage": self.zero_stage,
                "offload_optimizer": "none" if self.offload == "none" else "cpu",
                "offload_parameters": "cpu" if self.offload == "all" else "none",
                "nvme_path": None,
            }
        )
        return stage.model_copy(update={"zero": zero, "activation_checkpointing": self.recompute})

    def overrides(self, name: str) -> list[str]:
        """What makes a run file's stage train this way, for the command line."""
        told = [f"stages.{name}.zero.stage={self.zero_stage}"]
        told.append(f"stages.{name}.zero.offload_optimizer={'none' if self.offload == 'none' else 'cpu'}")
        told.append(f"stages.{name}.zero.offload_parameters={'cpu' if self.offload == 'all' else 'none'}")
        told.append(f"stages.{name}.activation_checkpointing={str(self.recompute).lower()}")
        return told


PLAIN = tuple(Way(zero_stage=number) for number in range(4))
WAYS = (
    *PLAIN,
    *(replace(way, recompute=True) for way in PLAIN),
    Way(zero_stage=2, offload="optimizer"),
    Way(zero_stage=2, offload="optimizer", recompute=True),
    Way(zero_stage=3, offload="optimizer", recompute=True),
    Way(zero_stage=3, offload="all", recompute=True),
)
"""The cheapest in time first: partitioned weights cost less than recomputing, and that less than offloading."""


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One way: its peak with the run file's rows, and the most tokens of a micro-batch that fit (0: none)."""

    way: Way
    memory: RankMemory
    rest: int
    tokens: int

    @property
    def bytes(self) -> int:
        """The peak on the device, with what no tensor holds."""
        return self.memory.bytes + self.rest


@dataclass(frozen=True, kw_only=True)
class StagePlan:
    """All that ``mmit plan`` tells of a stage.

    activations: of the run file's micro-batch, without and with recomputation.
    """

    name: str
    stage: Stage
    machine: Machine
    weights: Weights
    activations: tuple[ActivationPeak, ActivationPeak]
    choices: tuple[Choice, ...]
    workload: Workload

    @property
    def tokens(self) -> int:
        """Of a micro-batch, as the run file has it."""
        return self.workload.row.tokens * self.stage.batch.rows_per_micro_batch

    @property
    def best(self) -> Choice | None:
        """The first way that fits with the run file's micro-batch; else the one that fits the most tokens."""
        fitting = [choice for choice in self.choices if choice.tokens]
        whole = next((choice for choice in fitting if choice.tokens >= self.tokens), None)
        return whole or max(fitting, key=lambda choice: choice.tokens, default=None)


def plan_run(config: RunConfig, stages: list[str], machine: Machine) -> Iterator[StagePlan]:
    """The plan of each stage. Raises ConfigError with every mistake of the run file."""
    report = check_run(config, data=False)
    refuse_mistakes(report, config.file or config.folder)
    for name in stages:
        yield plan_of(config, name, machine)


def plan_of(config: RunConfig, name: str, machine: Machine) -> StagePlan:
    """The plan of one stage of a run file that has no mistakes."""
    stage = config.stages[name]
    dtype = {"fp32": torch.float32, "fp16": torch.float16}.get(config.precision, torch.bfloat16)
    with placed(SHAPES):
        loaded = _model(config, name, dtype)
        sizes = packed_sizes(loaded.model.language_model) if _is_packed(stage) else {}
        packed = {f"language_model.{weight}": size for weight, size in sizes.items()}
        loaded.model.last_layer = likely_last_layer(loaded.model.language_model)
        groups = loaded.model.train_only(stage.train)
        weights = weights_of(loaded.model, groups, packed=packed)
        work = workload_of(config, name, loaded)
        unpacked = max((loaded.model.get_parameter(weight).nbytes for weight in packed), default=0)
        spans = [
            _Span.measured(loaded, work.row, rows=stage.batch.rows_per_micro_batch, again=again, unpacked=unpacked)
            for again in (False, True)
        ]
    plan = StagePlan(
        name=name,
        stage=stage,
        machine=machine,
        weights=weights,
        activations=(spans[0].whole, spans[1].whole),
        choices=(),
        workload=work,
    )
    ways = [way for way in WAYS if not (_is_packed(stage) and way.zero_stage == 3)]
    return replace(plan, choices=tuple(_choice(plan, way, spans[way.recompute], dtype) for way in ways))


def _is_packed(stage: Stage) -> bool:
    return stage.lora is not None and stage.lora.quantize != "none"


def _model(config: RunConfig, name: str, dtype: torch.dtype) -> LoadedModel:
    stage = config.stages[name]
    loaded = build_model(config.model, dtype=dtype, seed=0, adapter="drop")
    if stage.data.features != "none":
        loaded.model.vision_tower = AbsentTower(loaded.model.vision_tower)
    if stage.lora is not None:
        begin_adapter(loaded.model, stage.lora.model_copy(update={"quantize": "none"}), None, seed=0)
    return loaded


@dataclass(frozen=True, kw_only=True)
class _Span:
    """Activations of a whole micro-batch and of one with half as long rows: a straight line between and beyond."""

    tokens: tuple[int, int]
    half: ActivationPeak
    whole: ActivationPeak

    @classmethod
    def measured(cls, loaded: LoadedModel, row: RowLoad, *, rows: int, again: bool, unpacked: int) -> _Span:
        """On shapes. unpacked: bytes of the largest weight that is made from four bits while it is used."""
        if again:
            loaded.model.enable_activation_checkpointing()
        shorter = RowLoad(
            tokens=-(-row.tokens // 2), trained=row.trained // 2, tiles=row.tiles // 2, samples=-(-row.samples // 2)
        )
        half, whole = (activation_peak(loaded.model, worst_batch(loaded, each, rows=rows)) for each in (shorter, row))
        add = {"unpacked weight": unpacked} if unpacked else {}
        half, whole = (
            ActivationPeak(
                by_part={**peak.by_part, **add}, curve=tuple((left, alive + unpacked) for left, alive in peak.curve)
            )
            for peak in (half, whole)
        )
        return cls(tokens=(shorter.tokens * rows, row.tokens * rows), half=half, whole=whole)

    def at(self, tokens: int) -> ActivationPeak:
        """Of a micro-batch of so many tokens."""
        share = (tokens - self.tokens[0]) / (self.tokens[1] - self.tokens[0])
        curve = tuple(
            (left, max(0, round(half + share * (whole - half))))
            for (left, half), (_, whole) in zip(self.half.curve, self.whole.curve, strict=True)
        )
        return ActivationPeak(by_part={}, curve=curve)


def _choice(plan: StagePlan, way: Way, span: _Span, dtype: torch.dtype) -> Choice:
    stage = way.apply(plan.stage)
    rows = stage.batch.rows_per_micro_batch
    micro = -(-stage.batch.rows_per_step // (plan.machine.ranks * rows))
    settings = deepspeed_config(
        stage.zero, dtype=dtype, rows_per_micro_batch=rows, micro_batches=micro, clip_norm=stage.optim.clip_norm
    )["zero_optimization"]

    def needed(activations: ActivationPeak) -> RankMemory:
        return rank_memory(plan.weights, settings, activations, ranks=plan.machine.ranks, micro_batches=micro)

    def rest(memory: RankMemory) -> int:
        return FIXED + round(HOLES * memory.bytes)

    memory = needed(span.whole)
    low, high = 0, 2**27
    while plan.machine.memory and low < high:
        tokens = (low + high + 1) // 2
        tried = needed(span.at(tokens))
        if tried.bytes + rest(tried) <= plan.machine.memory:
            low = tokens
        else:
            high = tokens - 1
    return Choice(way=way, memory=memory, rest=rest(memory), tokens=low)
