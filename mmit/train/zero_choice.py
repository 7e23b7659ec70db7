"""``zero.stage: auto`` and ``activation_checkpointing: auto``, by the same plan that ``mmit plan`` prints.

Each ZeRO stage costs more messages and copies than the one before, and recomputing more time than that, so the first
way that fits into the memory of a rank is taken (see ``ways`` and ``planner``). Rank 0 decides. A run that is continued
keeps its ZeRO stage.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from deepspeed.accelerator import get_accelerator

from mmit.config import RunConfig
from mmit.distributed import gathered, logger, rank, world_size
from mmit.errors import ConfigError
from mmit.models.activations import NotOnShapes
from mmit.train import checkpoint
from mmit.train.environment import total_memory
from mmit.train.planner import FIXED, Machine, choose
from mmit.train.stage_folder import newest
from mmit.train.ways import Way, own_ways

FIXED_ON_CPU = 2**29
"""Bytes of a process on a CPU that no tensor holds: Python, torch and the libraries."""

PARTITIONED = 3
"""The stage that partitions weights too; taken without a plan only where no other can be."""


def with_way(config: RunConfig, name: str, *, dtype: torch.dtype) -> RunConfig:
    """The run file with numbers in the place of the stage's ``auto``; collective. Raises MmitError subclasses."""
    stage = config.stages[name]
    if "auto" not in (stage.zero.stage, stage.activation_checkpointing):
        return config
    memory = min(gathered(_memory()))
    folder = config.stage_folder(name)

    def decided() -> tuple[int, int, str] | None:
        if rank():
            return None
        way, reason = decide(config, name, dtype=dtype, memory=memory, ranks=world_size())
        return way.zero_stage, way.recompute, reason

    everywhere = gathered(checkpoint.collectively(decided, what=folder))
    number, recompute, reason = next(found for found in everywhere if found is not None)
    if stage.zero.stage == "auto":
        logger.info("stages.%s.zero.stage: auto is %d (%s)", name, number, reason)
    if stage.activation_checkpointing == "auto":
        told = recompute if recompute > 1 else str(bool(recompute)).lower()
        logger.info("stages.%s.activation_checkpointing: auto is %s (%s)", name, told, reason)
    changed = {
        "zero": stage.zero.model_copy(update={"stage": number}),
        "activation_checkpointing": recompute if recompute > 1 else bool(recompute),
    }
    return config.model_copy(update={"stages": {**config.stages, name: stage.model_copy(update=changed)}})


def decide(config: RunConfig, name: str, *, dtype: torch.dtype, memory: int, ranks: int) -> tuple[Way, str]:
    """The way of a run on ``ranks`` with so many bytes of memory each, and the reason."""
    stage = config.stages[name]
    try:
        own, any_rank = (own_ways(stage, ranks=number) for number in (ranks, 2))
    except ConfigError as error:
        raise ConfigError(f"stages.{name}.{error}") from None
    before = _stored(config.stage_folder(name), ranks=ranks) if stage.zero.stage == "auto" else None
    kept = [way for way in any_rank if before is not None and way.zero_stage == before[0]]
    own = kept or list(own)
    if len(own) == 1:
        only = "one rank shares nothing out" if ranks == 1 else "no other can be taken"
        return own[0], before[1] if kept and before is not None else only
    fixed = FIXED_ON_CPU if get_accelerator().device_name() == "cpu" else FIXED
    machine = Machine(ranks=ranks, memory=memory, rate=0, fixed=fixed)
    try:
        choice = choose(config, name, machine, own, dtype=dtype)
    except NotOnShapes as error:
        alike = [way for way in own if way.recompute == own[0].recompute]
        unplanned = [way for way in alike if way.zero_stage < PARTITIONED] or alike[:1]
        return unplanned[-1], f"unplanned: {error}; set stages.{name}.zero.stage where that is not right"
    fits = "the first that fits" if choice.bytes <= memory else "none fits, and it needs least:"
    return choice.way, f"{fits} {_gib(memory)} GiB: about {_gib(choice.bytes)} on each of {ranks} ranks"


def _stored(folder: Path, *, ranks: int) -> tuple[int, str] | None:
    """The stage of the newest checkpoint, where so many ranks wrote it; of one of version 1 in any case."""
    found = newest(folder / "checkpoints")
    if found is None:
        return None
    try:
        state = json.loads((found / "state.json").read_text(encoding="utf-8"))
        if state["version"] > 1 and state["world"] != ranks:
            return None
        return int(state["zero_stage"]), f"as in {found}"
    except (OSError, ValueError, KeyError, TypeError):
        return None  # damaged: it is set aside when the run resumes


def _memory() -> int:
    if get_accelerator().device_name() == "cpu":
        return total_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return int(get_accelerator().total_memory())


def _gib(count: float) -> str:
    return f"{count / 2**30:.3g}"
