"""Weights from files into a model, strictly: everything that does not fit is listed, nothing is guessed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from mmit.errors import CheckpointError
from mmit.models.absent import frame_of
from mmit.models.layout import disk_names, tensors_of, tied_names
from mmit.models.placement import Placement, placement
from mmit.models.stored import StoredTensors

_SHOWN = 5


def read_into(model: nn.Module, stored: StoredTensors, *, part: str = "", may_lack: Collection[str] = ()) -> None:
    """Fill a model (children vision_tower, multi_modal_projector, language_model) with the tensors of a directory.

    part: the beginning of the names to read; all others in the directory are passed over, as are those of an absent
    tower. may_lack: names of tensors that stay as they are where the directory has none. Under the placement in force:
    one parameter at a time is whole. Raises CheckpointError that lists every missing, unexpected, empty or wrongly
    shaped tensor before anything is written, and every one with values that are not finite.
    """
    kept = placement()
    targets = {name: t for name, t in tensors_of(model) if name not in may_lack or name in stored.shapes}
    tower = model.get_submodule("vision_tower")
    frame = frame_of(tower)
    sources = disk_names(frame, targets)
    tied = {second: sources[first] for second, first in tied_names(model).items() if second in stored.shapes}
    shapes = {name: kept.shape(target) for name, target in targets.items()}
    passed_over = {name for name in stored.shapes if not name.startswith(part)}
    if frame is not tower:
        absent = disk_names(frame, [f"vision_tower.{name}" for name, _ in tensors_of(frame)])
        passed_over |= {name for pieces in absent.values() for name in pieces}
    _check(stored.where, stored.shapes, shapes, sources, allowed=set(tied) | passed_over)
    if not kept.holds:
        return
    problems: dict[str, list[str]] = defaultdict(list)
    for name, target in targets.items():
        if not _fill(target, stored, sources[name], kept):
            problems["with values that are not finite"].append(name)
    for second, first in tied.items() if kept.writes else ():
        if not torch.equal(stored.read((second,)), stored.read(first)):
            problems["that should equal the tensor they are tied to"].append(second)
    _raise_if_any(stored.where, kept.told(_listed(problems)))


@torch.no_grad()
def _fill(target: Tensor, stored: StoredTensors, pieces: tuple[str, ...], kept: Placement) -> bool:
    """Put stored values into a tensor; False where they are not finite."""
    is_placed = isinstance(target, nn.Parameter)
    if is_placed and not kept.writes:
        with kept.whole([target], write=True):
            return True
    value = stored.read(pieces)
    with kept.whole([target] if is_placed else [], write=True):
        target.copy_(value)
    return not value.is_floating_point() or bool(torch.isfinite(value).all())


def _check(
    directory: Path,
    shapes: Mapping[str, tuple[int, ...]],
    needed: Mapping[str, tuple[int, ...]],
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
        if tuple(shape) != needed[name]:
            problems["of another shape"].append(f"{pieces[0]} is {shape}, needed is {list(needed[name])}")
    _raise_if_any(directory, _listed(problems))


def _listed(problems: Mapping[str, list[str]]) -> str:
    parts = []
    for kind, names in problems.items():
        if names:
            more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
            parts.append(f"{len(names)} {kind}: {', '.join(names[:_SHOWN])}{more}")
    return "; ".join(parts)


def _raise_if_any(directory: Path, listed: str) -> None:
    if listed:
        raise CheckpointError(f"the weights in {directory} do not fit the model; tensors {listed}")
