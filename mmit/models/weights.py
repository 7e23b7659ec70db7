"""Weights from files into a model, strictly: everything that does not fit is listed, nothing is guessed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mmit.errors import CheckpointError
from mmit.models.layout import disk_names, tensors_of, tied_names
from mmit.models.stored import StoredTensors

_SHOWN = 5


def read_into(model: nn.Module, stored: StoredTensors) -> None:
    """Fill a model (children vision_tower, multi_modal_projector, language_model) with the tensors of a directory.

    Raises CheckpointError that lists every missing, unexpected, empty or wrongly shaped tensor before anything is
    written, and every tensor with values that are not finite.
    """
    targets = dict(tensors_of(model))
    sources = disk_names(model.get_submodule("vision_tower"), targets)
    tied = {second: sources[first] for second, first in tied_names(model).items() if second in stored.shapes}
    _check(stored.where, stored.shapes, targets, sources, allowed=set(tied))
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
    _raise_if_any(stored.where, problems)


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
