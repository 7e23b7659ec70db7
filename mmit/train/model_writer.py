"""Writing the model of a stage while it trains, whole, whatever of it this run holds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from torch import Tensor

from mmit.distributed import rank
from mmit.models import Frozen, LoadedModel, Weights, base_directory, save_model
from mmit.models.absent import made_whole
from mmit.models.tensor_file import bytes_of, outlined
from mmit.train.copies import Copies
from mmit.train.engine import Engine
from mmit.train.features import StageFeatures
from mmit.train.stage_folder import newest


@dataclass(frozen=True, kw_only=True)
class HeldModel:
    """The weights of a model, as a copy or on their way; on ranks other than 0 there may be nothing to write."""

    weights: Weights
    write_weights: Callable[[Weights, Path, Path], None]

    def write(self, directory: Path, place: Path) -> None:
        """Write the model on rank 0; collective unless this is a copy. place: the directory that it will be."""
        rest = iter(self.weights.tensors)
        try:
            if rank() == 0:
                self.write_weights(replace(self.weights, tensors=rest), directory, place)
        finally:
            for _ in rest:  # what a full disk has left: the other ranks wait until each weight was gathered
                pass


class ModelWriter:
    """Writes the model of a stage, as often as asked.

    features: what is read in the place of an absent tower, whose weights are taken from their file. The weights beside
    an adapter are written once; the checkpoints after the first have links to those files where the disk knows them.
    """

    def __init__(
        self,
        engine: Engine,
        loaded: LoadedModel,
        made_from: Callable[[], dict[str, Any]],
        features: StageFeatures | None,
        checkpoints: Path,
    ) -> None:
        self._engine, self._loaded, self._made_from = engine, loaded, made_from
        self._features, self._checkpoints = features, checkpoints
        self._has_written = False

    def take(self, *, copies: Copies | None) -> HeldModel:
        """The model as it is now where it is to be copied, else as it will be when it is written; collective.

        A copy holds what training changes: weights that stay are not copied, except under ZeRO-3.
        """
        tensors = self._engine.weights() if copies is None else self._copied(copies)
        made_from = self._made_from()

        def write(weights: Weights, directory: Path, place: Path) -> None:
            self._write(weights, directory, place, made_from)

        return HeldModel(weights=Weights(outline=self._engine.outline(), tensors=tensors), write_weights=write)

    def copied_bytes(self) -> int:
        """Memory that a copy takes in this process."""
        if rank() != 0:
            return 0
        stay = self._staying()
        return sum(bytes_of(tensor) for name, tensor in self._engine.outline().items() if name not in stay)

    def _copied(self, copies: Copies) -> list[tuple[str, Tensor]]:
        stay = self._staying()
        return [
            (name, tensor if name in stay else copies.of(name, tensor))
            for name, tensor in self._engine.weights()
            if rank() == 0
        ]

    def _staying(self) -> set[str]:
        """Names of the weights that are in this process, whole, and that training does not change."""
        if self._engine.zero_stage == 3:
            return set()
        named = self._engine.module.named_parameters(remove_duplicate=False)
        return {name for name, parameter in named if not parameter.requires_grad}

    def _write(self, weights: Weights, directory: Path, place: Path, made_from: Mapping[str, Any]) -> None:
        before = newest(self._checkpoints) if self._has_written else None
        frozen = Frozen(None if before is None else base_directory(before / "model"))
        loaded = self._loaded
        if self._features is not None:
            model, tower = made_whole(loaded.model, self._features.file)
            loaded = replace(loaded, model=model)
            outline = {**weights.outline, **{name: outlined(tensor) for name, tensor in tower.items()}}
            weights = Weights(outline=outline, tensors=chain(weights.tensors, tower.items()))
        save_model(loaded, weights, directory, made_from=made_from, frozen=frozen, place=place)
        self._has_written = True
