"""Tiny ViTs under names of their own, as one would name a real one; importing this registers them with timm."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models.eva import Eva
from timm.models.eva import checkpoint_filter_fn as eva_state
from timm.models.vision_transformer import VisionTransformer
from timm.models.vision_transformer import checkpoint_filter_fn as vit_state
from torch import nn

_CFG = {"input_size": (3, 28, 28), "mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4), "num_classes": 5, "url": ""}
_COMMON: dict[str, Any] = {
    **{"img_size": 28, "patch_size": 14, "embed_dim": 24, "depth": 3, "num_heads": 3, "mlp_ratio": 2.0},
    **{"num_classes": 5},
}
_KINDS: dict[str, dict[str, Any]] = {
    "tiny_siglip": {"class_token": False, "global_pool": "map", "act_layer": "gelu_tanh"},
    "tiny_clip": {"pre_norm": True, "act_layer": "quick_gelu"},
    "tiny_dinov2": {"init_values": 0.5},
    "tiny_registers": {"init_values": 0.5, "reg_tokens": 2, "no_embed_class": True},
    "tiny_plain": {},
}
default_cfgs = generate_default_cfgs(
    {f"{name}.test": dict(_CFG, classifier="head", first_conv="patch_embed.proj") for name in (*_KINDS, "tiny_eva")}
)


def _vit(name: str, pretrained: bool, kwargs: dict[str, Any]) -> nn.Module:
    settings: dict[str, Any] = {**_COMMON, **_KINDS[name], **kwargs}
    return build_model_with_cfg(VisionTransformer, name, pretrained, pretrained_filter_fn=vit_state, **settings)


@register_model
def tiny_siglip(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return _vit("tiny_siglip", pretrained, kwargs)


@register_model
def tiny_clip(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return _vit("tiny_clip", pretrained, kwargs)


@register_model
def tiny_dinov2(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return _vit("tiny_dinov2", pretrained, kwargs)


@register_model
def tiny_registers(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return _vit("tiny_registers", pretrained, kwargs)


@register_model
def tiny_plain(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    return _vit("tiny_plain", pretrained, kwargs)


@register_model
def tiny_eva(pretrained: bool = False, **kwargs: Any) -> nn.Module:
    settings: dict[str, Any] = {**_COMMON, "use_rot_pos_emb": True, "swiglu_mlp": True, "scale_mlp": True, **kwargs}
    return build_model_with_cfg(Eva, "tiny_eva", pretrained, pretrained_filter_fn=eva_state, **settings)


def weights_of(model: nn.Module, file: Path) -> Path:
    """Random weights in all tensors of ``model``, large enough that features depend on every one; saved to ``file``."""
    generator = torch.Generator().manual_seed(7)
    for parameter in model.parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        parameter.data = noise * 0.2 + (1.0 if parameter.ndim == 1 else 0.0)
    torch.save(model.state_dict(), file)
    return file


def open_clip_with(name: str, directory: Path) -> dict[str, Any]:
    """An open_clip model whose tower is the timm model ``name``: the section that reads it."""
    import open_clip

    description = {
        "embed_dim": 16,
        "vision_cfg": {"image_size": 28, "timm_model_name": name, "timm_pool": "", "timm_proj": "linear"},
        "text_cfg": {"context_length": 8, "vocab_size": 64, "width": 16, "heads": 2, "layers": 1},
    }
    file = directory / f"open-{name}.json"
    file.write_text(json.dumps(description))
    open_clip.add_model_config(str(file))
    weights = weights_of(open_clip.create_model(file.stem), directory / f"open-{name}.pt")
    return {"type": "open_clip", "name": str(file), "pretrained": str(weights)}
