"""A LoRA directory of peft (arXiv 2106.09685), folded into the weights it was trained on: W + B A alpha / r.

Plain arithmetic on tensors as they are read, in fp32; nothing of the adapter is left in the model. Training with LoRA
is another matter (see adapters).
"""

from __future__ import annotations

import math
import re
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mmit.errors import CheckpointError
from mmit.models.formats.contents import read_json
from mmit.models.formats.original_names import hub_name_of
from mmit.models.stored import Source, StoredTensors

ADAPTER_CONFIG = "adapter_config.json"
_FILES = ("adapter_model.safetensors", "adapter_model.bin")
_PIECE = re.compile(r"^(.*)\.lora_([AB])(?:\.default)?\.weight$")
_REFUSED = {"use_dora": "DoRA", "alpha_pattern": "an alpha of its own for some layers"}


def is_adapter(directory: Path) -> bool:
    """True for a directory that holds an adapter of peft."""
    return (directory / ADAPTER_CONFIG).is_file()


def fold(stored: StoredTensors, directory: Path) -> None:
    """Make ``stored`` give out the weights with the adapter of ``directory`` in them.

    Raises CheckpointError for an adapter of another kind, or one that does not fit the weights.
    """
    config = read_json(directory / ADAPTER_CONFIG)
    if config.get("peft_type") != "LORA":
        raise CheckpointError(f"{directory} holds an adapter of type {config.get('peft_type')}; LoRA can be read")
    for key, meaning in _REFUSED.items():
        if config.get(key):
            raise CheckpointError(
                f"{directory}/{ADAPTER_CONFIG}: {key}: {meaning} cannot be folded in; merge the adapter with peft first"
            )
    file = next((directory / name for name in _FILES if (directory / name).is_file()), None)
    if file is None:
        raise CheckpointError(f"{directory} lacks {' or '.join(_FILES)}, the adapter's weights")
    with StoredTensors([Source([file], _piece_only)], where=directory) as pieces:
        names = sorted({name.removesuffix(".A").removesuffix(".B") for name in pieces.shapes})
        for name in names:
            _fold_one(stored, pieces, name, config, file)


def trained_whole(stored_name: str) -> str | None:
    """The hub's name of a tensor that an adapter's file holds whole (biases, saved modules); None for a piece."""
    if _PIECE.match(stored_name):
        return None
    return hub_name_of(stored_name.replace(".modules_to_save.default", "").replace(".base_layer.", "."))


def adapter_source(directory: Path) -> Source:
    """The tensors that the adapter's file holds whole."""
    return Source([directory / name for name in _FILES if (directory / name).is_file()][:1], trained_whole)


def _piece_only(stored_name: str) -> str | None:
    found = _PIECE.match(stored_name)
    return f"{hub_name_of(found[1] + '.weight')}.{found[2]}" if found else None


def _fold_one(stored: StoredTensors, pieces: StoredTensors, name: str, config: dict[str, Any], file: Path) -> None:
    shapes = [pieces.shapes.get(f"{name}.{half}") for half in "AB"]
    down, up = shapes
    if down is None or up is None:
        raise CheckpointError(f"{file}: the adapter of {name} lacks its {'A' if down is None else 'B'} half")
    whole = stored.shapes.get(name)
    swapped = bool(config.get("fan_in_fan_out"))
    made = (up[0], down[1]) if not swapped else (down[1], up[0])
    if len(down) != 2 or down[0] != up[1] or whole != made:
        raise CheckpointError(
            f"{file}: the adapter of {name} makes {list(made)} (rank {down[0]} and {up[1]}), the base has "
            f"{'no such tensor' if whole is None else list(whole)}; give the model it was trained on as base"
        )
    alpha, rank = float(config.get("lora_alpha", down[0])), down[0]
    scale = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    a, b = pieces.read((f"{name}.A",)), pieces.read((f"{name}.B",))
    stored.change(name, partial(_with_delta, a=a, b=b, scale=scale, swapped=swapped))


def _with_delta(weight: Tensor, *, a: Tensor, b: Tensor, scale: float, swapped: bool) -> Tensor:
    delta = (b.float() @ a.float()) * scale
    return (weight.to(torch.float32) + (delta.T if swapped else delta)).to(weight.dtype)
