"""Tensor names of LLaVA's original code, and what the hub calls them.

    model.mm_projector.0, .2, ...              multi_modal_projector.linear_1, .linear_2, ... (one layer: no number)
    model.vision_tower.vision_tower.*          vision_tower.*
    model.image_newline                        image_newline
    model.*, lm_head.*                         language_model.model.*, language_model.lm_head.*

Files with trained parts only put ``base_model.model.`` in front (peft's wrapper).
"""

from __future__ import annotations

import re

_WRAPPER = "base_model.model."
_PROJECTOR = re.compile(r"(?:^|\.)mm_projector\.(?:(\d+)\.)?(weight|bias)$")
_TOWER = "vision_tower.vision_tower."
_HUB_TOWER = "vision_tower.vision_model."
_HUB_PROJECTOR = re.compile(r"multi_modal_projector\.linear_(\d+)\.(weight|bias)$")
# the vision half of a CLIP or SigLIP model, as versions 4 and 5 of transformers name it
_TOWER_PARTS = ("embeddings.", "encoder.", "pre_layrnorm.", "post_layernorm.", "head.")


def hub_name_of(stored: str) -> str:
    """The hub's name of a tensor of the original code."""
    name = stored.removeprefix(_WRAPPER)
    if found := _PROJECTOR.search(name):
        number = int(found[1] or 0) // 2 + 1
        return f"multi_modal_projector.linear_{number}.{found[2]}"
    if _TOWER in name:
        inner = name.partition(_TOWER)[2]
        return _HUB_TOWER + inner.removeprefix("vision_model.")
    if name.endswith("image_newline"):
        return "image_newline"
    return f"language_model.{name}"


def original_name_of(name: str) -> str:
    """The original code's name of a tensor that the hub calls ``name``."""
    if found := _HUB_PROJECTOR.match(name):
        return f"model.mm_projector.{2 * (int(found[1]) - 1)}.{found[2]}"
    if name.startswith("vision_tower."):
        return "model.vision_tower." + name
    if name == "image_newline":
        return "model.image_newline"
    return name.removeprefix("language_model.")


def tower_name_of(stored: str) -> str | None:
    """The hub's name of a tensor in a CLIP or SigLIP directory; None for the text half."""
    inner = stored.removeprefix("vision_model.")
    if inner != stored or stored.startswith(_TOWER_PARTS):
        return _HUB_TOWER + inner
    return None


def language_model_name_of(stored: str) -> str:
    """The hub's name of a tensor in a language model's own directory."""
    return f"language_model.{stored}"
