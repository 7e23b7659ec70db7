"""Writing the model of a stage while it trains, whole, whatever of it this run holds."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from mmit.distributed import rank
from mmit.models import Frozen, LoadedModel, base_directory, save_model
from mmit.models.absent import present
from mmit.train.checkpoint import newest
from mmit.train.engine import Engine
from mmit.train.features import StageFeatures


def model_writer(
    engine: Engine,
    loaded: LoadedModel,
    made_from: Callable[[], dict[str, Any]],
    features: StageFeatures | None,
    checkpoints: Path,
) -> Callable[[Path, Path], None]:
    """A function that writes the model into a directory, and its name in the end; collective, rank 0 writes.

    features: what is read in the place of an absent tower, whose weights are taken from their file. The weights beside
    an adapter are written once; the checkpoints after the first have links to those files where the disk knows them.
    """
    has_written = False

    def write(directory: Path, place: Path) -> None:
        nonlocal has_written
        state = engine.full_state()
        if rank() != 0:
            return
        with nullcontext({}) if features is None else present(loaded.model, features.file) as weights:
            before = newest(checkpoints) if has_written else None
            frozen = Frozen(None if before is None else base_directory(before / "model"))
            save_model(loaded, {**state, **weights}, directory, made_from=made_from(), frozen=frozen, place=place)
            has_written = True

    return write
