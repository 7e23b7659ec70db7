"""The ``model`` section of a run file: encoder, connector and language model, or a model that exists."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Tag

from mmit.config.connectors import Connector, MlpConnector
from mmit.config.parts import CustomPart, kind_of
from mmit.config.sections import Section
from mmit.config.tiling import Tiling


class TransformersEncoder(Section):
    """A CLIP or SigLIP tower read by transformers."""

    type: Literal["transformers"] = "transformers"
    path: str
    """Directory or hub name of a CLIP or SigLIP model."""
    layer: int = -2
    """Hidden state to take, counted as in transformers: -1 the last layer, -2 the one before it, 0 the embeddings."""
    cls: Literal["drop", "keep"] = "drop"
    """What becomes of the class token (SigLIP has none)."""
    resize: Literal["pad", "squash", "crop"] = "pad"
    """How a picture becomes square: padded with the mean colour, squashed, or cropped at the centre."""
    exact_resize: bool = False
    """True: resize with Pillow, bit for bit as LLaVA does; False: the faster route, at most two grey levels off."""
    draft: bool = False
    """True: let the JPEG decoder make large photos smaller: faster, and on average half a grey level off."""


class OpenClipEncoder(Section):
    """A vision transformer read by open_clip."""

    type: Literal["open_clip"]
    name: str
    """open_clip's model name, such as ``ViT-L-14-336``, or a JSON file with a model configuration."""
    pretrained: str
    """open_clip's tag, such as ``openai``, or a weight file."""
    layer: int = -2
    """Hidden state to take, counted as in transformers: -1 the last layer, -2 the one before it."""
    cls: Literal["drop", "keep"] = "drop"
    """What becomes of the class token."""
    resize: Literal["pad", "squash", "crop"] = "pad"
    """How a picture becomes square: padded with the mean colour, squashed, or cropped at the centre."""
    exact_resize: bool = False
    """True: resize with Pillow, bit for bit as LLaVA does; False: the faster route, at most two grey levels off."""
    draft: bool = False
    """True: let the JPEG decoder make large photos smaller: faster, and on average half a grey level off."""


Encoder = Annotated[
    Annotated[TransformersEncoder, Tag("transformers")]
    | Annotated[OpenClipEncoder, Tag("open_clip")]
    | Annotated[CustomPart, Tag("custom")],
    Discriminator(
        kind_of,
        custom_error_type="unknown_type",
        custom_error_message="'type' must be one of transformers, open_clip, or package.module:Class",
    ),
]


class LanguageModel(Section):
    """The causal language model."""

    path: str
    """Directory or hub name, anything that ``AutoModelForCausalLM`` builds."""
    template: str = "own"
    """Chat template: ``own`` (the tokenizer's), a ``.jinja`` file, or a built-in name such as ``vicuna``."""
    text_style: Literal["hf", "llava"] = "hf"
    """How text around images is tokenized: in one piece (``hf``), or each piece on its own as in LLaVA's code."""


class ComposedModel(Section):
    """A model composed of parts; the connector starts fresh."""

    encoder: Encoder
    connector: Connector = MlpConnector()
    language_model: LanguageModel
    tiling: Tiling | None = None
    """How a picture is cut into several tiles; null: it is one tile."""


class WholeModel(Section):
    """A model that exists: written by mmit, or a LLaVA directory in the layout of transformers."""

    path: str
    """The model directory, or a run's stage folder."""
    template: str = "own"
    """Chat template: ``own`` (the one the directory carries), a ``.jinja`` file, or a built-in name."""


Model = Annotated[
    Annotated[ComposedModel, Tag("parts")] | Annotated[WholeModel, Tag("whole")],
    Discriminator(
        lambda v: "whole" if ("path" in v if isinstance(v, dict) else isinstance(v, WholeModel)) else "parts"
    ),
]
