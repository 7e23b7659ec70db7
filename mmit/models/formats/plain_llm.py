"""The language model alone, as a plain directory of transformers: written on request, and read as an LLM anywhere."""

from __future__ import annotations

import torch

from mmit.models import hub_files
from mmit.models.formats import llava
from mmit.models.formats.contents import Json
from mmit.models.formats.form import Writer
from mmit.models.loaded import LoadedModel
from mmit.models.vlm import VisionLanguageModel

_PREFIX = "language_model."


def why_not(_: VisionLanguageModel) -> None:
    """None: every language model came from such a directory."""


def config(loaded: LoadedModel, dtype: torch.dtype) -> Json:
    """``config.json``, readable by transformers 4 and 5."""
    language_model = loaded.model.language_model
    return {
        **hub_files.text_config(language_model, dtype=dtype),
        "architectures": [type(language_model).__name__],
        "pad_token_id": loaded.pad_id,
    }


def its_own_name(name: str) -> str | None:
    """The name in the language model's own class; None for what is not part of it."""
    return name.removeprefix(_PREFIX) if name.startswith(_PREFIX) else None


PLAIN_LLM = Writer(
    why_not=why_not,
    config=config,
    files=llava.no_files,
    disk_name=its_own_name,
    processor_class="",
    on_request=True,
    describes=False,
)
"""What ``mmit export --llm-only`` writes."""
