"""Weights from safetensors files into a model, strictly: everything that does not fit is listed, nothing is guessed.

Only safetensors are read; a pickle can run code when it is opened. Files are memory-mapped, so that reading needs no
second copy of the model.
"""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from mmit.errors import CheckpointError
from mmit.models.layout import disk_names, hub_name, is_clip_like, is_computed, tensors_of, tied_names

INDEX = "model.safetensors.index.json"
_SHOWN = 5


class StoredTensors:
    """The tensors of a model directory by their hub names; headers are read at once, data when asked for.

    Use as a context manager. Raises CheckpointError for a missing, damaged or pickled file.
    """

    def __init__(self, directory: Path, *, clip_like: bool) -> None:
        self.directory = directory
        self._files = ExitStack()
        self._handles: dict[str, tuple[Any, str]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for file in weight_files(directory):
            try:
                handle = self._files.enter_context(safe_open(file, framework="pt", device="cpu"))
                stored_names = list(handle.keys())
            except (SafetensorError, OSError) as error:
                self._files.close()
                raise CheckpointError(f"{file} is damaged or incomplete ({error}); copy or make it again") from error
            for stored in stored_names:
                if is_computed(stored):
                    continue
                name = hub_name(stored, is_clip_like=clip_like)
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


def read_into(model: nn.Module, directory: Path) -> None:
    """Fill a model (children vision_tower, multi_modal_projector, language_model) from a model directory.

    Raises CheckpointError that lists every missing, unexpected, empty or wrongly shaped tensor before anything is
    written, and every tensor with values that are not finite.
    """
    tower = model.get_submodule("vision_tower")
    targets = dict(tensors_of(model))
    sources = disk_names(tower, targets)
    with StoredTensors(directory, clip_like=is_clip_like(tower)) as stored:
        tied = {second: sources[first] for second, first in tied_names(model).items() if second in stored.shapes}
        _check(directory, stored.shapes, targets, sources, allowed=set(tied))
        problems: dict[str, list[str]] = defaultdict(list)
        with torch.no_grad():
            for name, target in targets.items():
                value = stored.read(sources[name])
                if value.is_floating_point() and not bool(torch.isfinite(value).all()):
                    problems["with values that are not finite"].append(name)
                target.copy_(value)
        for second, first in tied.items():
            if not torch.equal(stored.read((second,)), stored.read(first)):
                problems["that should equal the tensor they are tied to"].append(second)
    _raise_if_any(directory, problems)


def _check(
    directory: Path,
    shapes: Mapping[str, tuple[int, ...]],
    targets: Mapping[str, Tensor],
    sources: Mapping[str, tuple[str, ...]],
    *,
    allowed: set[str],
) -> None:
    problems: dict[str, list[str]] = defaultdict(list)
    expected = {name for pieces in sources.values() for name in pieces}
    problems["unexpected"] = sorted(shapes.keys() - expected - allowed)
    for name, pieces in sources.items():
        absent = [piece for piece in pieces if piece not in shapes]
        empty = [piece for piece in pieces if piece in shapes and 0 in shapes[piece]]
        problems["missing"] += absent
        problems["empty"] += empty
        if absent or empty:
            continue
        shape = list(shapes[pieces[0]])
        if len(pieces) > 1:
            shape[0] = sum(shapes[piece][0] for piece in pieces)
        if tuple(shape) != tuple(targets[name].shape):
            problems["of another shape"].append(f"{pieces[0]} is {shape}, needed is {list(targets[name].shape)}")
    _raise_if_any(directory, problems)


def _raise_if_any(directory: Path, problems: Mapping[str, list[str]]) -> None:
    parts = []
    for kind, names in problems.items():
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            parts.append(f"{len(names)} {kind}: {', '.join(names[:_SHOWN])}{more}")
    if parts:
        raise CheckpointError(f"the weights in {directory} do not fit the model; tensors {'; '.join(parts)}")
