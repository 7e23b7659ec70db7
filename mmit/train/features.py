"""The features of a frozen encoder in a stage: found, or made before the first step, and read in place of pictures."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mmit.config import RunConfig
from mmit.data.features import FeatureKind, FeatureStore, note_covered, open_folder
from mmit.data.plan import Plan
from mmit.distributed import logger, rank, world_size
from mmit.errors import ConfigError, DataError, Interrupted
from mmit.images import ImageSpec
from mmit.models import read_outline
from mmit.models.absent import AbsentTower, put_aside
from mmit.models.rules import check_frozen
from mmit.models.tower import Tower, parts_of, read_tower_alone
from mmit.train.feature_maker import CachedFeatures, Maker, Pictures
from mmit.train.feed import make_encode, plan_stage
from mmit.train.origin import start_directory

if TYPE_CHECKING:
    from mmit.train.loop import StopRequest

TOWER_FILE = "vision_tower.safetensors"
"""The weights of the absent tower, in the folder of the stage while it trains."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """A stage as its features see it: the tower alone, its plan, and the pictures in it."""

    tower: Tower
    spec: ImageSpec
    kind: FeatureKind
    plan: Plan
    pictures: Pictures
    folder: Path


@dataclass(frozen=True, kw_only=True)
class StageFeatures:
    """What a stage trains with in the place of its tower. file: the tower's weights, for when the model is written."""

    read: CachedFeatures
    size: tuple[int, int]
    tower: AbsentTower
    file: Path
    plan: Plan


def look_at(config: RunConfig, name: str, *, dtype: torch.dtype) -> Look:
    """Read the tower of a stage, and plan it. Raises MmitError subclasses."""
    data = config.stages[name].data
    if data.features == "none":
        raise ConfigError(f"stages.{name}.data.features names no folder for the features; set it, also on this command")
    tower = read_tower_alone(config.model, weights=start_directory(config, name), dtype=dtype)
    stage = config.stages[name]
    check_frozen(stage.train, tower.alone, adapted=() if stage.lora is None else stage.lora.targets)
    outline = read_outline(config.model)
    patches, width = tower.size
    plan = plan_stage(config, stage, make_encode(data, outline))
    return Look(
        tower=tower,
        spec=outline.spec,
        kind=FeatureKind(parts=parts_of(tower, outline.spec), patches=patches, width=width),
        plan=plan,
        pictures=Pictures.of(plan),
        folder=Path(data.features).expanduser(),
    )


def maker_of(look: Look, *, device: torch.device, workers: int) -> Maker:
    """What makes the features of a stage."""
    return Maker(
        tower=look.tower.module, spec=look.spec, kind=look.kind, folder=look.folder, device=device, workers=workers
    )


def stage_features(config: RunConfig, name: str, *, dtype: torch.dtype, stop: StopRequest) -> StageFeatures | None:
    """The features of a stage, all of them there; None where its pictures pass the tower; collective over the ranks.

    Raises DataError where the folder is stale or lacks pictures of the stage and ``missing_features`` is ``error``,
    Interrupted where ``stop`` asks for it while features are made.
    """
    from mmit.train.checkpoint import collectively
    from mmit.train.engine import device

    if config.stages[name].data.features == "none":
        return None

    def check_stop() -> None:
        if stop.asked:
            raise Interrupted(f"stage {name}: stopped while features were made; the same command continues it")

    look = look_at(config, name, dtype=dtype)
    data = config.stages[name].data
    compute = data.missing_features == "compute"
    collectively(lambda: rank() == 0 and open_folder(look.folder, look.kind, create=compute), what=look.folder)
    if not FeatureStore(look.folder, look.kind).covers(look.pictures.fingerprint):
        if not compute:
            raise DataError(
                f"{look.folder} does not hold the pictures of stage {name}: run `mmit data cache`, or set "
                f"stages.{name}.data.missing_features=compute"
            )
        logger.info(
            "features of %d samples with pictures: what %s lacks is made", len(look.pictures.places), look.folder
        )
        maker = maker_of(look, device=device(), workers=data.workers)
        for piece in look.pictures.share(rank(), world_size()):
            make = partial(maker.make, look.plan, piece, check_stop=check_stop, progress=rank() == 0)
            collectively(make, what=look.folder)
        collectively(lambda: rank() == 0 and note(look, name), what=look.folder)
    file = config.stage_folder(name) / TOWER_FILE
    collectively(lambda: rank() == 0 and put_aside(look.tower.module, file), what=file)
    store = FeatureStore(look.folder, look.kind)
    logger.info("the vision tower is not loaded: features of %d pictures are read from %s", len(store), look.folder)
    return StageFeatures(
        read=CachedFeatures(store, look.spec),
        size=look.tower.size,
        tower=AbsentTower(look.tower.module),
        file=file,
        plan=look.plan,
    )


def note(look: Look, name: str) -> None:
    """Write down that the folder holds all pictures of a stage."""
    note_covered(FeatureStore(look.folder, look.kind), look.pictures.fingerprint, what=f"stage {name}")
