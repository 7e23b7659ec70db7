"""The ``model`` section of a run file: encoder, connector and language model, or a model that exists."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Discriminator, Tag

from mmit.config.connectors import Connector, MlpConnector
from mmit.config.encoders import Encoder
from mmit.config.sections import Section
from mmit.config.tiling import Tiling


class LanguageModel(Section):
    """The causal language model."""

    path: str
    """Directory or hub name, anything that ``AutoModelForCausalLM`` builds."""
    template: str = "own"
    """Chat template: ``own`` (the tokenizer's), a ``.jinja`` file, or a built-in name such as ``vicuna``."""
    new_tokens: tuple[str, ...] = ()
    """Texts that become tokens of their own, such as ``<box>``; the rule ``new_tokens`` trains their rows alone."""
    text_style: Literal["hf", "llava", "blip"] = "hf"
    """How text around images is tokenized: in one piece (``hf``), each piece on its own as in LLaVA's code
    (``llava``), or with the pictures before the start token as in InstructBLIP (``blip``)."""


class ComposedModel(Section):
    """A model composed of parts; the connector starts fresh."""

    encoder: Encoder
    connector: Connector = MlpConnector()
    language_model: LanguageModel
    tiling: Tiling | None = None
    """How a picture is cut into several tiles; null: it is one tile."""


class WholeModel(Section):
    """A model that exists, in any of the formats of docs/checkpoints.md."""

    path: str
    """The model directory, a run's stage folder, or a name on the hub (``llava-hf/llava-1.5-7b-hf``)."""
    template: str = "own"
    """Chat template: ``own`` (the one the directory carries), a ``.jinja`` file, or a built-in name."""
    base: str | None = None
    """Language model (directory or hub name) that a projector or LoRA of LLaVA's original code was trained on."""
    tower: str | None = None
    """Vision tower (directory or hub name) in the place of the one that such a checkpoint names."""


Model = Annotated[
    Annotated[ComposedModel, Tag("parts")] | Annotated[WholeModel, Tag("whole")],
    Discriminator(
        lambda v: "whole" if ("path" in v if isinstance(v, dict) else isinstance(v, WholeModel)) else "parts"
    ),
]
