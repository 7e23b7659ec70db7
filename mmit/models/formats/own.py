"""mmit's own layout, for models that no class of transformers holds: LLaVA's names under ``model_type`` ``mmit``."""

from __future__ import annotations

from dataclasses import replace

import torch

from mmit.models import hub_files
from mmit.models.formats import llava
from mmit.models.formats.contents import Contents, Json
from mmit.models.formats.form import Writer
from mmit.models.loaded import LoadedModel
from mmit.models.vlm import VisionLanguageModel


def is_own(contents: Contents) -> bool:
    """True where mmit wrote the directory for itself."""
    return contents.config.get("model_type") == "mmit"


def holds_everything(_: VisionLanguageModel) -> None:
    """None: no reason against it."""


def config(loaded: LoadedModel, dtype: torch.dtype) -> Json:
    """``config.json``: the fields of a LLaVA model, under a type that no class of transformers has."""
    return {
        "architectures": ["mmit.VisionLanguageModel"],
        "model_type": "mmit",
        **hub_files.common_config(loaded.model, pad_id=loaded.pad_id, dtype=dtype),
    }


OWN = replace(
    llava.LLAVA,
    name="own",
    title="mmit's own layout",
    recognises=is_own,
    write=Writer(why_not=holds_everything, config=config, files=llava.files),
)
