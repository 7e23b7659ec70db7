"""The weight files of a model directory, filled tensor by tensor as the weights come by."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import split_torch_state_dict_into_shards
from torch import Tensor

from mmit.models.formats import write_json
from mmit.models.stored import INDEX
from mmit.models.tensor_file import TensorFile, bytes_of

SHARD_BYTES = 5 * 10**9
"""Weights beyond this size are split over several files."""

FROZEN, TRAINED = "frozen", "trained"


@dataclass(frozen=True)
class Frozen:
    """Weights that stay the same from one writing to the next: linked to the files in ``written``, where that is."""

    written: Path | None


@dataclass(frozen=True, kw_only=True)
class Weights:
    """The weights of a model that are not read from it: they come one by one, and need not be in memory at once.

    outline: shape and dtype of each by its name in memory, as a tensor with or without storage. tensors: name and
    values, in any order; names that are not wanted may be among them.
    """

    outline: Mapping[str, Tensor]
    tensors: Iterable[tuple[str, Tensor]]

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> Weights:
        """Weights that are all in memory."""
        return cls(outline=state, tensors=state.items())


class WeightFiles:
    """The files of one directory being written: each tensor is put by its name on disk.

    outline: shape and dtype of every tensor. trained: of a model with an adapter, the names that train; the others go
    into files of their own, which are linked where ``frozen`` has them. None for one set of files.
    """

    def __init__(
        self, directory: Path, outline: Mapping[str, Tensor], *, frozen: Frozen | None, trained: Collection[str | None]
    ) -> None:
        sets = {"model": dict(outline)} if frozen is None else _split(outline, trained)
        place: dict[str, str] = {}
        self._open: dict[str, TensorFile] = {}
        for prefix, tensors in sets.items():
            split = split_torch_state_dict_into_shards(
                tensors, max_shard_size=SHARD_BYTES, filename_pattern=f"{prefix}{{suffix}}.safetensors"
            )
            place |= split.tensor_to_filename
            for name, names in split.filename_to_tensors.items():
                file = directory / name
                if prefix != FROZEN or frozen is None or not _linked(frozen, file):
                    outlines = {key: tensors[key] for key in names}
                    self._open[name] = TensorFile(file, outlines, metadata={"format": "pt"})
        self._place = place
        if len(set(place.values())) > 1 or FROZEN in sets:
            size = sum(bytes_of(tensor) for tensor in outline.values())
            write_json(directory / INDEX, {"metadata": {"total_size": size}, "weight_map": place})

    def put(self, name: str, values: Tensor) -> None:
        """Write one tensor, unless its file is there already."""
        if (file := self._open.get(self._place[name])) is not None:
            file.put(name, values)

    def close(self) -> None:
        """Wait until the disk has all of them."""
        for file in self._open.values():
            file.close()

    def abandon(self) -> None:
        """Leave files that could not be written whole."""
        for file in self._open.values():
            file.abandon()


def _split(tensors: Mapping[str, Tensor], trained: Collection[str | None]) -> dict[str, dict[str, Tensor]]:
    return {
        file: {name: tensor for name, tensor in tensors.items() if (name in trained) == (file == TRAINED)}
        for file in (FROZEN, TRAINED)
    }


def _linked(frozen: Frozen, file: Path) -> bool:
    """Let ``file`` be one more name of the file that was written before; False where there is none, or no links."""
    try:
        if frozen.written is None:
            return False
        os.link(frozen.written / file.name, file)
    except OSError:
        return False
    return True
