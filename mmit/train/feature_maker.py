"""Let a tower see every picture of a plan once, and keep what it makes of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Generator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from torch.utils.data import Dataset

from mmit.data.ahead import made_ahead
from mmit.data.faults import StorageError
from mmit.data.feature_writer import FeatureWriter
from mmit.data.features import FeatureKind, FeatureStore
from mmit.data.lengths import cut_turns
from mmit.data.plan import Plan
from mmit.errors import DataError
from mmit.images import ImageSpec
from mmit.models.vlm import tower_features
from mmit.tiling import Anyres

TILES_AT_A_TIME = 32
PIECE = 4096
"""Samples after which ranks wait for each other, so that none waits in a collective longer than that permits."""
LOOK_AROUND_EVERY = 16
"""Passes of the tower after which a writer learns what the others have added."""


@dataclass(frozen=True)
class Pictures:
    """The samples with pictures that a plan reads, each once, in the order in which they lie on the disk.

    places: (S, 2) source and number. fingerprint: of what they are.
    """

    places: np.ndarray
    fingerprint: str

    @classmethod
    def of(cls, plan: Plan) -> Pictures:
        """Of all steps of a plan."""
        source_of, sample_of = plan.source_of[: plan.samples], plan.sample_of[: plan.samples]
        found, digest = [np.zeros((0, 2), dtype=np.int64)], hashlib.sha256()
        for number, (source, table) in enumerate(zip(plan.sources, plan.tables, strict=True)):
            samples = np.unique(sample_of[source_of == number]).astype(np.int64)
            samples = samples[table.tiles[samples] > 0]
            found.append(np.stack([np.full_like(samples, number), samples], axis=1))
            digest.update(source.fingerprint.encode() + samples.tobytes() + table.rows["turns"][samples].tobytes())
        return cls(np.concatenate(found), digest.hexdigest()[:32])

    def share(self, number: int, of: int) -> list[np.ndarray]:
        """The part that one of several processes goes through, in pieces, as many for each of them."""
        pieces = max(1, -(-len(self.places) // (of * PIECE)))
        return np.array_split(np.array_split(self.places, of)[number], pieces)


def look_of(spec: ImageSpec, images: int) -> str:
    """How a picture is looked at that is one of ``images`` in its sample, where that changes its tiles."""
    return "one tile" if isinstance(spec.tiling, Anyres) and not spec.tiling.cuts(images) else ""


@dataclass(frozen=True)
class CachedFeatures:
    """Features in place of pixels: what encoding asks for every picture."""

    store: FeatureStore
    spec: ImageSpec

    def __call__(self, image: bytes, *, images: int) -> Tensor:
        """The features of one of the ``images`` of a sample. Raises DataError and StorageError."""
        return self.store.read(image, look=look_of(self.spec, images))


@dataclass(frozen=True, kw_only=True)
class Maker:
    """A tower at work on the pictures of a plan: where it runs, and what it reads with."""

    tower: nn.Module
    spec: ImageSpec
    kind: FeatureKind
    folder: Path
    device: torch.device
    workers: int

    def make(self, plan: Plan, places: np.ndarray, *, check_stop: Callable[[], None], progress: bool) -> None:
        """Add the features of the pictures of these samples that are not in the folder yet.

        check_stop: called between passes of the tower; may raise to end the work, what is done stays.
        Raises DataError where shards cannot be read or the folder cannot be written.
        """
        known = FeatureStore(self.folder, self.kind)
        reader = _Reader(plan, places, self.spec, known)
        tower = self.tower.to(self.device).eval()
        with (
            FeatureWriter(self.folder) as writer,
            closing(made_ahead(reader, workers=self.workers, ahead=8)) as found,
            closing(_with_bar(found, len(places), shown=progress)) as samples,
        ):
            self._write(samples, tower, writer, check_stop)

    def _write(
        self, samples: Generator[_Found], tower: nn.Module, writer: FeatureWriter, check_stop: Callable[[], None]
    ) -> None:
        passes = 0
        waiting: dict[bytes, Tensor] = {}
        for found in samples:
            if found.failure:
                raise DataError(found.failure)
            for key, reason in found.refused:
                writer.refuse(key, reason)
            waiting |= {key: tiles for key, tiles in found.tiles if key not in writer}
            if sum(map(len, waiting.values())) >= TILES_AT_A_TIME:
                check_stop()
                self._see(waiting, tower, writer)
                waiting, passes = {}, passes + 1
                if passes % LOOK_AROUND_EVERY == 0:
                    writer.look_around()
        if waiting:
            self._see(waiting, tower, writer)

    @torch.no_grad()
    def _see(self, waiting: dict[bytes, Tensor], tower: nn.Module, writer: FeatureWriter) -> None:
        tiles = torch.cat(list(waiting.values())).to(self.device, non_blocking=True)
        parts = [
            tower_features(tower, some, self.spec).to("cpu", torch.bfloat16) for some in tiles.split(TILES_AT_A_TIME)
        ]
        features = torch.cat(parts).split([len(own) for own in waiting.values()])
        for key, own in zip(waiting, features, strict=True):
            writer.add(key, own)


@dataclass(frozen=True)
class _Found:
    """The pictures of a sample that have no features yet: their tiles, or why there are none; what ends the work."""

    tiles: list[tuple[bytes, Tensor]]
    refused: list[tuple[bytes, str]]
    failure: str = ""


class _Reader(Dataset[_Found]):
    """Reads and prepares pictures, in the loader's processes."""

    def __init__(self, plan: Plan, places: np.ndarray, spec: ImageSpec, known: FeatureStore) -> None:
        self._plan = plan
        self._places = places
        self._spec = spec
        self._known = known

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> _Found:
        source, number = self._places[index].tolist()
        try:
            conversation = self._plan.sources[source].read(number)
            if turns := self._plan.tables[source].turns(number):
                conversation = cut_turns(conversation, turns)
        except StorageError as error:
            return _Found([], [], str(error))
        except DataError:
            return _Found([], [])  # a broken sample: training leaves it out, counts and lists it
        found = _Found([], [])
        count = len(conversation.image_refs)
        for image in conversation.images:
            key = self._known.kind.key(image, look=look_of(self._spec, count))
            if key in self._known:
                continue
            try:
                found.tiles.append((key, self._spec.prepare(image, images=count)))
            except DataError as error:
                found.refused.append((key, str(error)))
        return found


def _with_bar(samples: Generator[_Found], total: int, *, shown: bool) -> Generator[_Found]:
    columns = (TextColumn("features"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), disable=not shown) as bar:
        task = bar.add_task("features", total=total)
        for found in samples:
            yield found
            bar.advance(task)
