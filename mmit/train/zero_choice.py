"""``zero.stage: auto``: what is partitioned over the ranks of a run, by the same plan that ``mmit plan`` prints.

Each stage costs more messages and copies than the one before, so the first that fits into the memory of a rank is
taken (see ``ways`` and ``planner``). Rank 0 decides, and a run that is continued keeps what was decided.
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
from mmit.train.planner import FIXED, Machine, plan_at_start
from mmit.train.stage_folder import newest
from mmit.train.ways import own_ways

FIXED_ON_CPU = 2**29
"""Bytes of a process on a CPU that no tensor holds: Python, torch and the libraries."""

PARTITIONED = 3
"""The stage that partitions weights too; taken without a plan only where no other can be."""


def with_zero_stage(config: RunConfig, name: str, *, dtype: torch.dtype) -> RunConfig:
    """The run file with a number in the place of the stage's ``auto``; collective. Raises MmitError subclasses."""
    stage = config.stages[name]
    if stage.zero.stage != "auto":
        return config
    memory = min(gathered(_memory()))
    folder = config.stage_folder(name)
    decided = checkpoint.collectively(
        lambda: decide(config, name, dtype=dtype, memory=memory, ranks=world_size()) if rank() == 0 else None,
        what=folder,
    )
    number, reason = next(found for found in gathered(decided) if found is not None)
    logger.info("stages.%s.zero.stage: auto is %d (%s)", name, number, reason)
    zero = stage.zero.model_copy(update={"stage": number})
    return config.model_copy(update={"stages": {**config.stages, name: stage.model_copy(update={"zero": zero})}})


def decide(config: RunConfig, name: str, *, dtype: torch.dtype, memory: int, ranks: int) -> tuple[int, str]:
    """The ZeRO stage of a run on ``ranks`` with so many bytes of memory each, and the reason."""
    try:
        own, any_rank = (own_ways(config.stages[name], ranks=number) for number in (ranks, 2))
    except ConfigError as error:
        raise ConfigError(f"stages.{name}.{error}") from None
    before = _stored(config.stage_folder(name), ranks=ranks)
    if before is not None and before[0] in {way.zero_stage for way in any_rank}:
        return before
    if len(own) == 1:
        return own[0].zero_stage, "one rank shares nothing out" if ranks == 1 else "no other can be taken"
    fixed = FIXED_ON_CPU if get_accelerator().device_name() == "cpu" else FIXED
    machine = Machine(ranks=ranks, memory=memory, rate=0, fixed=fixed)
    try:
        choice = plan_at_start(config, name, machine, dtype=dtype).auto
    except NotOnShapes as error:
        unplanned = max((way.zero_stage for way in own if way.zero_stage < PARTITIONED), default=own[0].zero_stage)
        return unplanned, f"unplanned: {error}; set stages.{name}.zero.stage where that is not right"
    fits = "the first that fits" if choice.bytes <= memory else "none fits, and it needs least:"
    return choice.way.zero_stage, f"{fits} {_gib(memory)} GiB: about {_gib(choice.bytes)} on each of {ranks} ranks"


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
