"""The ``model.encoder`` section of a run file: one vision encoder, or several side by side."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Discriminator, Field, PositiveInt, Tag

from mmit.config.parts import CustomPart, kind_of
from mmit.config.sections import Section

LayerNumber = Annotated[int, Field(strict=True)]


def _is_list(value: object) -> bool:
    return isinstance(value, list | tuple)


def _not_empty(layers: tuple[int, ...]) -> tuple[int, ...]:
    if not layers:
        raise ValueError("an empty list of layers; name at least one")
    return layers


Layer = Annotated[
    Annotated[LayerNumber, Tag("one layer")]
    | Annotated[tuple[LayerNumber, ...], AfterValidator(_not_empty), Tag("several layers")],
    Discriminator(lambda value: "several layers" if _is_list(value) else "one layer"),
]


class TowerSection(Section):
    """What is said of a built-in encoder, whichever library it comes from."""

    layer: Layer = -2
    """Hidden state to take, counted as in transformers: -1 the last layer, -2 the one before it, 0 the embeddings (of
    transformers' towers only). A list takes several, their features side by side."""
    cls: Literal["drop", "keep"] = "drop"
    """What becomes of the class token, where there is one. Register tokens are always dropped."""
    image_size: PositiveInt | None = None
    """Side of the square input in pixels, where it is to be another than the encoder's own; position embeddings are
    resampled."""
    resize: Literal["pad", "squash", "crop"] = "pad"
    """How a picture becomes square: padded with the mean colour, squashed, or cropped at the centre."""
    exact_resize: bool = False
    """True: resize with Pillow, bit for bit as LLaVA does; False: the faster route, at most two grey levels off."""
    draft: bool = False
    """True: let the JPEG decoder make large photos smaller: faster, and on average half a grey level off."""


class TransformersEncoder(TowerSection):
    """A CLIP, SigLIP, DINOv2 or DINOv3 tower read by transformers."""

    type: Literal["transformers"] = "transformers"
    path: str
    """Directory or hub name of the model; a whole CLIP or SigLIP model serves too."""


class OpenClipEncoder(TowerSection):
    """A vision transformer read by open_clip."""

    type: Literal["open_clip"]
    name: str
    """open_clip's model name, such as ``ViT-L-14-336``, or a JSON file with a model configuration."""
    pretrained: str
    """open_clip's tag, such as ``openai``, or a weight file."""


def _not_random(pretrained: bool | str) -> bool | str:
    if pretrained is False:
        raise ValueError("false would be an encoder of random weights; true takes those that belong to the name")
    return pretrained


class TimmEncoder(TowerSection):
    """A vision transformer read by timm."""

    type: Literal["timm"]
    name: str
    """timm's model name, such as ``vit_so400m_patch14_siglip_384.webli``, or ``hf-hub:`` and a repository."""
    pretrained: Annotated[bool | str, AfterValidator(_not_random)] = True
    """``true`` for the weights that belong to the name, or a weight file."""


def _kind_of(value: object) -> str:
    """The tag of an encoder's section; one that only names a directory is told by the config.json there."""
    if not isinstance(value, dict) or "type" in value or not isinstance(path := value.get("path"), str):
        return kind_of(value)
    try:
        content = json.loads((Path(path).expanduser() / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return ""
    # timm writes ``architecture``, open_clip a file of another name: those sections name no directory
    return "transformers" if isinstance(content, dict) and "model_type" in content else ""


def _at_least_two(encoders: tuple[OneEncoder, ...]) -> tuple[OneEncoder, ...]:
    if len(encoders) < 2:
        raise ValueError(f"a list of {len(encoders)} encoders; give at least two, or one that is no list")
    return encoders


OneEncoder = TransformersEncoder | OpenClipEncoder | TimmEncoder | CustomPart
_OneEncoder = Annotated[
    Annotated[TransformersEncoder, Tag("transformers")]
    | Annotated[OpenClipEncoder, Tag("open_clip")]
    | Annotated[TimmEncoder, Tag("timm")]
    | Annotated[CustomPart, Tag("custom")],
    Discriminator(
        _kind_of,
        custom_error_type="unknown_type",
        custom_error_message="'type' must be one of transformers, open_clip, timm, or package.module:Class (it may be "
        "left out where 'path' is a directory whose config.json has a model_type: transformers)",
    ),
]
Encoder = Annotated[
    Annotated[_OneEncoder, Tag("one encoder")]
    | Annotated[tuple[_OneEncoder, ...], AfterValidator(_at_least_two), Tag("several encoders")],
    Discriminator(lambda value: "several encoders" if _is_list(value) else "one encoder"),
]
"""One encoder, or several whose features are joined along the width; each sees the picture in its own way."""
