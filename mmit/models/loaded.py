"""A model with all that is needed to speak with it or to train it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from mmit.encoding import Style
from mmit.images import ImageSpec
from mmit.instructions import InstructionReader
from mmit.models.vlm import VisionLanguageModel
from mmit.templates import ChatTemplate

FORMAT = 1
"""Version of ``mmit.json``; a directory with a higher one was written by a newer mmit."""


@dataclass(kw_only=True)
class LoadedModel:
    """A model, its tokenizer and template, and how its text is tokenized.

    style: how text around images becomes ids (see ``mmit.templates``). encoder, connector: the sections of a run file
    that describe these parts; kept in ``mmit.json``. instructions: gives the connector its questions, where it reads
    them.
    """

    model: VisionLanguageModel
    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    image_id: int
    pad_id: int
    style: Style
    encoder: Mapping[str, Any]
    connector: Mapping[str, Any]
    instructions: InstructionReader | None = None

    @property
    def spec(self) -> ImageSpec:
        """How pictures enter the model."""
        return self.model.spec
