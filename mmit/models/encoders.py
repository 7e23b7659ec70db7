"""Vision encoders: from pixels to patch features, and what a picture must look like to enter one.

An encoder is anything that fits ``VisionEncoder``. Built in are CLIP and SigLIP towers of transformers (here) and
open_clip's ViTs (``open_clip_encoder``, the only module that imports open_clip); a run file may name its own class
as ``package.module:Class``. All layers behind the chosen one stay in memory, so that the tower can be saved whole,
and are never run.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast, runtime_checkable

import torch
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    CLIPConfig,
    CLIPVisionConfig,
    CLIPVisionModel,
    PreTrainedConfig,
    SiglipConfig,
    SiglipVisionConfig,
    SiglipVisionModel,
)

from mmit.config import CustomPart, OpenClipEncoder, TransformersEncoder
from mmit.errors import ConfigError
from mmit.models.plugins import make_custom

Cls = Literal["drop", "keep"]


@dataclass(frozen=True, kw_only=True)
class ImageInput:
    """What the encoder was trained on: size (H, W) in pixels, mean and std of pixels in 0..1."""

    size: tuple[int, int]
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


@runtime_checkable
class VisionEncoder(Protocol):
    """Pixels (N, 3, H, W), normalised -> patch features (N, ``patches``, ``width``)."""

    width: int
    patches: int
    image: ImageInput

    def __call__(self, pixels: Tensor) -> Tensor:
        """Patch features (N, P, width) of normalised pixels (N, 3, H, W)."""
        ...


@runtime_checkable
class LayeredTower(Protocol):
    """A tower that is read at one of its hidden states: ``layers`` of ``depth`` run; its class token may be dropped."""

    layers: int
    depth: int
    drops_cls: bool


class TransformersTower(nn.Module):
    """A CLIP or SigLIP tower, read at one hidden state.

    layer: counted as in transformers' ``hidden_states``: 0 the embeddings, -1 the output of the last layer (without
    the final norm), -2 the layer before it. cls: what becomes of CLIP's class token.
    """

    def __init__(self, model: CLIPVisionModel | SiglipVisionModel, *, layer: int, cls: Cls, image: ImageInput) -> None:
        super().__init__()
        self.model = model
        config: Any = model.config
        self.depth = int(config.num_hidden_layers)
        self.layers = layers_to_run(layer, self.depth)
        self.has_cls = isinstance(model, CLIPVisionModel)
        self.drops_cls = self.has_cls and cls == "drop"
        self.image = image
        self.width = int(config.hidden_size)
        self.patches = (config.image_size // config.patch_size) ** 2 + int(self.has_cls and not self.drops_cls)

    def forward(self, pixels: Tensor) -> Tensor:
        """Patch features (N, P, width) of normalised pixels (N, 3, H, W)."""
        model = self.model
        hidden = model.embeddings(pixels)
        if isinstance(model, CLIPVisionModel):
            hidden = model.pre_layrnorm(hidden)
        for layer in list(model.encoder.layers)[: self.layers]:
            hidden = layer(hidden, None)
        return hidden[:, 1:] if self.drops_cls else hidden


def layers_to_run(layer: int, depth: int) -> int:
    """How many of ``depth`` layers make hidden state ``layer``; raises ConfigError for one that does not exist."""
    count = layer if layer >= 0 else depth + 1 + layer
    if not 0 <= count <= depth:
        raise ConfigError(
            f"model.encoder.layer: {layer} does not exist in an encoder of {depth} layers; take {-depth - 1} to {depth}"
        )
    return count


def build_encoder(section: TransformersEncoder | OpenClipEncoder | CustomPart, *, dtype: torch.dtype) -> nn.Module:
    """The encoder that a run file's ``model.encoder`` section describes, in eval mode. Raises ConfigError."""
    encoder: nn.Module
    if isinstance(section, TransformersEncoder):
        encoder = read_tower(section.path, layer=section.layer, cls=section.cls, dtype=dtype)
    elif isinstance(section, OpenClipEncoder):
        from mmit.models.open_clip_encoder import read_open_clip

        encoder = read_open_clip(section.name, section.pretrained, layer=section.layer, cls=section.cls, dtype=dtype)
    else:
        encoder = make_custom(section.type, section.args, key="model.encoder")
        encoder = encoder.to(dtype)
    if not isinstance(encoder, VisionEncoder):
        raise ConfigError(
            f"model.encoder: {type(encoder).__name__} lacks one of 'width', 'patches' and 'image' (an ImageInput)"
        )
    return encoder.eval()


def read_tower(path: str, *, layer: int, cls: Cls, dtype: torch.dtype) -> TransformersTower:
    """The vision tower of a CLIP or SigLIP directory or hub name; a whole CLIPModel or SiglipModel serves too."""
    config = _read_config(path)
    kinds: dict[type[PreTrainedConfig], Any] = {
        CLIPConfig: CLIPVisionModel,
        CLIPVisionConfig: CLIPVisionModel,
        SiglipConfig: SiglipVisionModel,
        SiglipVisionConfig: SiglipVisionModel,
    }
    if type(config) not in kinds:
        raise ConfigError(
            f"model.encoder.path: {path} holds a model of type '{config.model_type}'; built in are CLIP and SigLIP, "
            "another encoder is given as type: package.module:Class"
        )
    vision: Any = config.vision_config if isinstance(config, CLIPConfig | SiglipConfig) else config
    model, report = kinds[type(config)].from_pretrained(path, config=vision, dtype=dtype, output_loading_info=True)
    if report["missing_keys"]:
        some = ", ".join(sorted(report["missing_keys"])[:3])
        raise ConfigError(
            f"model.encoder.path: {path} lacks {len(report['missing_keys'])} tensors of the tower ({some})"
        )
    return TransformersTower(
        model, layer=layer, cls=cls, image=image_input(_read_processor(path), size=vision.image_size)
    )


def tower_from_config(
    config: Mapping[str, Any], processor: Mapping[str, Any], *, layer: int, cls: Cls, dtype: torch.dtype
) -> TransformersTower:
    """A tower with unset weights from a ``vision_config``: the frame that a model directory is read into."""
    makers: dict[str, tuple[Callable[..., PreTrainedConfig], Any]] = {
        "clip_vision_model": (CLIPVisionConfig, CLIPVisionModel),
        "siglip_vision_model": (SiglipVisionConfig, SiglipVisionModel),
    }
    kind = config.get("model_type", "")
    if kind not in makers:
        raise ConfigError(f"vision_config.model_type '{kind}' is not known; CLIP and SigLIP towers can be read")
    make_config, model_class = makers[kind]
    fields = {name: value for name, value in config.items() if name != "model_type"}
    model = model_class._from_config(make_config(**fields), dtype=dtype)
    image = image_input(processor, size=model.config.image_size)
    return TransformersTower(model, layer=layer, cls=cls, image=image)


def image_input(processor: Mapping[str, Any], *, size: int) -> ImageInput:
    """Mean and std of a preprocessor configuration, with the tower's own input size."""
    mean, std = processor.get("image_mean"), processor.get("image_std")
    if not (isinstance(mean, list) and isinstance(std, list) and len(mean) == len(std) == 3):
        raise ConfigError("the encoder's preprocessor_config.json lacks image_mean and image_std of three numbers")
    return ImageInput(
        size=(size, size),
        mean=cast("tuple[float, float, float]", tuple(mean)),
        std=cast("tuple[float, float, float]", tuple(std)),
    )


def check_is_there(path: str, *, key: str) -> None:
    """Raise ConfigError for a path that is plainly one of this machine and leads nowhere, not a hub's name."""
    if path.startswith((".", "/", "~")) and not Path(path).expanduser().is_dir():
        raise ConfigError(f"{key}: there is no directory {path}")


def _read_config(path: str) -> PreTrainedConfig:
    check_is_there(path, key="model.encoder.path")
    try:
        return AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"model.encoder.path: {path} cannot be read as a transformers model: {first}") from error


def _read_processor(path: str) -> dict[str, Any]:
    from transformers.utils.hub import cached_file

    file = Path(path) / "preprocessor_config.json"
    found = str(file) if file.is_file() else None
    if found is None and not Path(path).is_dir():
        found = cached_file(path, "preprocessor_config.json", _raise_exceptions_for_missing_entries=False)
    if found is None:
        raise ConfigError(
            f"model.encoder.path: {path} has no preprocessor_config.json, so the mean and std of its pixels are "
            "unknown; copy it from the model's origin"
        )
    return json.loads(Path(found).read_text(encoding="utf-8"))
