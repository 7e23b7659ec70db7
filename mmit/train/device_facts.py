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
from mmit.train.run_files import DEVICE, ON_HOST
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
    for what, name, count, where in _all(engine):
        kind = what + (ON_HOST if where.type != device().type else "")
        part = names[part_number(name)]
        found.setdefault(kind, {})[part] = found.get(kind, {}).get(part, 0) + count
    return found


def _all(engine: Engine) -> Iterator[tuple[str, str, int, torch.device]]:
    for name, parameter in engine.module.named_parameters():
        for tensor in _tensors(parameter):
            yield "parameters", name, tensor.nbytes, tensor.device
    if engine.zero_stage < 2:
        for name, parameter in trained(engine.module):
            yield "gradients", name, parameter.nbytes, parameter.device
    size = next(_tensors(parameter)[0].element_size() for _, parameter in trained(engine.module))
    own_weights = is_partitioned(engine)
    for piece in pieces(engine):
        where = piece.read(WEIGHT).device
        if engine.zero_stage >= 2:
            yield "gradients", piece.name, piece.length * size, where
        yield "optimizer", piece.name, piece.length * 4 * (2 + own_weights), where  # fp32


def _tensors(parameter: Any) -> list[Tensor]:  # noqa: ANN401  (DeepSpeed adds attributes)
    """What is kept of a parameter: under ZeRO-3 this rank's piece, and the whole of a small one."""
    if not hasattr(parameter, "ds_id"):
        return [parameter.data]
    return [parameter.ds_tensor, *([parameter.data] if parameter.ds_persist else [])]
