"""Vision encoders: from pixels to patch features, and what a picture must look like to enter one.

An encoder is anything that fits ``VisionEncoder``. Built in are the towers of transformers (``hub_towers``), open_clip
(``open_clip_towers``, the only module that imports it) and timm (``timm_towers``); several are fused (``fused``); a run
file may name its own class as ``package.module:Class``.
"""

from __future__ import annotations

from mmit.models.encoders.build import build_encoder, describe_towers, frame_towers, layer_of, section_of
from mmit.models.encoders.families import NOISE
from mmit.models.encoders.fused import FusedTower, encoders_of
from mmit.models.encoders.hub_towers import TransformersTower, check_is_there, readable, tower_from_config
from mmit.models.encoders.tower import (
    Cls,
    HubForm,
    ImageInput,
    Layer,
    LayeredTower,
    ReadsWeights,
    VisionEncoder,
    feature_layer,
)

__all__ = [
    "NOISE",
    "Cls",
    "FusedTower",
    "HubForm",
    "ImageInput",
    "Layer",
    "LayeredTower",
    "ReadsWeights",
    "TransformersTower",
    "VisionEncoder",
    "build_encoder",
    "check_is_there",
    "describe_towers",
    "encoders_of",
    "feature_layer",
    "frame_towers",
    "layer_of",
    "readable",
    "section_of",
    "tower_from_config",
]
