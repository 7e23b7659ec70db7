"""What a stage needs before it is started: peak memory of a rank for each way to train it, what fits, and the time.

Nothing is read but configurations and headers: the model stands on the meta device (see ``mmit.models.activations``)
and what DeepSpeed adds is counted (``zero_memory``). ``mmit plan`` prints it, and ``zero.stage: auto`` goes by it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from mmit.config import RunConfig, Stage
from mmit.errors import ConfigError
from mmit.models import LoadedModel, begin_adapter, build_model
from mmit.models.absent import AbsentTower
from mmit.models.activations import ActivationPeak, RowLoad, activation_peak, likely_last_layer, worst_batch
from mmit.models.four_bits import packed_sizes
from mmit.models.last_layer import CannotRecompute
from mmit.models.placement import SHAPES, placed
from mmit.train.deepspeed_settings import accumulation, deepspeed_config
from mmit.train.run_check import check_run, refuse_mistakes
from mmit.train.ways import Way, is_worth_it, own_ways, ways
from mmit.train.work import peak
from mmit.train.workload import Workload, workload_of
from mmit.train.zero_memory import PERSISTENT, RankMemory, Weights, rank_memory, weights_of

FIXED = 2 * 2**30
"""Bytes on a GPU that no tensor holds: the context, the libraries' kernels and workspaces, NCCL's buffers."""

HOLES = 0.1
"""Share of what is allocated that is lost between tensors of many sizes, and by which a prediction may fall short."""


@dataclass(frozen=True, kw_only=True)
class Machine:
    """What trains. memory: bytes of a device; rate: operations per second of its matrix products; 0 where unknown.

    fixed: bytes of a device that no tensor holds.
    """

    ranks: int
    memory: int
    rate: float
    fixed: int = FIXED

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

    activations: of the run file's micro-batch, by the recomputation of a way. tile_tokens: of one tile of a picture.
    """

    name: str
    stage: Stage
    machine: Machine
    weights: Weights
    activations: Mapping[int, ActivationPeak]
    choices: tuple[Choice, ...]
    workload: Workload
    precision: str
    tile_tokens: int

    @property
    def tokens(self) -> int:
        """Of a micro-batch, as the run file has it."""
        return self.workload.row.tokens * self.stage.batch.rows_per_micro_batch

    @property
    def best(self) -> Choice | None:
        """The first way that fits with the run file's micro-batch; else the one that fits the most tokens."""
        worth_it = [choice for choice in self.choices if is_worth_it(choice.way, ranks=self.machine.ranks)]
        whole = next((choice for choice in worth_it if choice.bytes <= self.machine.memory), None)
        return whole or max((c for c in worth_it if c.tokens), key=lambda choice: choice.tokens, default=None)

    @property
    def auto(self) -> Choice:
        """What ``zero.stage: auto`` means, or would mean where the run file says a number.

        So what ``best`` is where it keeps what the stage says of recomputation and offloading.
        """
        zero = self.stage.zero.model_copy(update={"stage": "auto"})
        return self.first(own_ways(self.stage.model_copy(update={"zero": zero}), ranks=self.machine.ranks))

    def first(self, among: Sequence[Way]) -> Choice:
        """The first of these ways that fits, else the one that needs least."""
        planned = [choice for choice in self.choices if choice.way in among]
        fits = next((choice for choice in planned if choice.bytes <= self.machine.memory), None)
        return fits or min(planned, key=lambda choice: choice.bytes)


def plan_run(config: RunConfig, stages: list[str], machine: Machine) -> Iterator[StagePlan]:
    """The plan of each stage. Raises ConfigError with every mistake of the run file."""
    report = check_run(config, data=False)
    refuse_mistakes(report, config.file or config.folder)
    for name in stages:
        yield plan_of(config, name, machine)


def plan_of(config: RunConfig, name: str, machine: Machine) -> StagePlan:
    """The plan of one stage of a run file that has no mistakes. Raises ConfigError where ranks do not fit its rows."""
    dtype = {"fp32": torch.float32, "fp16": torch.float16}.get(config.precision, torch.bfloat16)
    return _plan(config, name, machine, ways(config.stages[name]), dtype=dtype, lengths=True)


def choose(config: RunConfig, name: str, machine: Machine, own: Sequence[Way], *, dtype: torch.dtype) -> Choice:
    """The first of a stage's own ways that fits, by the same plan; else the one that needs least.

    own: the cheapest first; where one that recomputes as little fits, no other is planned.
    """
    alike = [way for way in own if way.recompute == own[0].recompute]
    choice = _plan(config, name, machine, alike, dtype=dtype, lengths=False).first(own)
    if len(alike) == len(own) or choice.bytes <= machine.memory:
        return choice
    return _plan(config, name, machine, own, dtype=dtype, lengths=False).first(own)


def _plan(
    config: RunConfig, name: str, machine: Machine, tried: Sequence[Way], *, dtype: torch.dtype, lengths: bool
) -> StagePlan:
    stage = config.stages[name]
    if machine.ranks % stage.parallel.sequence:
        raise ConfigError(
            f"stages.{name}.parallel.sequence: {stage.parallel.sequence} does not divide {machine.ranks} ranks; "
            "plan for a multiple of it"
        )
    with placed(SHAPES):
        loaded = _model(config, name, dtype)
        sizes = packed_sizes(loaded.model.language_model) if _is_packed(stage) else {}
        packed = {f"language_model.{weight}": size for weight, size in sizes.items()}
        loaded.model.last_layer = likely_last_layer(loaded.model.language_model)
        groups = loaded.model.train_only(stage.train)
        asked = stage.zero.extra.get("zero_optimization", {})
        persistent = int(asked.get("stage3_param_persistence_threshold", PERSISTENT))
        weights = weights_of(loaded.model, groups, packed=packed, persistent=persistent)
        work = workload_of(config, name, loaded)
        unpacked = max((loaded.model.get_parameter(weight).nbytes for weight in packed), default=0)
        spans: dict[int, _Span] = {}
        line = lengths and machine.memory > 0
        for again in sorted({way.recompute for way in tried}, key=lambda every: 1 / every if every else 0):
            try:
                spans[again] = _Span.measured(loaded, work.row, stage, again=again, unpacked=unpacked, line=line)
            except CannotRecompute:
                if again == stage.activation_checkpointing:
                    raise
    plan = StagePlan(
        name=name,
        stage=stage,
        machine=machine,
        weights=weights,
        activations={again: span.whole for again, span in spans.items()},
        choices=(),
        workload=work,
        precision=str(dtype).removeprefix("torch."),
        tile_tokens=loaded.model.spec.tokens_per_tile,
    )
    possible = [way for way in tried if way.recompute in spans]
    return replace(plan, choices=tuple(_choice(plan, way, spans[way.recompute], dtype) for way in possible))


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
    """Activations of a micro-batch and of one with rows twice as long: a straight line between and beyond.

    tokens: of the first, on all ranks that share its rows. twice: None where no line was asked for.
    """

    tokens: int
    whole: ActivationPeak
    twice: ActivationPeak | None

    @classmethod
    def measured(
        cls, loaded: LoadedModel, row: RowLoad, stage: Stage, *, again: int, unpacked: int, line: bool
    ) -> _Span:
        """On shapes. unpacked: bytes of the largest weight that is made from four bits while it is used."""
        if again:
            loaded.model.enable_activation_checkpointing(every=again)
        rows, sharing = stage.batch.rows_per_micro_batch, stage.parallel.sequence

        def peak_of(times: int) -> ActivationPeak:
            load = RowLoad(**{key: -(-times * value // sharing) for key, value in vars(row).items()})
            found = activation_peak(loaded.model, worst_batch(loaded, load, rows=rows))
            by_part = {**found.by_part, "unpacked weight": unpacked} if unpacked else found.by_part
            return ActivationPeak(by_part=by_part, curve=tuple((left, most + unpacked) for left, most in found.curve))

        return cls(tokens=row.tokens * rows, whole=peak_of(1), twice=peak_of(2) if line else None)

    def at(self, tokens: int) -> ActivationPeak:
        """Of a micro-batch of so many tokens."""
        assert self.twice is not None, "the line was measured"
        more = tokens / self.tokens - 1
        curve = tuple(
            (left, max(0, round(whole + more * (twice - whole))))
            for (left, whole), (_, twice) in zip(self.whole.curve, self.twice.curve, strict=True)
        )
        return ActivationPeak(by_part={}, curve=curve)


def _choice(plan: StagePlan, way: Way, span: _Span, dtype: torch.dtype) -> Choice:
    stage, machine = way.apply(plan.stage), plan.machine
    rows = stage.batch.rows_per_micro_batch
    readers = machine.ranks // stage.parallel.sequence
    micro = accumulation(rows_per_step=stage.batch.rows_per_step, rows_per_micro_batch=rows, readers=readers)
    settings = deepspeed_config(
        stage.zero, dtype=dtype, rows_per_micro_batch=rows, micro_batches=micro, clip_norm=stage.optim.clip_norm
    )["zero_optimization"]

    def needed(activations: ActivationPeak) -> RankMemory:
        return rank_memory(plan.weights, settings, activations, ranks=machine.ranks, micro_batches=micro)

    def rest(memory: RankMemory) -> int:
        return machine.fixed + round(HOLES * memory.bytes)

    memory = needed(span.whole)
    low, high = 0, 2**27
    while machine.memory and low < high and span.twice is not None:
        tokens = (low + high + 1) // 2
        tried = needed(span.at(tokens))
        if tried.bytes + rest(tried) <= machine.memory:
            low = tokens
        else:
            high = tokens - 1
    return Choice(way=way, memory=memory, rest=rest(memory), tokens=low)
