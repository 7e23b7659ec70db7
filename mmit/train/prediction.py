"""What cached features would bring a stage, and what they take on the disk, before any is made."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from mmit.config import RunConfig
from mmit.errors import DataError
from mmit.models.flops import language_model_shape, tower_flops
from mmit.train.features import Look


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Of one stage. samples: with pictures. tiles: of their pictures; a picture that comes twice is kept once.

    tile_bytes: of the features of a tile. held: bytes in the folder already. free: bytes on its disk.
    tower, rest: operations of an epoch in the tower and in the language model.
    """

    stage: str
    folder: Path
    samples: int
    tiles: int
    tile_bytes: int
    held: int
    free: int
    tower: int
    rest: int
    epochs: int

    @property
    def bytes(self) -> int:
        """What the features of all pictures take."""
        return self.tiles * self.tile_bytes

    @property
    def share(self) -> float:
        """The tower's share of an epoch's operations."""
        return self.tower / (self.tower + self.rest)

    @property
    def gain(self) -> float:
        """How many times faster an epoch is that reads features."""
        return 1 / (1 - self.share)

    @property
    def gain_in_all(self) -> float:
        """How many times faster the stage is, the one pass of the tower that makes the features included."""
        return self.epochs * (self.tower + self.rest) / (self.tower + self.epochs * self.rest)

    def lines(self) -> tuple[str, ...]:
        """For the screen."""
        epochs = f"{self.epochs} epoch{'s'[: self.epochs > 1]}"
        return (
            f"stage {self.stage}: {self.samples:,} samples with {self.tiles:,} tiles of {_amount(self.tile_bytes)}: at "
            f"most {_amount(self.bytes)} in {self.folder} ({_amount(self.held)} are there, {_amount(self.free)} free)",
            f"the tower does {self.share:.0%} of the stage's work: an epoch that reads features is up to "
            f"{self.gain:.2f} times as fast, {epochs} with the pass that makes them {self.gain_in_all:.2f} times",
        )

    def check_room(self) -> None:
        """Raise DataError where the disk would be full."""
        missing = self.bytes - self.held
        if missing > self.free:
            raise DataError(
                f"{self.folder}: the features may need {_amount(missing)} more and {_amount(self.free)} are free; free "
                "some, or name a folder on another disk in data.features"
            )


def predict(config: RunConfig, name: str, look: Look) -> Prediction:
    """The prediction for one stage. Raises MmitError subclasses."""
    stage, plan = config.stages[name], look.plan
    shape = language_model_shape(config.model, stage.train)
    lengths = np.zeros(plan.samples, dtype=np.int64)
    labels = np.zeros(plan.samples, dtype=np.int64)
    tiles = np.zeros(plan.samples, dtype=np.int64)
    for number, table in enumerate(plan.tables):
        own = np.flatnonzero(plan.source_of[: plan.samples] == number)
        samples = plan.sample_of[own]
        lengths[own], labels[own], tiles[own] = table.tokens[samples], table.trained[samples], table.tiles[samples]
    rest = shape.flops(tokens=int(lengths.sum()), squares=int((lengths**2).sum()), labels=int(labels.sum()))
    return Prediction(
        stage=name,
        folder=look.folder,
        samples=len(look.pictures.places),
        tiles=sum(int(plan.tables[source].tiles[number]) for source, number in look.pictures.places.tolist()),
        tile_bytes=look.kind.tile_bytes,
        held=sum(path.stat().st_size for path in look.folder.glob("*.features")),
        free=shutil.disk_usage(_existing(look.folder)).free,
        tower=int(tiles.sum()) * tower_flops(look.tower.module, look.spec) // stage.epochs,
        rest=rest // stage.epochs,
        epochs=stage.epochs,
    )


def _existing(folder: Path) -> Path:
    return next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())


def _amount(count: int) -> str:
    size = float(count)
    for unit in ("bytes", "KB", "MB", "GB", "TB"):
        if size < 1000 or unit == "TB":
            return f"{size:.3g} {unit}"
        size /= 1000
    raise AssertionError("the last unit takes all")
