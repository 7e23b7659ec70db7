"""Tensors as they lie in files: headers at once, data when asked for, under the names that the model wants.

Files are memory-mapped, so that reading needs no second copy of the model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmit.errors import CheckpointError
from mmit.models.layout import is_computed
from mmit.models.pickles import read_pickled

INDEX = "model.safetensors.index.json"
_WHOLE = ((INDEX, "model.safetensors"), ("pytorch_model.bin.index.json", "pytorch_model.bin"))


@dataclass(frozen=True)
class Source:
    """Weight files (safetensors or ``*.bin``), and what their tensors are called on the hub; None leaves one out."""

    files: Sequence[Path]
    rename: Callable[[str], str | None]


class StoredTensors:
    """The tensors of several sources by their hub names; where two sources hold one name, the first one counts.

    where: the directory that messages name. Use as a context manager. Raises CheckpointError for a file that is
    missing or damaged, and for a pickle that asks for more than tensors.
    """

    def __init__(self, sources: Sequence[Source], *, where: Path) -> None:
        self.where = where
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._open = ExitStack()
        self._read: dict[str, Callable[[], Tensor]] = {}
        self._changes: dict[str, Callable[[Tensor], Tensor]] = {}
        for source in sources:
            self.add(source)

    def add(self, source: Source) -> None:
        """Take from ``source`` what is not there yet."""
        found: dict[str, tuple[tuple[int, ...], Callable[[], Tensor]]] = {}
        for file in source.files:
            try:
                for stored, shape, read in self._tensors_in(file):
                    name = None if is_computed(stored) else source.rename(stored)
                    if name is not None:
                        found[name] = (shape, read)
            except CheckpointError:
                self._open.close()
                raise
        for name, (shape, read) in found.items():
            if name not in self.shapes:
                self.shapes[name], self._read[name] = shape, read

    def change(self, name: str, change: Callable[[Tensor], Tensor]) -> None:
        """Give out ``change(tensor)``, of the same shape, in place of the tensor ``name``."""
        self._changes[name] = change

    def __enter__(self) -> StoredTensors:
        return self

    def __exit__(self, *_: object) -> None:
        self._read.clear()
        self._open.close()

    def read(self, names: tuple[str, ...]) -> Tensor:
        """One tensor, or several joined along their first dimension."""
        parts = [self._one(name) for name in names]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _one(self, name: str) -> Tensor:
        tensor = self._read[name]()
        return self._changes[name](tensor) if name in self._changes else tensor

    def _tensors_in(self, file: Path) -> Iterator[tuple[str, tuple[int, ...], Callable[[], Tensor]]]:
        if file.suffix == ".bin":
            for name, tensor in read_pickled(file).items():
                yield name, tuple(tensor.shape), partial(Tensor.detach, tensor)
            return
        try:
            handle: Any = self._open.enter_context(safe_open(file, framework="pt", device="cpu"))
            names = list(handle.keys())
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{file} is damaged or incomplete ({error}); copy or make it again") from error
        for name in names:
            yield name, tuple(handle.get_slice(name).get_shape()), partial(handle.get_tensor, name)


def weight_files(directory: Path) -> list[Path]:
    """The weight files of a model directory, all shards of an index; safetensors before ``*.bin``.

    Raises CheckpointError where there are none, or where one that the index names is missing.
    """
    for index_name, single in _WHOLE:
        if (directory / index_name).is_file():
            return _shards(directory / index_name)
        if (directory / single).is_file():
            return [directory / single]
    raise CheckpointError(f"{directory} holds no weights: model.safetensors is missing")


def has_weights(directory: Path) -> bool:
    """True where ``weight_files`` would look further than the directory's name."""
    return any((directory / name).is_file() for pair in _WHOLE for name in pair)


def _shards(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, KeyError, AttributeError) as error:
        raise CheckpointError(f"{index} is damaged: it must hold a 'weight_map'") from error
    files = [index.parent / name for name in names]
    for file in files:
        if file.parent != index.parent or not file.is_file():
            raise CheckpointError(f"{file} is missing, though {index.name} names it")
    return files
