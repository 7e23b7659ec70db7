"""Tensors as they lie in files: headers at once, data when asked for, under the names that the model wants.

Only safetensors are read; a pickle can run code when it is opened. Files are memory-mapped, so that reading needs no
second copy of the model.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from mmit.errors import CheckpointError
from mmit.models.layout import is_computed

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Source:
    """Weight files, and what their tensors are called on the hub."""

    files: Sequence[Path]
    rename: Callable[[str], str]


class StoredTensors:
    """The tensors of several sources by their hub names; where two sources hold one name, the later one counts.

    where: the directory that messages name. Use as a context manager. Raises CheckpointError for a missing, damaged or
    pickled file.
    """

    def __init__(self, sources: Sequence[Source], *, where: Path) -> None:
        self.where = where
        self._files = ExitStack()
        self._handles: dict[str, tuple[Any, str]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for source in sources:
            for file in source.files:
                self._add(file, source.rename)

    def _add(self, file: Path, rename: Callable[[str], str]) -> None:
        try:
            handle = self._files.enter_context(safe_open(file, framework="pt", device="cpu"))
            stored_names = list(handle.keys())
        except (SafetensorError, OSError) as error:
            self._files.close()
            raise CheckpointError(f"{file} is damaged or incomplete ({error}); copy or make it again") from error
        for stored in stored_names:
            if is_computed(stored):
                continue
            name = rename(stored)
            self._handles[name] = (handle, stored)
            self.shapes[name] = tuple(handle.get_slice(stored).get_shape())

    def __enter__(self) -> StoredTensors:
        return self

    def __exit__(self, *_: object) -> None:
        self._handles.clear()
        self._files.close()

    def read(self, names: tuple[str, ...]) -> Tensor:
        """One tensor, or several joined along their first dimension."""
        parts = [self._handles[name][0].get_tensor(self._handles[name][1]) for name in names]
        return parts[0] if len(parts) == 1 else torch.cat(parts)


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a model directory, all shards of its index. Raises CheckpointError."""
    index = directory / INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index} is damaged: it must hold a 'weight_map'") from error
        files = [directory / name for name in names]
    else:
        files = [directory / "model.safetensors"]
    for file in files:
        if not file.is_file():
            pickled = next(iter(sorted(directory.glob("*.bin"))), None)
            hint = f"; {pickled.name} is a pickle, which is not read: convert it to safetensors" if pickled else ""
            raise CheckpointError(f"{file} is missing{hint}")
    return files
