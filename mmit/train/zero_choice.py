"""``zero.stage: auto``: what is partitioned over the ranks, from what there is to partition and where it must fit.

Each stage costs more messages and copies than the one before, so the lowest that leaves room is taken: 0 on one rank,
where nothing can be shared out, and for small parts; 2 for large ones; 3 only where a rank cannot hold the weights.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass

import torch
from deepspeed.accelerator import get_accelerator

from mmit.config import RunConfig, Stage, Zero
from mmit.distributed import gathered, logger, world_size
from mmit.models import build_model
from mmit.models.placement import SHAPES, placed
from mmit.train.environment import total_memory
from mmit.train.stage_folder import newest

STATES = {torch.float32: 12, torch.bfloat16: 14, torch.float16: 14}
"""Bytes of a trained parameter beside its weight: gradient, AdamW's moments, and in half precision the fp32 copy."""

SMALL = 0.05
"""Share of a rank's memory up to which states are held whole."""

ROOM = 0.5
"""Share of a rank's memory for weights and states; the rest is for activations."""


@dataclass(frozen=True, kw_only=True)
class Load:
    """Bytes of all weights, bytes of the states of what trains, and bytes of memory that each rank has."""

    weights: int
    states: int
    memory: int


def with_zero_stage(config: RunConfig, name: str, *, dtype: torch.dtype) -> RunConfig:
    """The run file with a number in the place of the stage's ``auto``; collective. Raises ConfigError."""
    stage = config.stages[name]
    if stage.zero.stage != "auto":
        return config
    number, reason = _stored(config, name) or _chosen(config, stage, dtype)
    logger.info("stages.%s.zero.stage: auto is %d (%s)", name, number, reason)
    zero = stage.zero.model_copy(update={"stage": number})
    return config.model_copy(update={"stages": {**config.stages, name: stage.model_copy(update={"zero": zero})}})


def choose(load: Load, *, ranks: int, most: int = 3) -> tuple[int, str]:
    """The ZeRO stage for several ranks, at most ``most``, and the reason."""
    states = f"{_gb(load.states)} of gradients and optimizer state, {_gb(load.memory)} of memory"
    if load.states <= SMALL * load.memory and load.weights + load.states <= ROOM * load.memory:
        return 0, f"{states}: each rank keeps all"
    if load.weights + load.states / ranks <= ROOM * load.memory or most < 3:
        return 2, f"{states}: shared out over {ranks} ranks"
    return 3, f"{states}, {_gb(load.weights)} of weights: all shared out over {ranks} ranks"


def _chosen(config: RunConfig, stage: Stage, dtype: torch.dtype) -> tuple[int, str]:
    ranks, least = world_size(), least_stage(stage.zero)
    if least == 3:
        return 3, "offloading needs it"
    if ranks == 1:
        return (least, "offloading needs it") if least else (0, "one rank shares nothing out")
    weights, trained = _sizes(config, stage, dtype)
    states = 0 if least else trained * STATES[dtype]
    load = Load(weights=weights, states=states, memory=min(gathered(_memory())))
    four_bits = stage.lora is not None and stage.lora.quantize == "nf4"
    number, reason = choose(load, ranks=ranks, most=2 if four_bits else 3)
    return max(number, least), reason


def least_stage(zero: Zero) -> int:
    """The lowest stage under which what the section offloads can be offloaded."""
    if zero.offload_parameters != "none" or zero.offload_optimizer == "nvme":
        return 3
    return 2 if zero.offload_optimizer == "cpu" else 0


def _stored(config: RunConfig, name: str) -> tuple[int, str] | None:
    """The stage of a checkpoint of version 1, which goes on under no other."""
    found = newest(config.stage_folder(name) / "checkpoints")
    if found is None:
        return None
    try:
        state = json.loads((found / "state.json").read_text(encoding="utf-8"))
        return (int(state["zero_stage"]), f"as in {found}") if state["version"] == 1 else None
    except (OSError, ValueError, KeyError, TypeError):
        return None  # damaged: it is set aside when the run resumes


def _sizes(config: RunConfig, stage: Stage, dtype: torch.dtype) -> tuple[int, int]:
    """Bytes of all weights, and the number of trained parameters, from shapes alone."""
    with placed(SHAPES):
        model = build_model(config.model, dtype=dtype, seed=config.seed, adapter="drop").model
        if stage.lora is not None:
            from mmit.models import begin_adapter  # imports peft, which takes longer than all the rest

            begin_adapter(model, stage.lora, None, seed=config.seed)
        model.train_only(stage.train)
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    return weights, sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _memory() -> int:
    if get_accelerator().device_name() == "cpu":
        return total_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return int(get_accelerator().total_memory())


def _gb(count: float) -> str:
    return f"{count / 1e9:.3g} GB"
