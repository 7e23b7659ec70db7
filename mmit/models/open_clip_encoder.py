"""open_clip's vision transformers, and their names and shapes as a ``CLIPVisionModel`` of transformers.

The only module under models/ that imports open_clip. Its blocks are CLIP's: renaming the tensors and splitting the
joined q, k, v matrix gives the same hidden states in transformers (7e-7 in fp32), which is how such a tower is saved.
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import open_clip
import torch
from open_clip.transformer import QuickGELU, ResidualAttentionBlock, VisionTransformer
from torch import Tensor, nn

from mmit.errors import ConfigError
from mmit.models.encoders import Cls, ImageInput, layers_to_run

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


class OpenClipTower(nn.Module):
    """A ViT of open_clip, read at one hidden state, before ``ln_post``.

    layer: counted as in transformers' ``hidden_states`` (-1 the last layer); cls: what becomes of the class token.
    """

    def __init__(self, visual: VisionTransformer, *, layer: int, cls: Cls, image: ImageInput) -> None:
        super().__init__()
        self.model = visual
        count = layers_to_run(layer, len(visual.transformer.resblocks))
        if count == 0:
            raise ConfigError(
                "model.encoder.layer: open_clip does not give the embeddings; take 1 or more, or -1 or less"
            )
        self.layers = count
        self.depth = len(visual.transformer.resblocks)
        self.drops_cls = cls == "drop"
        self.image = image
        self.width = int(visual.conv1.out_channels)
        self.patches = visual.grid_size[0] * visual.grid_size[1] + int(not self.drops_cls)
        # In the place of its forward, so that it runs inside the module's own call: its class and position embeddings
        # are its own parameters, which ZeRO-3 gathers for that call only.
        visual.__dict__["forward"] = partial(
            visual.forward_intermediates,
            indices=[count - 1],
            stop_early=True,
            normalize_intermediates=False,
            intermediates_only=True,
            output_fmt="NLC",
            output_extra_tokens=True,
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """Patch features (N, P, width) of normalised pixels (N, 3, H, W)."""
        found = self.model(pixels)
        patches = found["image_intermediates"][0]
        if self.drops_cls:
            return patches
        return torch.cat([found["image_intermediates_prefix"][0], patches], dim=1)


def read_open_clip(name: str, pretrained: str, *, layer: int, cls: Cls, dtype: torch.dtype) -> OpenClipTower:
    """The vision tower of an open_clip model.

    name: a name that open_clip knows, or a JSON file with a model configuration; pretrained: a tag, or a weight file
    (read without unpickling objects). Raises ConfigError.
    """
    if name.endswith(".json"):
        if not Path(name).is_file():
            raise ConfigError(f"model.encoder.name: there is no file {name}")
        open_clip.add_model_config(name)
        name = Path(name).stem
    if open_clip.get_model_config(name) is None:
        raise ConfigError(f"model.encoder.name: open_clip has no model '{name}'; open_clip.list_models() lists them")
    tags = open_clip.list_pretrained_tags_by_model(name)
    if not Path(pretrained).is_file() and pretrained not in tags:
        raise ConfigError(
            f"model.encoder.pretrained: '{pretrained}' is no file and no tag of {name} "
            f"(tags: {', '.join(tags) or 'none'})"
        )
    model = open_clip.create_model(name, pretrained=pretrained, weights_only=True)
    return _tower(model.visual, layer=layer, cls=cls, dtype=dtype)


def open_clip_from_directory(directory: Path, *, layer: int, cls: Cls, dtype: torch.dtype) -> OpenClipTower:
    """The frame (weights unset) of a tower that was saved with its ``open_clip_config.json``."""
    model = open_clip.create_model(f"local-dir:{directory}", load_weights=False)
    return _tower(model.visual, layer=layer, cls=cls, dtype=dtype)


def write_open_clip_config(directory: Path, *, name: str, image: ImageInput) -> None:
    """Write ``open_clip_config.json``, from which open_clip builds the same architecture again."""
    config = open_clip.get_model_config(Path(name).stem if name.endswith(".json") else name)
    preprocess = {"size": list(image.size), "mean": list(image.mean), "std": list(image.std)}
    text = json.dumps({"model_cfg": config, "preprocess_cfg": preprocess}, indent=2)
    (directory / "open_clip_config.json").write_text(text + "\n", encoding="utf-8")


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
        "hidden_size": tower.width,
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


def _tower(visual: object, *, layer: int, cls: Cls, dtype: torch.dtype) -> OpenClipTower:
    if not isinstance(visual, VisionTransformer):
        raise ConfigError(
            f"model.encoder: {type(visual).__name__} of open_clip is no plain vision transformer; take a ViT"
        )
    settings: Any = visual.preprocess_cfg
    visual.proj = None  # the projection into the space shared with text: no hidden state depends on it
    image = ImageInput(size=visual.image_size, mean=tuple(settings["mean"]), std=tuple(settings["std"]))
    for parameter in visual.parameters():
        parameter.data = parameter.data.to(dtype)
    return OpenClipTower(visual, layer=layer, cls=cls, image=image)


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
