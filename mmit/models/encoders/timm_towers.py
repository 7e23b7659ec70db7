"""timm's vision transformers, by their own name or as the tower of an open_clip model.

A ViT that is CLIP's, SigLIP's or DINOv2's becomes that class of transformers at once (``timm_renamed``), so that its
models open elsewhere. The others (EVA, PE, ViTamin, ...) are read through timm's ``forward_intermediates``.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from timm.models import beit, eva, vision_transformer, vision_transformer_relpos
from torch import Tensor, nn

from mmit.errors import ConfigError
from mmit.models.encoders.hub_towers import TransformersTower
from mmit.models.encoders.timm_renamed import as_hub_model
from mmit.models.encoders.tower import (
    Cls,
    ImageInput,
    Layer,
    check_input_size,
    joined,
    refuse_embeddings,
    states_to_read,
)
from mmit.models.placement import placement

_READERS = {
    vision_transformer.VisionTransformer: vision_transformer.checkpoint_filter_fn,
    vision_transformer_relpos.VisionTransformerRelPos: lambda state, _: state,
    eva.Eva: eva.checkpoint_filter_fn,
    beit.Beit: beit.checkpoint_filter_fn,
}
"""Classes of timm with a row of blocks of one width, and what turns a weight file into their state."""


class TimmTower(nn.Module):
    """A ViT of timm, read at one hidden state or at several, before the final norm.

    layer: counted as in transformers' ``hidden_states`` (-1 the last layer); cls: what becomes of the class token.
    Register tokens are dropped. described: from what ``frame_tower`` builds it again.
    """

    def __init__(
        self, model: nn.Module, described: dict[str, Any], *, layer: Layer, cls: Cls, image: ImageInput
    ) -> None:
        super().__init__()
        self.model = model
        trunk: Any = model
        self.blocks = "model.blocks"
        self.depth = len(trunk.blocks)
        self.reads = states_to_read(layer, self.depth)
        refuse_embeddings(self.reads, "timm")
        self.has_cls = getattr(trunk, "cls_token", None) is not None
        self.drops_cls = self.has_cls and cls == "drop"
        self.image = image
        self.described = described
        self.width = int(trunk.embed_dim) * len(self.reads)
        height, width = trunk.patch_embed.grid_size
        self.patches = height * width + int(self.has_cls and not self.drops_cls)
        self._has_prefix = trunk.num_prefix_tokens > 0
        # In the place of its forward, so that it runs inside the module's own call: its class and position embeddings
        # are its own parameters, which ZeRO-3 gathers for that call only.
        model.__dict__["forward"] = partial(
            trunk.forward_intermediates,
            indices=[number - 1 for number in sorted(set(self.reads))],
            return_prefix_tokens=self._has_prefix,
            stop_early=True,
            output_fmt="NLC",
            intermediates_only=True,
        )

    def forward(self, pixels: Tensor) -> Tensor:
        """Patch features (N, P, width) of normalised pixels (N, 3, H, W)."""
        states = self.model(pixels)
        if self._has_prefix:
            with_cls = self.has_cls and not self.drops_cls
            states = [torch.cat([first[:, :1], rest], dim=1) if with_cls else rest for rest, first in states]
        return joined(dict(zip(sorted(set(self.reads)), states, strict=True)), self.reads)

    def hub_form(self) -> None:
        """None: what transformers has a class for is no ``TimmTower``."""
        return

    def architecture(self) -> dict[str, Any]:
        """The library, and what it builds the tower from."""
        return self.described


def read_timm(
    name: str, pretrained: str | bool, *, layer: Layer, cls: Cls, image_size: int | None, dtype: torch.dtype
) -> nn.Module:
    """The tower of a timm model.

    name: as timm knows it, with ``hf-hub:`` a repository of the hub; pretrained: True for the weights that belong to
    the name, or a weight file (read without unpickling objects); image_size: another input size. Raises ConfigError.
    """
    architecture, arguments = _resolve(name)
    try:
        model: Any = timm.create_model(name, pretrained=pretrained is True and placement().holds)
    except (OSError, RuntimeError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(f"model.encoder: timm cannot make '{name}' with its weights: {first}") from error
    _refuse_others(model)
    settings = model.pretrained_cfg
    size = model.patch_embed.img_size
    _drop_head(model)
    if isinstance(pretrained, str) and placement().holds:
        _read_file(model, Path(pretrained))
    image = ImageInput(
        size=size if image_size is None else (image_size, image_size),
        mean=tuple(settings["mean"]),
        std=tuple(settings["std"]),
    )
    described = {"library": "timm", "config": {"name": architecture, "args": arguments}}
    return timm_tower(model, described, layer=layer, cls=cls, image=image, dtype=dtype)


def timm_frame(config: dict[str, Any], *, layer: Layer, cls: Cls, image: ImageInput, dtype: torch.dtype) -> nn.Module:
    """The frame (weights unset) of a tower from timm's name and arguments; nothing is fetched."""
    model = timm.create_model(config["name"], pretrained=False, num_classes=0, **config["args"])
    described = {"library": "timm", "config": config}
    return timm_tower(model, described, layer=layer, cls=cls, image=image, dtype=dtype)


def timm_tower(
    model: nn.Module, described: dict[str, Any], *, layer: Layer, cls: Cls, image: ImageInput, dtype: torch.dtype
) -> nn.Module:
    """The tower that a timm model is: a class of transformers where there is one for it. Raises ConfigError.

    described: from what ``frame_tower`` builds a ``TimmTower`` again.
    """
    _refuse_others(model)
    _drop_head(model)
    _resize(model, image.size)
    _cast(model, dtype)
    twin = as_hub_model(model)
    if twin is not None:
        return TransformersTower(twin, layer=layer, cls=cls, image=image)
    return TimmTower(model, described, layer=layer, cls=cls, image=image)


def _refuse_others(model: nn.Module) -> None:
    if not isinstance(model, tuple(_READERS)):
        raise ConfigError(
            f"model.encoder: {type(model).__name__} of timm has no row of layers with one feature for each patch; "
            "take a ViT, SigLIP, EVA or BEiT"
        )


def _resolve(name: str) -> tuple[str, dict[str, Any]]:
    """timm's architecture, without tag or source, and the arguments that a repository of the hub sets."""
    source, identifier = timm.models.parse_model_name(name)
    if source == "local-dir":
        raise ConfigError(f"model.encoder.name: {name}: give timm's name for it, and the weight file as 'pretrained'")
    if source == "hf-hub":
        _, architecture, arguments = timm.models.load_model_config_from_hf(identifier)
        return architecture, dict(arguments or {})
    architecture, _ = timm.models.split_model_name_tag(identifier)
    if not timm.is_model(architecture):
        raise ConfigError(f"model.encoder.name: timm has no model '{architecture}'; timm.list_models() lists them")
    return architecture, {}


def _drop_head(model: Any) -> None:  # noqa: ANN401  (a timm model)
    """Leave out classifier and pooling: no hidden state depends on them."""
    model.reset_classifier(0, global_pool="")
    if getattr(model, "attn_pool", None) is not None:
        model.attn_pool = None


def _cast(model: nn.Module, dtype: torch.dtype) -> None:
    """Everything in ``dtype`` but the tables of rotary embeddings, whose angles need float32."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    for name, buffer in model.named_buffers():
        if buffer.is_floating_point() and not name.startswith("rope"):
            buffer.data = buffer.data.to(dtype)


def _read_file(model: Any, file: Path) -> None:  # noqa: ANN401  (a timm model)
    key = "model.encoder.pretrained"
    if not file.is_file():
        raise ConfigError(f"{key}: there is no file {file}; true takes the weights that timm has for the name")
    try:
        stored = timm.models.load_state_dict(str(file), weights_only=True)
    except (OSError, RuntimeError, UnpicklingError, SafetensorError) as error:
        raise ConfigError(f"{key}: {file} is no weight file that can be read safely: {error}") from error
    reader = next(reader for kind, reader in _READERS.items() if isinstance(model, kind))
    try:
        report = model.load_state_dict(reader(stored, model), strict=False)
    except (RuntimeError, KeyError) as error:
        raise ConfigError(f"{key}: {file} does not fit {type(model).__name__}: {error}") from error
    if report.missing_keys:
        some = ", ".join(report.missing_keys[:3])
        raise ConfigError(f"{key}: {file} lacks {len(report.missing_keys)} tensors of the tower ({some})")


def _resize(model: Any, size: tuple[int, int]) -> None:  # noqa: ANN401  (a timm model)
    """Make the model take pictures of ``size``; timm resamples its position embeddings as ``positions`` does."""
    if tuple(model.patch_embed.img_size) == size:
        return
    if not hasattr(model, "set_input_size"):
        raise ConfigError(f"model.encoder.image_size: {type(model).__name__} of timm takes one input size only")
    check_input_size(size[0], model.patch_embed.feat_ratio(as_scalar=True))
    model.set_input_size(img_size=size)
