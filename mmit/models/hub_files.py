"""The configuration files of a model directory, as LLaVA models on the hub have them.

Written so that transformers 4 and 5, vLLM and SGLang agree: ``rope_theta`` beside version 5's ``rope_parameters``,
``torch_dtype``, both ``processor_config.json`` and ``preprocessor_config.json``. Pure functions from values to
dictionaries; ``save`` writes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import transformers
from torch import nn
from transformers import PreTrainedModel

from mmit.images import ImageSpec
from mmit.models.encoders import NOISE, LayeredTower, feature_layer
from mmit.models.language_models import token_table
from mmit.models.layout import hub_form
from mmit.models.vlm import VisionLanguageModel

IMAGE_TOKEN = "<image>"  # noqa: S105 - not a password
_BICUBIC = 3


def common_config(model: VisionLanguageModel, *, pad_id: int, dtype: torch.dtype) -> dict[str, Any]:
    """What ``config.json`` says of image token, language model and tower, alike in all formats of transformers."""
    config: dict[str, Any] = {
        "image_token_index": model.image_id,
        "image_seq_length": model.spec.tokens_per_tile,
        "pad_token_id": pad_id,
        "text_config": text_config(model.language_model, dtype=dtype),
        "tie_word_embeddings": bool(model.language_model.config.get_text_config().tie_word_embeddings),
        "torch_dtype": str(dtype).removeprefix("torch."),
        "transformers_version": transformers.__version__,
    }
    if hub_form(model.vision_tower) is not None:
        assert isinstance(model.vision_tower, LayeredTower), "only such a tower has a hub form"
        config |= {
            "vision_config": vision_config(model.vision_tower),
            "vision_feature_layer": feature_layer(model.vision_tower),
            "vision_feature_select_strategy": select_strategy(model.vision_tower),
        }
    return config


def text_config(language_model: PreTrainedModel, *, dtype: torch.dtype) -> dict[str, Any]:
    """The language model's configuration, readable by transformers 4 and 5."""
    config = language_model.config.to_dict()
    for name in (*NOISE, "quantization_config"):
        config.pop(name, None)
    config["torch_dtype"] = str(dtype).removeprefix("torch.")
    config["vocab_size"] = token_table(language_model).num_embeddings
    rope = config.get("rope_parameters")
    if isinstance(rope, dict) and "rope_theta" in rope:
        # transformers 4 knows only these names and falls back to 10000 without a word.
        config["rope_theta"] = rope["rope_theta"]
        if "partial_rotary_factor" in rope:
            config["partial_rotary_factor"] = rope["partial_rotary_factor"]
        if rope.get("rope_type", "default") != "default":
            plain = ("rope_theta", "partial_rotary_factor")
            config["rope_scaling"] = {name: value for name, value in rope.items() if name not in plain}
    return config


def plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration without what transformers writes into every one and means nothing in this one."""
    return {name: value for name, value in config.items() if name not in (*NOISE, "architectures")}


def vision_config(tower: nn.Module) -> dict[str, Any]:
    """The tower's configuration as a vision model of transformers, for a tower that has a ``hub_form``."""
    form = hub_form(tower)
    assert form is not None, "hub_form was asked before"
    return dict(form.config)


def select_strategy(tower: LayeredTower) -> str:
    """transformers' word for what becomes of the class token: ``default`` drops it, ``full`` keeps all there is."""
    return "default" if tower.drops_cls else "full"


def processor_config(model: VisionLanguageModel) -> dict[str, Any]:
    """``processor_config.json``: how many tokens transformers puts in for an image."""
    tower = model.vision_tower
    form = hub_form(tower)
    assert isinstance(tower, LayeredTower), "only such a tower has a hub form"
    assert form is not None, "hub_form was asked before"
    return {
        "image_token": IMAGE_TOKEN,
        "num_additional_image_tokens": form.class_tokens,
        "patch_size": form.config["patch_size"],
        "processor_class": "LlavaProcessor",
        "vision_feature_select_strategy": select_strategy(tower),
    }


def pixel_config(spec: ImageSpec) -> dict[str, Any]:
    """What the image processors of all formats have in common."""
    return {
        "do_convert_rgb": True,
        "do_normalize": True,
        "do_rescale": True,
        "do_resize": True,
        "image_mean": list(spec.mean),
        "image_std": list(spec.std),
        "resample": _BICUBIC,
        "rescale_factor": 1 / 255,
    }


def preprocessor_config(spec: ImageSpec) -> dict[str, Any]:
    """``preprocessor_config.json``: the image processor of transformers that resizes as ``spec`` does."""
    height, width = spec.size
    common = {**pixel_config(spec), "processor_class": "LlavaProcessor"}
    if spec.resize == "squash":
        return {
            **common,
            "image_processor_type": "SiglipImageProcessor",
            "size": {"height": height, "width": width},
        }
    cropped = {
        **common,
        "crop_size": {"height": height, "width": width},
        "do_center_crop": True,
        "size": {"shortest_edge": min(height, width)},
    }
    if spec.resize == "pad":
        return {**cropped, "image_processor_type": "LlavaImageProcessor", "do_pad": True}
    return {**cropped, "image_processor_type": "CLIPImageProcessor"}
