"""A plain ViT of timm as the CLIP, SigLIP or DINOv2 model of transformers that computes the same hidden states.

timm joins q, k and v in one matrix and gives its embeddings a leading dimension of one; nothing else differs.
"""

from __future__ import annotations

from typing import Any

import torch
from timm.layers import Attention, GELUTanh, LayerScale, Mlp, PatchEmbed, QuickGELU
from timm.models.vision_transformer import Block, VisionTransformer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from mmit.models.encoders.families import FAMILIES

_ACTIVATIONS = {nn.GELU: "gelu", GELUTanh: "gelu_pytorch_tanh", QuickGELU: "quick_gelu"}
_BLOCK = {
    "clip": ("encoder.layers", "layer_norm1", "layer_norm2", "self_attn.{}_proj", "self_attn.out_proj"),
    "dino": ("encoder.layer", "norm1", "norm2", "attention.{}_proj", "attention.o_proj"),
}


def as_hub_model(model: nn.Module) -> PreTrainedModel | None:
    """The same network with the same weights as a model of transformers, or None where no class of it is the same."""
    if type(model) is not VisionTransformer or not _is_plain(model):
        return None
    kind = _kind(model)
    if kind is None:
        return None
    config = _config(model, kind)
    family = FAMILIES[kind]
    with no_init_weights():
        made = family.model._from_config(family.config(**config), dtype=model.patch_embed.proj.weight.dtype)
    made.load_state_dict(_dino(model) if kind == "dinov2" else _clip(model, has_cls=kind == "clip_vision_model"))
    return made.eval()


def _kind(model: Any) -> str | None:  # noqa: ANN401  (a VisionTransformer)
    """The ``model_type`` by what the network has: class token, norm before the blocks, scaled layers, bias."""
    scaled = isinstance(model.blocks[0].ls1, LayerScale)
    before = isinstance(model.norm_pre, nn.LayerNorm)
    bias = model.patch_embed.proj.bias is not None
    if model.has_class_token and before and not scaled and not bias:
        return "clip_vision_model"
    if not model.has_class_token and not before and not scaled and bias:
        return "siglip_vision_model"
    whole = model.blocks[0].mlp.fc1.out_features % model.embed_dim == 0
    return "dinov2" if model.has_class_token and not before and scaled and bias and whole else None


def _is_plain(model: Any) -> bool:  # noqa: ANN401  (a VisionTransformer)
    blocks = list(model.blocks)
    scales = {type(scale) for block in blocks for scale in (block.ls1, block.ls2)} if _are_blocks(blocks) else set()
    return (
        len(scales) == 1
        and type(model.patch_embed) is PatchEmbed
        and isinstance(model.patch_embed.norm, nn.Identity)
        and model.patch_embed.grid_size[0] == model.patch_embed.grid_size[1]
        and model.patch_embed.patch_size[0] == model.patch_embed.patch_size[1]
        and model.pos_embed is not None
        and model.num_reg_tokens == 0
        and not (model.no_embed_class and model.has_class_token)
        and len({_eps(norm) for norm in _norms(model)}) == 1
    )


def _are_blocks(blocks: list[Any]) -> bool:
    return all(
        type(block) is Block
        and type(block.attn) is Attention
        and isinstance(block.attn.q_norm, nn.Identity)
        and isinstance(block.attn.norm, nn.Identity)
        and getattr(block.attn, "gate", None) is None
        and block.attn.qkv.bias is not None
        and block.attn.proj.bias is not None
        and block.attn.num_heads * block.attn.head_dim == block.attn.qkv.in_features
        and type(block.mlp) is Mlp
        and isinstance(block.mlp.norm, nn.Identity)
        and block.mlp.fc1.bias is not None
        and type(block.mlp.act) in _ACTIVATIONS
        and getattr(block.mlp.act, "approximate", "none") == "none"
        for block in blocks
    )


def _norms(model: Any) -> list[nn.Module]:  # noqa: ANN401  (a VisionTransformer)
    found = [norm for block in model.blocks for norm in (block.norm1, block.norm2)]
    return found + [norm for norm in (model.norm_pre, model.norm) if not isinstance(norm, nn.Identity)]


def _eps(norm: Any) -> float | None:  # noqa: ANN401  (a norm of timm)
    return norm.eps if isinstance(norm, nn.LayerNorm) else None


def _config(model: Any, kind: str) -> dict[str, Any]:  # noqa: ANN401  (a VisionTransformer)
    block = model.blocks[0]
    hidden = block.mlp.fc1.out_features
    config: dict[str, Any] = {
        "hidden_size": model.embed_dim,
        "num_hidden_layers": len(model.blocks),
        "num_attention_heads": block.attn.num_heads,
        "image_size": model.patch_embed.img_size[0],
        "patch_size": model.patch_embed.patch_size[0],
        "hidden_act": _ACTIVATIONS[type(block.mlp.act)],
        "layer_norm_eps": block.norm1.eps,
    }
    if kind == "dinov2":
        return config | {"mlp_ratio": hidden // model.embed_dim, "use_mask_token": False}
    head = {"vision_use_head": False} if kind == "siglip_vision_model" else {}
    return config | {"intermediate_size": hidden} | head


def _clip(model: Any, *, has_cls: bool) -> dict[str, Tensor]:  # noqa: ANN401  (a VisionTransformer)
    weights = {
        "embeddings.patch_embedding.weight": model.patch_embed.proj.weight,
        "embeddings.position_embedding.weight": model.pos_embed[0],
        **_norm("post_layernorm", model.norm, like=model.pos_embed),
        **_blocks(model, "clip"),
    }
    if has_cls:
        return weights | {"embeddings.class_embedding": model.cls_token[0, 0]} | _norm("pre_layrnorm", model.norm_pre)
    return weights | {"embeddings.patch_embedding.bias": model.patch_embed.proj.bias}


def _dino(model: Any) -> dict[str, Tensor]:  # noqa: ANN401  (a VisionTransformer)
    weights = {
        "embeddings.cls_token": model.cls_token,
        "embeddings.position_embeddings": model.pos_embed,
        "embeddings.patch_embeddings.projection.weight": model.patch_embed.proj.weight,
        "embeddings.patch_embeddings.projection.bias": model.patch_embed.proj.bias,
        **_norm("layernorm", model.norm, like=model.pos_embed),
        **_blocks(model, "dino"),
    }
    for number, block in enumerate(model.blocks):
        weights[f"encoder.layer.{number}.layer_scale1.lambda1"] = block.ls1.gamma
        weights[f"encoder.layer.{number}.layer_scale2.lambda1"] = block.ls2.gamma
    return weights


def _blocks(model: Any, style: str) -> dict[str, Tensor]:  # noqa: ANN401  (a VisionTransformer)
    where, first, second, qkv, out = _BLOCK[style]
    weights: dict[str, Tensor] = {}
    for number, block in enumerate(model.blocks):
        at = f"{where}.{number}"
        weights |= _norm(f"{at}.{first}", block.norm1) | _norm(f"{at}.{second}", block.norm2)
        for kind in ("weight", "bias"):
            for letter, piece in zip("qkv", getattr(block.attn.qkv, kind).chunk(3), strict=True):
                weights[f"{at}.{qkv.format(letter)}.{kind}"] = piece
            weights[f"{at}.{out}.{kind}"] = getattr(block.attn.proj, kind)
            weights[f"{at}.mlp.fc1.{kind}"] = getattr(block.mlp.fc1, kind)
            weights[f"{at}.mlp.fc2.{kind}"] = getattr(block.mlp.fc2, kind)
    return weights


def _norm(name: str, norm: Any, *, like: Tensor | None = None) -> dict[str, Tensor]:  # noqa: ANN401  (a norm of timm)
    """Weight and bias of a norm; of one that timm leaves out (``like`` says width and dtype), those that do nothing."""
    if isinstance(norm, nn.Identity) and like is not None:
        return {f"{name}.weight": torch.ones_like(like[0, 0]), f"{name}.bias": torch.zeros_like(like[0, 0])}
    return {f"{name}.weight": norm.weight, f"{name}.bias": norm.bias}
