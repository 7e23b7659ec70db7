"""The families of vision towers in transformers: their classes, and where their parts are in memory and on disk."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from transformers import (
    Blip2VisionConfig,
    Blip2VisionModel,
    CLIPVisionConfig,
    CLIPVisionModel,
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
    InstructBlipVisionConfig,
    InstructBlipVisionModel,
    SiglipVisionConfig,
    SiglipVisionModel,
)

# What transformers writes into every configuration and means nothing in this one.
NOISE = (
    *("_name_or_path", "dtype", "transformers_version", "id2label", "label2id", "problem_type", "return_dict"),
    *("output_hidden_states", "output_attentions", "chunk_size_feed_forward", "is_encoder_decoder"),
)
_DINO = (
    ("attention.q_proj.", "attention.attention.query."),
    ("attention.k_proj.", "attention.attention.key."),
    ("attention.v_proj.", "attention.attention.value."),
    ("attention.o_proj.", "attention.output.dense."),
)


@dataclass(frozen=True)
class Family:
    """One kind of tower: its classes, where its layers and position embeddings are, its names on disk."""

    config: Any
    model: Any
    layers: str
    positions: str | None
    class_tokens: int
    prefix: str = "vision_tower."
    renamed: tuple[tuple[str, str], ...] = ()
    """Parts of names in memory, and in their place on disk: what transformers itself writes."""
    norm: str = ""
    """A norm that belongs to the output of the last layer: what the family's models read."""


_CLIP_PREFIX = "vision_tower.vision_model."
_CLIP_POSITIONS, _DINO_POSITIONS = "embeddings.position_embedding.weight", "embeddings.position_embeddings"
_BLIP_POSITIONS = "embeddings.position_embedding"
FAMILIES = {
    "clip_vision_model": Family(
        CLIPVisionConfig, CLIPVisionModel, "encoder.layers", _CLIP_POSITIONS, 1, prefix=_CLIP_PREFIX
    ),
    "siglip_vision_model": Family(
        SiglipVisionConfig, SiglipVisionModel, "encoder.layers", _CLIP_POSITIONS, 0, prefix=_CLIP_PREFIX
    ),
    "dinov2": Family(Dinov2Config, Dinov2Model, "encoder.layer", _DINO_POSITIONS, 1, renamed=_DINO),
    "dinov2_with_registers": Family(
        Dinov2WithRegistersConfig, Dinov2WithRegistersModel, "encoder.layer", _DINO_POSITIONS, 1, renamed=_DINO
    ),
    "blip_2_vision_model": Family(
        Blip2VisionConfig, Blip2VisionModel, "encoder.layers", _BLIP_POSITIONS, 1, norm="post_layernorm"
    ),
    "instructblip_vision_model": Family(
        InstructBlipVisionConfig, InstructBlipVisionModel, "encoder.layers", _BLIP_POSITIONS, 1, norm="post_layernorm"
    ),
    # its positions are rotary: computed from the size of the picture
    "dinov3_vit": Family(
        DINOv3ViTConfig, DINOv3ViTModel, "model.layer", None, 1, renamed=(("model.layer.", "layer."),)
    ),
}
"""By the ``model_type`` of a vision configuration."""
