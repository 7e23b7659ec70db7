"""How samples are seen for ``mmit data show``: by a language model, a model directory, or the model of a run file."""

from __future__ import annotations

import json
from pathlib import Path

from mmit.config import ComposedModel, WholeModel, load_config
from mmit.data.show import View, text_view
from mmit.encoding import Style
from mmit.errors import ConfigError
from mmit.hub import revision_of
from mmit.models import read_outline
from mmit.templates import ChatTemplate

_OF_ENCODERS = ("vision_config", "mm_vision_tower", "mm_projector_type")


def view_of(name: str, *, template: str, style: Style | None, image_tokens: int | None) -> View:
    """The view of a run file's model, of a model with its encoder, or of a language model alone.

    name: a YAML file, a directory (or a stage's folder), or a name on the hub. A model with its encoder knows its own
    tiles and image tokens; 576 is CLIP ViT-L/14 at 336 pixels. Raises ConfigError, CheckpointError.
    """
    path = Path(name).expanduser()
    section: ComposedModel | WholeModel
    if path.is_file() and path.suffix in (".yaml", ".yml"):
        section = load_config(path).model
    elif _is_whole_model(name):
        section = WholeModel(path=name)
    else:
        return text_view(name, template=template, style=style or "hf", image_tokens=image_tokens or 576)
    for option, given in (("--image-tokens", image_tokens), ("--style", style)):
        if given is not None:
            raise ConfigError(f"{option}: {name} has a model that knows this of its pictures and tiles; leave it out")
    outline = read_outline(section)
    return View(
        tokenizer=outline.tokenizer,
        template=outline.template if template == "own" else ChatTemplate.load(template, outline.tokenizer),
        spec=outline.spec,
        image_id=outline.image_id,
        style=outline.style,
    )


def _is_whole_model(name: str) -> bool:
    """Whether a directory, a stage's folder or a name on the hub holds a model with its encoder."""
    from transformers.utils.hub import cached_file

    folder = Path(name).expanduser()
    if any((folder / place / "mmit.json").is_file() for place in ("", "model")):
        return True
    file: str | Path | None = folder / "config.json"
    try:
        if not folder.exists() and not name.startswith((".", "/", "~")):
            file = cached_file(name, "config.json", revision=revision_of(name))
        content = json.loads(Path(file or "").read_text(encoding="utf-8"))
    except (OSError, ValueError):  # whoever reads it next says what is wrong with it
        return False
    return isinstance(content, dict) and any(key in content for key in _OF_ENCODERS)
