"""open_clip's vision transformers, and their names and shapes as a ``CLIPVisionModel`` of transformers.

The only module under models/ that imports open_clip. Its own blocks are CLIP's: renaming the tensors and splitting the
joined q, k, v matrix gives the same hidden states in transformers (7e-7 in fp32), which is how such a tower is saved.
Where open_clip takes its tower from timm (SigLIP, EVA, PE), that is read as any tower of timm.
"""

from __future__ import annotations

import logging
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.timm_model import TimmModel
from open_clip.transformer import QuickGELU, ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from mmit.errors import ConfigError
from mmit.models.encoders.positions import resample_positions
from mmit.models.encoders.tower import (
    Cls,
    HubForm,
    ImageInput,
    Layer,
    check_input_size,
    joined,
    refuse_embeddings,
    states_to_read,
)
from mmit.models.placement import placement

_RENAMED = {
    "class_embedding": "embeddings.class_embedding",
    "positional_embedding": "embeddings.position_embedding.weight",
    "conv1": "embeddings.patch_embedding",
    "ln_pre": "pre_layrnorm",
    "ln_post": "post_layernorm",
}
_RENAMED_IN_BLOCK = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_QKV = ("q_proj", "k_proj", "v_proj")
_NO_TEXT = open_clip.CLIPTextCfg(context_length=1, vocab_size=2, width=8, heads=1, layers=1)


class OpenClipTower(nn.Module):
    """A ViT of open_clip, read at one hidden state or at several, before ``ln_post``.

    layer: counted as in transformers' ``hidden_states`` (-1 the last layer); cls: what becomes of the class token.
    description: open_clip's model configuration, without the text side.
    """

    def __init__(
        self, visual: VisionTransformer, *, layer: Layer, cls: Cls, image: ImageInput, description: dict[str, Any]
    ) -> None:
        super().__init__()
        self.model = visual
        self.blocks = "model.transformer.resblocks"
        self.depth = len(visual.transformer.resblocks)
        self.reads = states_to_read(layer, self.depth)
        refuse_embeddings(self.reads, "open_clip")
        self.drops_cls = cls == "drop"
        self.image = image
        self.description = description
        self.width = int(visual.conv1.out_channels) * len(self.reads)
        self.patches = visual.grid_size[0] * visual.grid_size[1] + int(not self.drops_cls)
        # In the place of its forward, so that it runs inside the module's own call: its class and position embeddings
        # are its own parameters, which ZeRO-3 gathers for that call only.
        visual.__dict__["forward"] = partial(
            visual.forward_intermediates,
            indices=[number - 1 for number in sorted(set(self.reads))],
            stop_early=True,
            normalize_intermediates=False,
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """Patch features (N, P, width) of normalised pixels (N, 3, H, W)."""
        found = self.model(pixels)
        states = found["image_intermediates"]
        if not self.drops_cls:
            pairs = zip(found["image_intermediates_prefix"], states, strict=True)
            states = [torch.cat(pair, dim=1) for pair in pairs]
        return joined(dict(zip(sorted(set(self.reads)), states, strict=True)), self.reads)

    def hub_form(self) -> HubForm | None:
        """The tower as a CLIPVisionModel, or None where that class cannot hold it."""
        config = clip_vision_config(self)
        if config is None:
            return None
        return HubForm(
            config=config,
            prefix="vision_tower.vision_model.",
            on_disk=clip_sources,
            also_read=str,
            class_tokens=1,
            why_not_llava=None,
        )

    def architecture(self) -> dict[str, Any]:
        """The library and its model configuration."""
        return {"library": "open_clip", "config": self.description}


def read_open_clip(
    name: str, pretrained: str, *, layer: Layer, cls: Cls, image_size: int | None, dtype: torch.dtype
) -> nn.Module:
    """The vision tower of an open_clip model.

    name: a name that open_clip knows, or a JSON file with a model configuration; pretrained: a tag, or a weight file
    (read without unpickling objects); image_size: another input size in pixels than the model's. Raises ConfigError.
    """
    if name.endswith(".json"):
        if not Path(name).is_file():
            raise ConfigError(f"model.encoder.name: there is no file {name}")
        open_clip.add_model_config(name)
        name = Path(name).stem
    config = open_clip.get_model_config(name)
    if config is None:
        raise ConfigError(f"model.encoder.name: open_clip has no model '{name}'; open_clip.list_models() lists them")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if not Path(pretrained).is_file() and pretrained not in tags:
        raise ConfigError(
            f"model.encoder.pretrained: '{pretrained}' is no file and no tag of {name} "
            f"(tags: {', '.join(tags) or 'none'})"
        )
    quick = has_quick_gelu(name, pretrained)
    holds = placement().holds
    logging.disable(logging.NOTSET if holds else logging.WARNING)  # that no weights are loaded
    try:
        visual: Any = open_clip.create_model(
            name, pretrained=pretrained, force_quick_gelu=quick, load_weights=holds, weights_only=True
        ).visual
    finally:
        logging.disable(logging.NOTSET)
    settings: Any = visual.preprocess_cfg
    description = {"embed_dim": config["embed_dim"], "vision_cfg": dict(config["vision_cfg"]), "quick_gelu": quick}
    image = ImageInput(size=visual.image_size, mean=tuple(settings["mean"]), std=tuple(settings["std"]))
    if image_size is not None:
        image = ImageInput(size=(image_size, image_size), mean=image.mean, std=image.std)
    return _tower(visual, description, layer=layer, cls=cls, image=image, dtype=dtype)


def has_quick_gelu(name: str, pretrained: str) -> bool:
    """Whether the weights were trained with OpenAI's approximation of GELU, which open_clip only warns of.

    A tag says so of its weights; a file of weights is what the name says. Raises ConfigError where they contradict.
    """
    named = bool((open_clip.get_model_config(name) or {}).get("quick_gelu", False))
    if Path(pretrained).is_file():
        return named
    of_tag = bool((open_clip.get_pretrained_cfg(name, pretrained) or {}).get("quick_gelu", False))
    if named and not of_tag:
        raise ConfigError(
            f"model.encoder: the weights '{pretrained}' were trained with plain GELU, {name} is the model with "
            f"QuickGELU; take {name.removesuffix('-quickgelu')}"
        )
    return of_tag


def open_clip_frame(
    config: dict[str, Any], *, layer: Layer, cls: Cls, image: ImageInput, dtype: torch.dtype
) -> nn.Module:
    """The frame (weights unset) of a tower from its model configuration; nothing is fetched."""
    vision = open_clip.CLIPVisionCfg(**config["vision_cfg"] | {"timm_model_pretrained": False})
    quick = bool(config.get("quick_gelu"))
    visual = open_clip.CLIP(config["embed_dim"], vision, _NO_TEXT, quick_gelu=quick).visual
    return _tower(visual, config, layer=layer, cls=cls, image=image, dtype=dtype)


def clip_vision_config(tower: OpenClipTower) -> dict[str, Any] | None:
    """The ``vision_config`` of the same tower in transformers, or None where CLIPVisionModel cannot hold it."""
    visual = tower.model
    blocks: list[Any] = list(visual.transformer.resblocks)
    norms = [visual.ln_pre, visual.ln_post, *(norm for block in blocks for norm in (block.ln_1, block.ln_2))]
    plain_blocks = all(
        type(block) is ResidualAttentionBlock
        and isinstance(block.ls_1, nn.Identity)
        and isinstance(block.attn, nn.MultiheadAttention)
        for block in blocks
    )
    eps = {getattr(norm, "eps", None) for norm in norms}
    square = visual.grid_size[0] == visual.grid_size[1] and visual.patch_size[0] == visual.patch_size[1]
    activation = type(blocks[0].mlp.gelu) if plain_blocks else None
    names = {QuickGELU: "quick_gelu", nn.GELU: "gelu"}
    if not plain_blocks or not square or visual.attn_pool is not None or len(eps) != 1 or None in eps:
        return None
    if activation not in names or (activation is nn.GELU and blocks[0].mlp.gelu.approximate != "none"):
        return None
    return {
        "model_type": "clip_vision_model",
        "hidden_size": int(visual.conv1.out_channels),
        "intermediate_size": blocks[0].mlp.c_fc.out_features,
        "num_hidden_layers": len(blocks),
        "num_attention_heads": blocks[0].attn.num_heads,
        "image_size": visual.image_size[0],
        "patch_size": visual.patch_size[0],
        "projection_dim": visual.output_dim,
        "hidden_act": names[activation],
        "layer_norm_eps": eps.pop(),
    }


def clip_sources(name: str) -> tuple[str, ...]:
    """The name, or the three names to join, that hold open_clip's tensor ``name`` in a ``CLIPVisionModel``."""
    block, inner = _block(name)
    if inner.startswith("attn.in_proj_"):
        kind = inner.removeprefix("attn.in_proj_")
        return tuple(f"encoder.layers.{block}.self_attn.{part}.{kind}" for part in _QKV)
    if block is not None:
        return (f"encoder.layers.{block}.{_swap(inner, _RENAMED_IN_BLOCK)}",)
    return (_swap(name, _RENAMED),)


def _tower(
    visual: object, description: dict[str, Any], *, layer: Layer, cls: Cls, image: ImageInput, dtype: torch.dtype
) -> nn.Module:
    if isinstance(visual, TimmModel):
        from mmit.models.encoders.timm_towers import timm_tower

        architecture = {"library": "open_clip", "config": description}
        return timm_tower(visual.trunk, architecture, layer=layer, cls=cls, image=image, dtype=dtype)
    if not isinstance(visual, VisionTransformer):
        raise ConfigError(
            f"model.encoder: {type(visual).__name__} of open_clip is no plain vision transformer; take a ViT"
        )
    visual.proj = None  # the projection into the space shared with text: no hidden state depends on it
    if image.size != visual.image_size:
        description = {**description, "vision_cfg": {**description["vision_cfg"], "image_size": image.size[0]}}
        _resize(visual, image.size[0])
    for parameter in visual.parameters():
        parameter.data = parameter.data.to(dtype)
    return OpenClipTower(visual, layer=layer, cls=cls, image=image, description=description)


def _resize(visual: VisionTransformer, size: int) -> None:
    """Make the tower take pictures of ``size`` x ``size`` pixels."""
    patch = visual.patch_size[0]
    check_input_size(size, patch)
    grid = (size // patch, size // patch)
    table = resample_positions(visual.positional_embedding, prefix=1, grid=grid)
    visual.positional_embedding = nn.Parameter(table, requires_grad=visual.positional_embedding.requires_grad)
    visual.image_size, visual.grid_size = (size, size), grid


def _block(name: str) -> tuple[str | None, str]:
    """``transformer.resblocks.3.ln_1.weight`` -> ("3", "ln_1.weight"); other names -> (None, name)."""
    prefix = "transformer.resblocks."
    if not name.startswith(prefix):
        return None, name
    number, _, inner = name.removeprefix(prefix).partition(".")
    return number, inner


def _swap(name: str, table: dict[str, str]) -> str:
    for old, new in table.items():
        if name == old or name.startswith(old + "."):
            return new + name.removeprefix(old)
    raise AssertionError(f"an open_clip tensor without a place in CLIPVisionModel: {name}")
