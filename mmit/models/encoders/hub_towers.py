"""Vision towers of transformers: CLIP, SigLIP (and SigLIP 2 of fixed size), DINOv2, DINOv3, BLIP-2, InstructBLIP.

All layers behind the last one that is read stay in memory, so that the tower can be saved whole, and are never run.
"""

from __future__ import annotations

import json
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import AutoConfig, CLIPVisionModel, DINOv3ViTModel, PreTrainedConfig, PreTrainedModel

from mmit.errors import ConfigError
from mmit.hub import revision_of
from mmit.models.encoders.families import FAMILIES, NOISE
from mmit.models.encoders.positions import resample_positions
from mmit.models.encoders.tower import Cls, HubForm, ImageInput, Layer, check_input_size, joined, states_to_read
from mmit.models.placement import placement

_BLIP_NAMES = {r"^vision_model\.": ""}
_HOLDING_A_TOWER = {"clip": None, "siglip": None, "blip-2": _BLIP_NAMES, "instructblip": _BLIP_NAMES}
"""Whole models whose tower can be taken, and what transformers does not know of their names."""


class TransformersTower(nn.Module):
    """A tower of transformers, read at one hidden state or at several, whose features are joined along the width.

    layer: counted as in transformers' ``hidden_states``: 0 the embeddings, -1 the output of the last layer (without
    the final norm; with it for BLIP-2 and InstructBLIP, whose models read that), -2 the layer before it. cls: what
    becomes of the class token. Register tokens are dropped.
    """

    def __init__(self, model: PreTrainedModel, *, layer: Layer, cls: Cls, image: ImageInput) -> None:
        super().__init__()
        self.model = model
        config: Any = model.config
        self.family = FAMILIES[config.model_type]
        self.blocks = f"model.{self.family.layers}"
        self.depth = int(config.num_hidden_layers)
        self.reads = states_to_read(layer, self.depth)
        self.registers = int(getattr(config, "num_register_tokens", 0))
        self.has_cls = self.family.class_tokens == 1
        self.drops_cls = self.has_cls and cls == "drop"
        self.image = image
        self.width = int(config.hidden_size) * len(self.reads)
        self.patches = (image.size[0] // config.patch_size) ** 2 + int(self.has_cls and not self.drops_cls)

    def forward(self, pixels: Tensor) -> Tensor:
        """Patch features (N, P, width) of normalised pixels (N, 3, H, W)."""
        model: Any = self.model
        hidden = model.embeddings(pixels)
        context: dict[str, Any] = {} if self.family.norm else {"attention_mask": None}
        if isinstance(model, CLIPVisionModel):
            hidden = model.pre_layrnorm(hidden)
        elif isinstance(model, DINOv3ViTModel):
            context["position_embeddings"] = model.rope_embeddings(pixels)
        layers = list(self.get_submodule(self.blocks).children())
        states: dict[int, Tensor] = {}
        for number in range(max(self.reads) + 1):
            hidden = layers[number - 1](hidden, **context) if number else hidden
            if number == self.depth and self.family.norm:
                hidden = model.get_submodule(self.family.norm)(hidden)
            if number in self.reads:
                states[number] = self._chosen(hidden)
        return joined(states, self.reads)

    def _chosen(self, hidden: Tensor) -> Tensor:
        patches = hidden[:, int(self.has_cls) + self.registers :]
        if not self.has_cls or self.drops_cls:
            return patches
        return torch.cat([hidden[:, :1], patches], dim=1) if self.registers else hidden

    def hub_form(self) -> HubForm:
        """The model as it is; transformers writes some of its tensors under other names than they have in memory."""
        dropped = (*NOISE, "architectures")

        def renamed(name: str) -> str:
            for old, new in self.family.renamed:
                name = new + name.removeprefix(old) if name.startswith(old) else name.replace(f".{old}", f".{new}")
            return name

        why = None
        if self.registers:
            why = f"its classes take the {self.registers} register tokens of the encoder for patches"
        elif self.model.config.to_dict().get("use_swiglu_ffn"):
            why = "its classes store the gated layers of this DINOv2 joined, which no other tower needs"
        if self.family.norm:
            why = "its classes leave out the final norm of this encoder"
        return HubForm(
            config={name: value for name, value in self.model.config.to_dict().items() if name not in dropped},
            prefix=self.family.prefix,
            on_disk=lambda name: (renamed(name),),
            also_read=renamed,
            class_tokens=self.family.class_tokens,
            why_not_llava=why,
        )

    def architecture(self) -> dict[str, Any]:
        """The library and the vision configuration."""
        return {"library": "transformers", "config": dict(self.hub_form().config)}


def read_tower(path: str, *, layer: Layer, cls: Cls, image_size: int | None, dtype: torch.dtype) -> TransformersTower:
    """The vision tower of a directory or hub name; a whole CLIPModel or SiglipModel serves too.

    image_size: another input size in pixels than the tower's own. Raises ConfigError.
    """
    config: Any = _read_config(path)
    vision = config.vision_config if config.model_type in _HOLDING_A_TOWER else config
    if config.model_type.startswith("siglip2"):
        raise ConfigError(
            f"model.encoder.path: {path} is a SigLIP 2 of variable shape (NaFlex), which has no fixed grid of patches; "
            "take the SigLIP 2 of a fixed size (its model_type is siglip)"
        )
    if vision.model_type not in FAMILIES:
        raise ConfigError(
            f"model.encoder.path: {path} holds a model of type '{config.model_type}'; built in are CLIP, SigLIP, "
            "DINOv2, DINOv3, BLIP-2 and InstructBLIP ViTs, another encoder is given as type: package.module:Class"
        )
    reader = FAMILIES[vision.model_type].model
    report: dict[str, Any] = {"missing_keys": ()}
    with readable(path, key="model.encoder.path", what="a vision tower"):
        if placement().holds:
            mapping = _HOLDING_A_TOWER.get(config.model_type)
            model, report = reader.from_pretrained(
                path,
                revision=revision_of(path),
                config=vision,
                dtype=dtype,
                output_loading_info=True,
                key_mapping=mapping,
            )
        else:
            with placement().born():
                model = reader._from_config(vision, dtype=dtype)
    if report["missing_keys"]:
        some = ", ".join(sorted(report["missing_keys"])[:3])
        raise ConfigError(
            f"model.encoder.path: {path} lacks {len(report['missing_keys'])} tensors of the tower ({some})"
        )
    if image_size is not None:
        model = with_input_size(model, image_size)
    image = image_input(_read_processor(path), size=_side(model.config))
    return TransformersTower(model, layer=layer, cls=cls, image=image)


def tower_from_config(
    config: Mapping[str, Any], image: Mapping[str, Any], *, layer: Layer, cls: Cls, dtype: torch.dtype
) -> TransformersTower:
    """A tower with unset weights from a ``vision_config``: the frame that a model directory is read into.

    image: image_mean and image_std, as in a preprocessor configuration.
    """
    kind = config.get("model_type", "")
    if kind not in FAMILIES:
        raise ConfigError(
            f"vision_config.model_type '{kind}' is not known; CLIP, SigLIP, DINOv2, DINOv3, BLIP-2 and InstructBLIP "
            "towers can be read"
        )
    fields = {name: value for name, value in config.items() if name != "model_type"}
    model = FAMILIES[kind].model._from_config(FAMILIES[kind].config(**fields), dtype=dtype)
    return TransformersTower(model, layer=layer, cls=cls, image=image_input(image, size=_side(model.config)))


def with_input_size(model: PreTrainedModel, size: int) -> PreTrainedModel:
    """The same model for pictures of ``size`` x ``size`` pixels, its position embeddings resampled."""
    config: Any = model.config
    check_input_size(size, config.patch_size)
    family = FAMILIES[config.model_type]
    values = {name: value for name, value in config.to_dict().items() if name not in ("model_type", "dtype")}
    made = family.model._from_config(family.config(**values | {"image_size": size}), dtype=model.dtype)
    made.to(model.device)
    state = model.state_dict()
    if family.positions is not None:
        side = size // config.patch_size
        state[family.positions] = resample_positions(
            state[family.positions], prefix=family.class_tokens, grid=(side, side)
        )
    made.load_state_dict(state)
    return made


def image_input(processor: Mapping[str, Any], *, size: int) -> ImageInput:
    """Mean and std of a preprocessor configuration, with the tower's own input size."""
    mean, std = processor.get("image_mean"), processor.get("image_std")
    lists = isinstance(mean, list) and isinstance(std, list) and len(mean) == len(std) == 3
    if not lists or not all(isinstance(value, int | float) for value in (*mean, *std)) or min(std) <= 0:
        raise ConfigError(
            "the encoder's preprocessor_config.json lacks image_mean and image_std of three numbers, the latter above 0"
        )
    return ImageInput(
        size=(size, size),
        mean=cast("tuple[float, float, float]", tuple(mean)),
        std=cast("tuple[float, float, float]", tuple(std)),
    )


def check_is_there(path: str, *, key: str) -> None:
    """Raise ConfigError for a path that is plainly one of this machine and leads nowhere, not a hub's name."""
    if path.startswith((".", "/", "~")) and not Path(path).expanduser().is_dir():
        raise ConfigError(f"{key}: there is no directory {path}")


@contextmanager
def readable(path: str, *, key: str, what: str) -> Generator[None]:
    """While in force, what is raised of a directory that is damaged, incomplete or impossible is a ConfigError.

    key: of the run file, which names ``path``. what: it should be.
    """
    wrong = (ArithmeticError, OSError, SafetensorError, StrictDataclassError, TypeError, ValueError)
    try:
        yield
    except wrong as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{key}: {path} cannot be read as {what}: {reason}") from error
    except RuntimeError as error:
        if "mismatch" not in str(error):
            raise
        raise ConfigError(
            f"{key}: {path} holds tensors of other shapes than its config.json says "
            f"({' '.join(str(error).split())[:200]}); take a complete copy"
        ) from error


def _side(config: Any) -> int:  # noqa: ANN401  (a vision configuration)
    sizes = {config.image_size} if isinstance(config.image_size, int) else set(config.image_size)
    if len(sizes) != 1 or not isinstance(config.patch_size, int):
        raise ConfigError(f"the encoder takes pictures of {config.image_size}; only square ones can be read")
    return int(sizes.pop())


def _read_config(path: str) -> PreTrainedConfig:
    check_is_there(path, key="model.encoder.path")
    with readable(path, key="model.encoder.path", what="a transformers model"):
        return AutoConfig.from_pretrained(path, revision=revision_of(path))


def _read_processor(path: str) -> dict[str, Any]:
    """The image processor's settings: its own file, or part of the one that version 5 writes for a whole model."""
    for name in ("preprocessor_config.json", "processor_config.json"):
        if (file := _file(path, name)) is not None:
            with readable(path, key="model.encoder.path", what=f"an encoder with {name}"):
                found = dict(json.loads(file.read_text(encoding="utf-8")))
            found = found if name.startswith("pre") else found.get("image_processor")
            if found is not None:
                return found
    raise ConfigError(
        f"model.encoder.path: {path} has no preprocessor_config.json, so the mean and std of its pixels are "
        "unknown; copy it from the model's origin"
    )


def _file(path: str, name: str) -> Path | None:
    from transformers.utils.hub import cached_file

    file = Path(path) / name
    if file.is_file() or Path(path).is_dir():
        return file if file.is_file() else None
    found = cached_file(path, name, revision=revision_of(path), _raise_exceptions_for_missing_entries=False)
    return Path(found) if found else None
