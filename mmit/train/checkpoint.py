"""Checkpoints of a running stage: what they hold, and how they are found again and continued (see saving.py).

    <stage>/checkpoints/step-000040/
        model/       the model directory, as at the end of a stage
        engine/      master weights and moments, one file per rank (see engine_state)
        state.json   the few integers that the loader and the schedule need
        files.json   size and CRC-32 of every file, to tell a damaged checkpoint from a whole one
        COMPLETE     written last; a folder without it is ignored

The next run may have another number of ranks and another ZeRO stage. A damaged checkpoint is set aside, and the one
before it is taken.

Random numbers need no state: each step seeds its own from (seed, stage, step, rank).
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
from pydantic import TypeAdapter

from mmit.config import RunConfig
from mmit.distributed import all_reduce_sum, logger, rank, world_size
from mmit.errors import CheckpointError, MmitError, OtherRankFailed
from mmit.train import engine_state
from mmit.train.engine import Engine, device
from mmit.train.settings import check_unchanged, deciding_settings
from mmit.train.spikes import SpikeState
from mmit.train.stage_folder import complete, step_of

FILES = "files.json"
T = TypeVar("T")
VERSION = 2
"""2: the state by parameter name; 1: DeepSpeed's own files, continued by the same ranks and ZeRO stage only."""


@dataclass(frozen=True, kw_only=True)
class RunState:
    """What a checkpoint must agree on with the run that continues it; and the broken samples of each source so far."""

    step: int
    stage: str
    plan: str
    world: int
    zero_stage: int
    precision: str
    settings: Mapping[str, Any]
    skipped: Mapping[str, int] = field(default_factory=dict)
    spikes: SpikeState = SpikeState()
    version: int = VERSION


def read_state(checkpoint: Path, *, steps: int) -> RunState:
    """The state in a checkpoint of a plan of ``steps``.

    The files are shared out: each rank looks at some. Raises CheckpointError where one is unreadable or damaged.
    """
    try:
        state = TypeAdapter(RunState).validate_json((checkpoint / "state.json").read_bytes())
        files = json.loads((checkpoint / FILES).read_text(encoding="utf-8"))
        mine = sorted(files)[rank() :: world_size()]
        wrong = [name for name in mine if not _is_as_written(checkpoint / name, files[name])]
    except (OSError, ValueError, AttributeError, TypeError, KeyError) as error:
        raise CheckpointError(f"{checkpoint}: unreadable ({' '.join(str(error).split())})") from None
    if wrong:
        raise CheckpointError(f"{checkpoint}: {wrong[0]} is not as it was written")
    if state.step != step_of(checkpoint) or state.step > steps:
        raise CheckpointError(f"{checkpoint}: says step {state.step} of {steps}")
    return state


def _is_as_written(path: Path, said: int | list[int]) -> bool:
    if isinstance(said, int):  # version 1 kept sizes only
        return path.is_file() and path.stat().st_size == said
    size, crc = said
    return path.is_file() and path.stat().st_size == size and crc_of(path) == crc


def crc_of(path: Path) -> int:
    """CRC-32 of a file."""
    crc = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            crc = zlib.crc32(block, crc)
    return crc


def check_continues(found: RunState, wanted: RunState, checkpoint: Path, config: RunConfig) -> None:
    """Raise CheckpointError, saying what changed, where a checkpoint belongs to another run than the one asked for."""
    if found.version > VERSION:
        raise CheckpointError(f"{checkpoint}: version {found.version}, this mmit reads up to {VERSION}; update mmit")
    check_unchanged(found.settings, config, wanted.stage, what=checkpoint)
    remedy = "undo the change, or start again with --fresh"
    same = {
        "plan": "the data changed: shards, lengths, tokenizer or template are not those of before",
        "precision": f"it was written in {found.precision} and this run asks for {wanted.precision}",
    }
    if found.version == 1:
        same |= {
            "world": f"it was written by {found.world} ranks of an older mmit and this run has {wanted.world}",
            "zero_stage": f"an older mmit wrote it under ZeRO-{found.zero_stage}, not ZeRO-{wanted.zero_stage}",
        }
    for name, change in same.items():
        if getattr(found, name) != getattr(wanted, name):
            raise CheckpointError(f"{checkpoint}: cannot be continued: {change}; {remedy}")


def collectively(action: Callable[[], T], *, what: Path) -> T:
    """Run ``action`` on every rank and give what it gives; where it failed on any rank, raise on all of them.

    Raises CheckpointError for what could not be written or read, else the MmitError of this rank.
    """
    failure: MmitError | None = None
    result: T | None = None
    try:
        result = action()
    except MmitError as error:
        failure = error
    except OSError as error:
        reason = "the disk is full" if error.errno == errno.ENOSPC else str(error)
        failure = CheckpointError(f"{what}: {reason}")
    failed = all_reduce_sum(torch.tensor([int(failure is not None)], device=device()))
    if failure is not None:
        raise failure
    if int(failed):
        raise OtherRankFailed(f"{what}: another rank failed, see its message")
    return cast("T", result)


def resume(folder: Path, engine: Engine, wanted: RunState, *, steps: int, config: RunConfig) -> RunState:
    """The state of the newest checkpoint that is whole, put into the engine; ``wanted`` where there is none.

    A damaged checkpoint is set aside, and the one before it is taken; collective. Raises CheckpointError for a
    checkpoint of another run, and where all are damaged.
    """
    found = complete(folder)
    for checkpoint in reversed(found):
        try:
            stored = collectively(lambda at=checkpoint: read_state(at, steps=steps), what=checkpoint)
        except (CheckpointError, OtherRankFailed) as error:
            _set_aside(checkpoint, error)
            continue
        check_continues(stored, wanted, checkpoint, config)
        try:
            collectively(lambda at=checkpoint, of=stored: _load(at, engine, of), what=checkpoint)
        except (CheckpointError, OtherRankFailed) as error:
            _set_aside(checkpoint, error)
            continue
        logger.info("continues from %s", checkpoint)
        if (stored.world, stored.zero_stage) != (wanted.world, wanted.zero_stage):
            logger.info("which %d ranks wrote under ZeRO-%d", stored.world, stored.zero_stage)
        return replace(wanted, step=stored.step, skipped=stored.skipped, spikes=stored.spikes)
    if found:
        raise CheckpointError(f"{folder}: every checkpoint is damaged; train the stage again with --fresh")
    return wanted


def _set_aside(checkpoint: Path, error: MmitError) -> None:
    """Give a damaged checkpoint a name under which no run finds it; collective."""
    aside = checkpoint.with_name(f".{checkpoint.name}.damaged")
    logger.warning("%s; kept as %s, and the checkpoint before it is taken", error, aside.name)

    def move() -> None:
        if rank() == 0:
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(checkpoint, aside)

    collectively(move, what=checkpoint)


def _load(checkpoint: Path, engine: Engine, state: RunState) -> None:
    if state.version > 1:
        engine_state.load(engine, checkpoint / "engine")
        return
    try:
        path, _ = engine.deepspeed.load_checkpoint(str(checkpoint / "engine"), tag="state", load_module_strict=False)
    except Exception as error:  # whatever a damaged file makes torch or DeepSpeed raise; the run ends
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{checkpoint}: the state of the optimizer cannot be read ({reason})") from error
    if path is None:
        raise CheckpointError(f"{checkpoint}: holds no state of the optimizer")


def facts(config: RunConfig, *, stage: str, plan: str, revisions: Mapping[str, str]) -> dict[str, Any]:
    """What a model directory is said to be made from: resolved config, package versions, commits on the hub, git."""
    import platform
    from importlib.metadata import version

    packages = ("mmit", "torch", "transformers", "open_clip_torch", "deepspeed", "webdataset", "pillow")
    return {
        "stage": stage,
        "plan": plan,
        "settings": deciding_settings(config, stage),
        "config": config.model_dump(mode="json"),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
        "revisions": dict(revisions),
        "git": _git_state(),
        "ranks": world_size(),
    }


def _git_state() -> str:
    import subprocess

    try:
        found = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    except OSError:
        return "no git"
    return found.stdout.strip() or "not a git checkout"
