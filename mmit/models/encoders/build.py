"""An encoder from the ``model.encoder`` section of a run file, or its frame from what a model directory keeps of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn
from transformers.initialization import no_init_weights

from mmit.config import CustomPart, OneEncoder, OpenClipEncoder, TimmEncoder, TransformersEncoder
from mmit.errors import CheckpointError, ConfigError
from mmit.models.encoders.fused import FusedTower
from mmit.models.encoders.hub_towers import read_tower, tower_from_config
from mmit.models.encoders.tower import Cls, ImageInput, Layer, LayeredTower, ReadsWeights, VisionEncoder, feature_layer
from mmit.models.placement import placement
from mmit.models.plugins import make_custom

FUSED = "fused"
"""The type under which several encoders stand in ``mmit.json``."""


def build_encoder(section: OneEncoder | Sequence[OneEncoder], *, dtype: torch.dtype) -> nn.Module:
    """The encoder that a run file's ``model.encoder`` section describes, in eval mode. Raises ConfigError."""
    if isinstance(section, Sequence):
        return FusedTower([build_encoder(one, dtype=dtype) for one in section]).eval()
    encoder = _build(section, dtype)
    if not isinstance(encoder, VisionEncoder):
        raise ConfigError(
            f"model.encoder: {type(encoder).__name__} lacks one of 'width', 'patches' and 'image' (an ImageInput)"
        )
    return encoder.eval()


def _build(section: OneEncoder, dtype: torch.dtype) -> nn.Module:
    if isinstance(section, CustomPart):
        encoder = make_custom(section.type, section.args, key="model.encoder")
        if isinstance(encoder, ReadsWeights) and placement().holds:
            encoder.read_weights()
        return encoder.to(dtype)
    with nullcontext() if placement().holds else no_init_weights():
        return _read(section, dtype)


def _read(section: TransformersEncoder | TimmEncoder | OpenClipEncoder, dtype: torch.dtype) -> nn.Module:
    layer, cls, size = section.layer, section.cls, section.image_size
    if isinstance(section, TransformersEncoder):
        return read_tower(section.path, layer=layer, cls=cls, image_size=size, dtype=dtype)
    if isinstance(section, TimmEncoder):
        from mmit.models.encoders.timm_towers import read_timm

        return read_timm(section.name, section.pretrained, layer=layer, cls=cls, image_size=size, dtype=dtype)
    from mmit.models.encoders.open_clip_towers import read_open_clip

    return read_open_clip(section.name, section.pretrained, layer=layer, cls=cls, image_size=size, dtype=dtype)


def section_of(encoder: OneEncoder | Sequence[OneEncoder]) -> dict[str, Any]:
    """The section as plain values, for ``mmit.json``."""
    if isinstance(encoder, Sequence):
        return {"type": FUSED, "encoders": [one.model_dump(mode="json") for one in encoder]}
    return encoder.model_dump(mode="json")


def describe_towers(tower: nn.Module, section: Mapping[str, Any]) -> list[dict[str, Any]]:
    """From what ``frame_towers`` builds a tower again, one description for each encoder, without their origin.

    section: as ``section_of`` gives it; an encoder of one's own is built again from its class.
    """
    fused = isinstance(tower, FusedTower)
    parts = list(tower.towers) if fused else [tower]
    sections = section["encoders"] if fused else [section]
    return [_describe(part, one) for part, one in zip(parts, sections, strict=True)]


def _describe(tower: nn.Module, section: Mapping[str, Any]) -> dict[str, Any]:
    if not isinstance(tower, LayeredTower):
        return {"library": "custom", "config": {"type": section["type"], "args": dict(section.get("args", {}))}}
    return {
        **tower.architecture(),
        "layer": feature_layer(tower),
        "cls": "drop" if tower.drops_cls else "keep",
        "image": {"size": list(tower.image.size), "mean": list(tower.image.mean), "std": list(tower.image.std)},
    }


def frame_towers(described: Sequence[Mapping[str, Any]], *, dtype: torch.dtype) -> nn.Module:
    """The encoder with unset weights from its descriptions. Raises CheckpointError for a library that is unknown."""
    towers = [_frame(one, dtype).eval() for one in described]
    return towers[0] if len(towers) == 1 else FusedTower(towers).eval()


def _frame(described: Mapping[str, Any], dtype: torch.dtype) -> nn.Module:
    library, config = described["library"], dict(described["config"])
    if library == "custom":
        return make_custom(config["type"], config["args"], key="model.encoder").to(dtype)
    layer, cls, image = layer_of(described["layer"]), _cls(described["cls"]), _image(described["image"])
    if library == "transformers":
        statistics = {"image_mean": list(image.mean), "image_std": list(image.std)}
        return tower_from_config(config, statistics, layer=layer, cls=cls, dtype=dtype)
    if library == "timm":
        from mmit.models.encoders.timm_towers import timm_frame

        return timm_frame(config, layer=layer, cls=cls, image=image, dtype=dtype)
    if library == "open_clip":
        from mmit.models.encoders.open_clip_towers import open_clip_frame

        return open_clip_frame(config, layer=layer, cls=cls, image=image, dtype=dtype)
    raise CheckpointError(f"mmit.json: a tower of the library '{library}' cannot be built; update mmit")


def layer_of(stored: int | Sequence[int]) -> Layer:
    """The layer, or the layers, as JSON keeps them."""
    return stored if isinstance(stored, int) else tuple(stored)


def _cls(stored: str) -> Cls:
    return "keep" if stored == "keep" else "drop"


def _image(stored: Mapping[str, Any]) -> ImageInput:
    return ImageInput(size=tuple(stored["size"]), mean=tuple(stored["mean"]), std=tuple(stored["std"]))
