"""``mmit data cache``: say what features would bring and take, then make those of a stage, on all devices."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import numpy as np

from mmit.config import RunConfig
from mmit.data.ahead import lost_workers_named
from mmit.data.features import MANIFEST, FeatureStore, open_folder
from mmit.distributed import is_launched, rank, world_size
from mmit.errors import ConfigError
from mmit.train.engine import device, resolve_precision, take_device
from mmit.train.features import Look, look_at, maker_of, note
from mmit.train.launch import launch
from mmit.train.prediction import predict


def cache_features(
    config: RunConfig, name: str, command: Sequence[str], *, ranks: int | None, say: Callable[[str], object]
) -> None:
    """Make the features of a stage that its folder lacks; the same call continues one that was stopped.

    command: arguments of ``mmit`` that call this again, for ``ranks`` processes (else one for each accelerator).
    Raises ConfigError for a stage that trains its tower, DataError where the disk would be full.
    """
    look = look_at(config, name, dtype=resolve_precision(config.precision))
    if is_launched():
        _make(config, name, look)
        return
    if (look.folder / MANIFEST).is_file():
        open_folder(look.folder, look.kind, create=False)
    prediction = predict(config, name, look)
    for line in prediction.lines():
        say(line)
    prediction.check_room()
    open_folder(look.folder, look.kind, create=True)
    count = ranks or _accelerators()
    if count == 1:
        _make(config, name, look)
    else:
        threads = config.launch.threads_per_rank or max(1, (os.cpu_count() or 1) // count)
        again = "the same command makes the features that are missing"
        launch([*command, "--stage", name], ranks=count, threads=threads, stage=name, next_time=lambda: again)
    note(look, name)
    store = FeatureStore(look.folder, look.kind)
    say(f"{look.folder}: features of {len(store):,} pictures")


def _make(config: RunConfig, name: str, look: Look) -> None:
    take_device()
    maker = maker_of(look, device=device(), workers=config.stages[name].data.workers)
    share = np.concatenate(look.pictures.share(rank(), world_size()))
    with lost_workers_named():
        maker.make(look.plan, share, check_stop=lambda: None, progress=rank() == 0)


def _accelerators() -> int:
    import torch

    return torch.accelerator.device_count() or 1


def stages_with_features(config: RunConfig, asked: str | None) -> list[str]:
    """The stages to make features for: the one asked for, or all that name a folder. Raises ConfigError."""
    if asked is not None:
        return [asked]
    found = [name for name, stage in config.stages.items() if stage.data.features != "none"]
    if not found:
        raise ConfigError("no stage names a folder in data.features; add it, also as an override on this command")
    return found
