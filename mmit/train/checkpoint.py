"""Checkpoints of a running stage: written aside, marked last, found again, the old ones removed.

    <stage>/checkpoints/step-000040/
        model/       the model directory, as at the end of a stage
        engine/      DeepSpeed's state: master weights and moments, one file per rank
        state.json   the few integers that the loader and the schedule need
        COMPLETE     written last; a folder without it is ignored

Random numbers need no state: each step seeds its own from (seed, stage, step, rank).
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from mmit.config import RunConfig
from mmit.distributed import all_reduce_sum, logger, rank, world_size
from mmit.errors import CheckpointError
from mmit.train.engine import Engine, device
from mmit.train.settings import check_unchanged, deciding_settings

MARKER = "COMPLETE"
VERSION = 1


@dataclass(frozen=True, kw_only=True)
class RunState:
    """What a checkpoint must agree on with the run that continues it."""

    step: int
    stage: str
    plan: str
    world: int
    zero_stage: int
    precision: str
    settings: Mapping[str, Any]
    version: int = VERSION


def newest(folder: Path) -> Path | None:
    """The complete checkpoint with the highest step below ``folder``, or None."""
    complete = [path.parent for path in folder.glob(f"step-*/{MARKER}")]
    return max(complete, key=lambda path: path.name, default=None)


def read_state(checkpoint: Path) -> RunState:
    """The state in a checkpoint. Raises CheckpointError where it is unreadable."""
    path = checkpoint / "state.json"
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        state = RunState(**content)
    except (OSError, ValueError, TypeError) as error:
        raise CheckpointError(
            f"{path}: unreadable ({error}); remove {checkpoint} to continue from the one before"
        ) from None
    if state.version != VERSION:
        raise CheckpointError(f"{path}: version {state.version}, this mmit reads version {VERSION}")
    return state


def check_continues(found: RunState, wanted: RunState, checkpoint: Path) -> None:
    """Raise CheckpointError, saying what changed, where a checkpoint belongs to another run than the one asked for."""
    check_unchanged(found.settings, wanted.settings, what=checkpoint)
    remedy = "undo the change, or start again with --fresh"
    same = {
        "plan": "the data changed: shards, lengths, tokenizer or template are not those of before",
        "world": f"it was written by {found.world} ranks and this run has {wanted.world}",
        "zero_stage": f"it was written under ZeRO-{found.zero_stage} and this run asks for ZeRO-{wanted.zero_stage}",
        "precision": f"it was written in {found.precision} and this run asks for {wanted.precision}",
    }
    for field, change in same.items():
        if getattr(found, field) != getattr(wanted, field):
            raise CheckpointError(f"{checkpoint}: cannot be continued: {change}; {remedy}")


def save(folder: Path, engine: Engine, state: RunState, *, write_model: Callable[[Path], None], keep_last: int) -> Path:
    """Write a checkpoint of all ranks and remove the oldest ones beyond ``keep_last``; collective.

    write_model: called on every rank with the directory to write; writes on rank 0.
    Raises CheckpointError where a rank could not write; what was complete before stays.
    """
    final = folder / f"step-{state.step:06d}"
    partial = folder / f".step-{state.step:06d}.partial"

    def write() -> None:
        write_model(partial / "model")
        engine.deepspeed.save_checkpoint(str(partial / "engine"), tag="state", exclude_frozen_parameters=True)
        if rank() == 0:
            (partial / "state.json").write_text(json.dumps(asdict(state), indent=1), encoding="utf-8")

    try:
        collectively(lambda: _make_empty(partial), what=partial)
        collectively(write, what=partial)
        collectively(lambda: _publish(partial, final), what=final)
    except CheckpointError as error:
        if rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        before = newest(folder)
        kept = f"{before} is still complete" if before else "there is no earlier checkpoint"
        raise CheckpointError(f"{error}; {kept}; free some space and run the same command") from None
    if rank() == 0:
        _remove_old(folder, keep_last)
    return final


def collectively(action: Callable[[], None], *, what: Path) -> None:
    """Run ``action`` on every rank; where it could not write on any, raise CheckpointError on all."""
    reason = ""
    try:
        action()
    except OSError as error:
        reason = f"{what}: not written: {'the disk is full' if error.errno == errno.ENOSPC else error}"
    except RuntimeError as error:
        # torch.save reports a failed write as RuntimeError, without its errno
        if "PytorchStreamWriter" not in str(error) and "unexpected pos" not in str(error):
            raise
        reason = f"{what}: a file could not be written whole, as on a full disk"
    except CheckpointError as error:
        reason = str(error)
    failed = all_reduce_sum(torch.tensor([int(bool(reason))], device=device()))
    if int(failed):
        raise CheckpointError(reason or f"{what}: not written, another rank could not write its part")


def _make_empty(partial: Path) -> None:
    if rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)


def _publish(partial: Path, final: Path) -> None:
    if rank() != 0:
        return
    with (partial / MARKER).open("w", encoding="utf-8") as marker:
        marker.write("all files of this checkpoint are written\n")
        marker.flush()
        os.fsync(marker.fileno())
    shutil.rmtree(final, ignore_errors=True)
    os.replace(partial, final)


def _remove_old(folder: Path, keep_last: int) -> None:
    complete = sorted(path.parent for path in folder.glob(f"step-*/{MARKER}"))
    for path in complete[:-keep_last]:
        (path / MARKER).unlink()  # first, so that a half-removed folder is not taken for a checkpoint
        shutil.rmtree(path)
    for path in folder.glob(".step-*.partial"):
        shutil.rmtree(path, ignore_errors=True)


def load_engine(checkpoint: Path, engine: Engine) -> None:
    """Put DeepSpeed's state back; collective. Raises CheckpointError."""
    try:
        path, _ = engine.deepspeed.load_checkpoint(str(checkpoint / "engine"), tag="state", load_module_strict=False)
    except (OSError, RuntimeError, KeyError, ValueError, EOFError) as error:
        raise CheckpointError(
            f"{checkpoint}: the state of the optimizer cannot be read ({error}); "
            "remove this folder to continue from the one before"
        ) from error
    if path is None:
        raise CheckpointError(
            f"{checkpoint}: holds no state of the optimizer; remove this folder to continue from the one before"
        )
    logger.info("continues from %s", checkpoint)


def facts(config: RunConfig, *, stage: str, plan: str) -> dict[str, Any]:
    """What a model directory is said to be made from: the resolved config, package versions, git state."""
    import platform
    from importlib.metadata import version

    packages = ("mmit", "torch", "transformers", "open_clip_torch", "deepspeed", "webdataset", "pillow")
    return {
        "stage": stage,
        "plan": plan,
        "settings": deciding_settings(config, stage),
        "config": config.model_dump(mode="json"),
        "versions": {"python": platform.python_version(), **{name: version(name) for name in packages}},
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
