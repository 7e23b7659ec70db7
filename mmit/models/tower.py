"""The tower of a model alone, without the language model, and what its outputs depend on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers.initialization import no_init_weights

from mmit.config import ComposedModel, WholeModel
from mmit.errors import ConfigError
from mmit.images import ImageSpec
from mmit.models.adapter_names import adapts_tower, holds_adapter
from mmit.models.encoders import LayeredTower, VisionEncoder, build_encoder, describe_towers, encoders_of, section_of
from mmit.models.formats import Contents, Format, detect, read_contents
from mmit.models.formats.contents import buildable
from mmit.models.layout import tensors_of, to_disk
from mmit.models.load import find_model_directory, open_section
from mmit.models.weights import read_into

_OF_ARCHITECTURE = ("model_type", "hidden_act", "layer_norm_eps", "num_attention_heads", "patch_size", "image_size")
_NOT_OF_THE_TOWER = ("tokens_per_tile", "max_pixels")


@dataclass(frozen=True, kw_only=True)
class Tower:
    """A tower in eval mode with its weights, and the run-file section that describes it."""

    module: nn.Module
    section: Mapping[str, Any]

    @property
    def alone(self) -> nn.Module:
        """A module that holds the tower as a model does, and nothing else."""
        return _alone(self.module)

    @property
    def size(self) -> tuple[int, int]:
        """(P, D_vision) of its outputs for a tile."""
        assert isinstance(self.module, VisionEncoder), "build_encoder checks it"
        return self.module.patches, self.module.width


def read_tower_alone(section: ComposedModel | WholeModel, *, weights: Path | None, dtype: torch.dtype) -> Tower:
    """The tower of a run file's ``model`` section, on the CPU.

    weights: a model directory (or a stage's folder) whose tower it takes in place of its own. Raises ConfigError and
    CheckpointError.
    """
    if isinstance(section, ComposedModel):
        module, described = build_encoder(section.encoder, dtype=dtype), section_of(section.encoder)
    else:
        contents, form = open_section(section)
        with buildable(contents.directory), no_init_weights():
            module, described = form.tower(contents, dtype)
        if weights is None:
            _fill(module, form, contents, find_model_directory(section.path))
    if weights is not None:
        directory = find_model_directory(weights)
        contents = read_contents(directory)
        _fill(module, detect(contents), contents, directory)
    return Tower(module=module.eval(), section=described)


def _fill(tower: nn.Module, form: Format, contents: Contents, directory: Path) -> None:
    if holds_adapter(directory) and adapts_tower(directory):
        raise ConfigError(
            f"{directory} holds an adapter for the vision tower, whose features cannot be cached beside it; "
            "`mmit merge` makes one plain model of the two"
        )
    with form.tensors(contents, tower) as stored:
        read_into(_alone(tower), stored, part="vision_tower.")


def _alone(tower: nn.Module) -> nn.Module:
    model = nn.Module()
    model.vision_tower = tower
    return model


def parts_of(tower: Tower, spec: ImageSpec) -> dict[str, str]:
    """All that decides a tower's outputs for an image, by name: its weights, how it is read, and the preprocessing."""
    module = tower.module
    parts = {
        "weights": _digest(module),
        "precision": str(next(module.parameters()).dtype).removeprefix("torch."),
    }
    described = describe_towers(module, tower.section)
    for number, (encoder, one) in enumerate(zip(encoders_of(module), described, strict=True)):
        where = f"encoder {number} " if len(described) > 1 else ""
        parts[f"{where}architecture"] = _architecture(encoder, one)
        parts |= {f"{where}{name}": _shown(one[name]) for name in ("layer", "cls") if name in one}
    for name, value in spec.to_dict().items():
        if name not in _NOT_OF_THE_TOWER:
            parts[f"image {name}"] = _shown(value)
    return parts


def _shown(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _architecture(encoder: VisionEncoder, described: Mapping[str, Any]) -> str:
    """What shapes do not tell. The same for a tower of open_clip and for its copy in a model directory."""
    form = encoder.hub_form() if isinstance(encoder, LayeredTower) else None
    if form is None:
        return json.dumps([described["library"], described["config"]], sort_keys=True)
    return " ".join(f"{name} {form.config[name]}" for name in _OF_ARCHITECTURE if name in form.config)


def _digest(tower: nn.Module) -> str:
    """A hash of all tensors by their names on disk: the same wherever they were read from."""
    found: dict[str, str] = {}
    for name, tensor in tensors_of(tower):
        for stored, part in to_disk(tower, {f"vision_tower.{name}": tensor}).items():
            found[stored] = _hash(part)
    text = "\n".join(f"{name} {found[name]}" for name in sorted(found))
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _hash(tensor: Tensor) -> str:
    raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()
    return f"{tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(raw.data).hexdigest()}"
