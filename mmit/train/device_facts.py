"""What a rank holds in memory by part of the model, and what its devices can do: ``device.json`` in a stage's folder.

What is counted here stays from step to step. The rest of the peak, which every line of the metrics tells, is what comes
and goes: activations, batches, buckets that gradients travel in; on a CPU also the libraries.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mmit.models.rules import PARTS
from mmit.train.engine import device
from mmit.train.pieces import WEIGHT, is_partitioned, pieces, trained
from mmit.train.run_files import DEVICE, ON_DISK, ON_HOST
from mmit.train.update_ratio import part_number

if TYPE_CHECKING:
    from mmit.train.engine import Engine
    from mmit.train.work import Work


def write_device(folder: Path, engine: Engine, work: Work | None) -> None:
    """Write ``device.json``, for this rank."""
    where = device()
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else where.type
    content = {"device": name, "peak_flops": None if work is None else work.peak, "held": held(engine)}
    (folder / DEVICE).write_text(json.dumps(content, indent=1), encoding="utf-8")


def held(engine: Engine) -> dict[str, dict[str, int]]:
    """What (parameters, gradients, optimizer) -> part of the model -> bytes that this rank keeps.

    gradients: between backward pass and update. optimizer: moments, and master weights where the engine has its own.
    """
    found: dict[str, dict[str, int]] = {}
    names = list(PARTS)
    for what, name, count, place in _all(engine):
        kind, part = what + place, names[part_number(name)]
        found.setdefault(kind, {})[part] = found.get(kind, {}).get(part, 0) + count
    return found


def _all(engine: Engine) -> Iterator[tuple[str, str, int, str]]:
    """What, name of the parameter, bytes, and behind the kind where they lie, if not on the device."""
    size = 0
    for name, parameter in engine.module.named_parameters():
        for tensor in _tensors(parameter):
            yield "parameters", name, tensor.nbytes, _place(tensor)
        size = parameter.element_size() if parameter.requires_grad else size
    if engine.zero_stage < 2:
        for name, parameter in trained(engine.module):
            yield "gradients", name, parameter.nbytes, _place(parameter)
    fp32 = 4 * (2 + is_partitioned(engine))
    for name, length, place in _pieces(engine):
        if engine.zero_stage >= 2:
            yield "gradients", name, length * size, "" if place == ON_DISK else place
        yield "optimizer", name, length * fp32, place


def _pieces(engine: Engine) -> Iterator[tuple[str, int, str]]:
    """Name, numbers and place of what this rank updates."""
    if engine.zero_stage < 3:
        for piece in pieces(engine):
            yield piece.name, piece.length, _place(piece.read(WEIGHT))
        return
    outer: Any = engine.optimizer
    place = ON_DISK if outer.swap_optimizer else _place(outer.fp32_partitioned_groups_flat[0])
    for name, parameter in trained(engine.module):
        held: Any = parameter
        yield name, held.ds_tensor.numel(), place


def _place(tensor: Tensor) -> str:
    return "" if tensor.device.type == device().type else ON_HOST


def _tensors(parameter: Any) -> list[Tensor]:  # noqa: ANN401  (DeepSpeed adds attributes)
    """What is kept of a parameter: under ZeRO-3 this rank's piece, and the whole of a small one."""
    if not hasattr(parameter, "ds_id"):
        return [parameter.data]
    return [parameter.ds_tensor, *([parameter.data] if parameter.ds_persist else [])]
