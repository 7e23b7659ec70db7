"""The ways to train a stage in the order in which they are tried, and which of them a stage allows.

``mmit plan`` and ``zero.stage: auto`` take the first that fits: one order and one rule for both.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from pydantic import ValidationError

from mmit.config import Stage, Zero
from mmit.errors import ConfigError
from mmit.train.deepspeed_settings import deepspeed_config

OFFLOADS = ("none", "optimizer", "all")
"""What may lie in the host's memory; ``all`` is the parameters too."""

RECOMPUTED = (0, 4, 2, 1)
"""What ``activation_checkpointing: auto`` tries: the least first."""


@dataclass(frozen=True, kw_only=True)
class Way:
    """A way to train a stage. recompute: activations of no layer (0), of every layer (1), of every k-th (k)."""

    zero_stage: int
    offload: str = "none"
    recompute: int = 0

    def __str__(self) -> str:
        told = [f"ZeRO-{self.zero_stage}"]
        told += [] if self.offload == "none" else [f"offload {self.offload}"]
        if self.recompute:
            told.append("recompute" if self.recompute == 1 else f"recompute 1 of {self.recompute}")
        return " + ".join(told)

    @property
    def cost(self) -> tuple[int, float, int]:
        """What the order goes by: offloading costs most time, then recomputing, then messages between ranks."""
        return OFFLOADS.index(self.offload), 1 / self.recompute if self.recompute else 0.0, self.zero_stage

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
        recompute = self.recompute if self.recompute > 1 else bool(self.recompute)
        return stage.model_copy(update={"zero": zero, "activation_checkpointing": recompute})

    def overrides(self, name: str, stage: Stage) -> list[str]:
        """What changes a run file's ``stage`` called ``name`` to this way, for the command line."""
        wanted, zero = self.apply(stage), stage.zero
        keys = ("stage", "offload_optimizer", "offload_parameters", "nvme_path")
        told = {
            f"zero.{key}": getattr(wanted.zero, key) for key in keys if getattr(wanted.zero, key) != getattr(zero, key)
        }
        if wanted.activation_checkpointing != stage.activation_checkpointing:
            told["activation_checkpointing"] = wanted.activation_checkpointing
        return [f"stages.{name}.{key}={_as_yaml(value)}" for key, value in told.items()]


USUAL = (
    *(Way(zero_stage=number, recompute=recompute) for recompute in (0, 1) for number in range(4)),
    Way(zero_stage=2, offload="optimizer"),
    Way(zero_stage=2, offload="optimizer", recompute=1),
    Way(zero_stage=3, offload="optimizer", recompute=1),
    Way(zero_stage=3, offload="all", recompute=1),
)
"""What ``mmit plan`` lists of every stage."""


def ways(stage: Stage) -> tuple[Way, ...]:
    """The usual ways and the stage's own, the cheapest in time first; those that the stage does not allow left out."""
    return tuple(way for way in sorted({*USUAL, *_own(stage)}, key=lambda way: way.cost) if _is_allowed(stage, way))


def own_ways(stage: Stage, *, ranks: int) -> tuple[Way, ...]:
    """What ``auto`` may mean, the cheapest first: the stage's own offloading, and what it says of the rest.

    Raises ConfigError where no ZeRO stage has both what is offloaded and what else the stage asks for.
    """
    said = stage.zero.stage
    own = [way for way in _own(stage) if said in ("auto", way.zero_stage) and _is_allowed(stage, way)]
    own.sort(key=lambda way: way.cost)
    if not own:
        raise ConfigError(
            f"zero: what it offloads needs stage {least_stage(stage.zero)}, which cannot hold what the stage trains "
            "(weights in four bits, or compiled layers); offload less"
        )
    worth_it = tuple(way for way in own if is_worth_it(way, ranks=ranks))
    return worth_it or tuple(way for way in own if way.zero_stage == own[0].zero_stage)


def is_worth_it(way: Way, *, ranks: int) -> bool:
    """Whether the way partitions nothing that one rank would hold whole all the same."""
    return ranks > 1 or way.zero_stage == _LEAST[way.offload]


def least_stage(zero: Zero) -> int:
    """The lowest ZeRO stage under which what the section offloads can be offloaded."""
    if zero.offload_optimizer == "nvme":
        return 3
    return _LEAST[_offload(zero)]


_LEAST = {"none": 0, "optimizer": 2, "all": 3}


def _offload(zero: Zero) -> str:
    if zero.offload_parameters != "none":
        return "all"
    return "none" if zero.offload_optimizer == "none" else "optimizer"


def _own(stage: Stage) -> list[Way]:
    """With the recomputation and the offloading of the stage, which count a disk as the host's memory."""
    return [
        Way(zero_stage=number, offload=_offload(stage.zero), recompute=recompute)
        for recompute in _own_recomputation(stage)
        for number in range(least_stage(stage.zero), 4)
    ]


def _own_recomputation(stage: Stage) -> tuple[int, ...]:
    """What the run file says of recomputing activations, or what its ``auto`` may mean."""
    return RECOMPUTED if stage.activation_checkpointing == "auto" else (stage.recompute,)


def _is_allowed(stage: Stage, way: Way) -> bool:
    """Whether the run file could say so: four bits and compiled layers are not partitioned, and more of the kind."""
    wanted = way.apply(stage)
    try:
        Stage.model_validate(wanted.model_dump())
        deepspeed_config(wanted.zero, dtype=torch.float32, rows_per_micro_batch=1, micro_batches=1, clip_norm=1.0)
    except (ValidationError, ConfigError):
        return False
    return True


def _as_yaml(value: object) -> str:
    return "null" if value is None else str(value).lower()
