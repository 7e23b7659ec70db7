"""How a model directory sees samples, for ``mmit data show``: with its own tiles and image tokens."""

from __future__ import annotations

import json
from pathlib import Path

from mmit.config import WholeModel
from mmit.data.show import View
from mmit.encoding import Style
from mmit.errors import ConfigError
from mmit.models import read_outline

_OF_ENCODERS = ("vision_config", "mm_vision_tower", "mm_projector_type")


def is_whole_model(path: str) -> bool:
    """Whether a directory (or a stage's folder) holds a model with its encoder, and not a language model alone."""
    folder = Path(path)
    if any((folder / place / "mmit.json").is_file() for place in ("", "model")):
        return True
    try:
        content = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(content, dict) and any(key in content for key in _OF_ENCODERS)


def model_view(path: str, *, template: str, style: Style | None, image_tokens: int | None) -> View:
    """The view of a model directory. Raises ConfigError where words contradict it, CheckpointError."""
    for option, given in (("--image-tokens", image_tokens), ("--style", style)):
        if given is not None:
            raise ConfigError(f"{option}: {path} is a model that knows this of its pictures and tiles; leave it out")
    outline = read_outline(WholeModel(path=path, template=template))
    return View(
        tokenizer=outline.tokenizer,
        template=outline.template,
        spec=outline.spec,
        image_id=outline.image_id,
        style=outline.style,
    )
