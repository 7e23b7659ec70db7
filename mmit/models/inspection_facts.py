"""What the descriptions beside the weights say: kind, sizes of the parts, template, image settings, origin."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmit.errors import CheckpointError, ConfigError
from mmit.models.formats import FORMATS, Contents
from mmit.models.formats.foreign import foreign
from mmit.models.formats.lora import is_adapter
from mmit.models.formats.original import ORIGINAL
from mmit.models.formats.original import kind_of as original_kind
from mmit.models.headers import TensorHeader
from mmit.models.loaded import FORMAT

Json = dict[str, Any]

_TEXT = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size")
_VISION = ("model_type", "hidden_size", "num_hidden_layers", "image_size", "patch_size")
_ORIGINAL = (
    *("mm_vision_tower", "mm_projector_type", "mm_vision_select_layer", "mm_vision_select_feature"),
    *("image_aspect_ratio", "mm_patch_merge_type", "image_grid_pinpoints", "mm_use_im_start_end"),
)
_OWN = ("template", "text_style", "encoder", "connector", "images", "made_from", "packages", "not_llava_because")
_PROCESSOR = ("image_processor_type", "size", "crop_size", "do_pad", "do_center_crop", "image_mean", "image_std")
_KINDS = {
    "whole": "whole",
    "projector": "a projector alone: it needs its language model as base",
    "lora": "a LoRA adapter with its projector: it needs its language model as base",
}


def kind_of(directory: Path, config: Json, own: Json, problems: list[str]) -> str:
    """What a directory with a ``config.json`` is, in words; what keeps it from being opened goes to ``problems``."""
    contents = Contents(directory=directory, config=config, own=own)
    if int(own.get("format", 0)) > FORMAT:
        problems.append(f"mmit.json has format {own['format']}, newer than {FORMAT}: update mmit")
    form = next((form for form in FORMATS if form.recognises(contents)), None)
    if form is not None:
        title = form.title
        try:
            if form is ORIGINAL:
                title = f"{form.title}, {_KINDS[original_kind(contents)]}"
            else:
                form.check(contents)
        except (CheckpointError, ConfigError) as error:
            problems.append(str(error))
        return title
    if (found := foreign(config)) is not None:
        return found[0]
    if is_adapter(directory):
        return "an adapter of peft"
    return f"a model of type '{config.get('model_type')}', which mmit does not know"


def facts_of(directory: Path, config: Json, own: Json) -> Json:
    """What is worth knowing, from config.json, mmit.json and the processor's file."""
    facts: Json = {}
    text = config.get("text_config")
    text = text if isinstance(text, dict) else config
    if found := _picked(text, _TEXT):
        facts["language model" if "vocab_size" in text else "model"] = found
    if isinstance(config.get("vision_config"), dict):
        facts["vision tower"] = _picked(config["vision_config"], _VISION)
    if "vision_feature_layer" in config:
        facts["read at"] = _picked(config, ("vision_feature_layer", "vision_feature_select_strategy"))
    facts |= _picked(config, ("torch_dtype", "dtype", "image_token_index", "image_token_id", "architectures"))
    facts |= _picked(config, _ORIGINAL)
    facts |= _picked(own, _OWN)
    if not own:
        facts |= _processor(directory)
    names = ("chat_template.jinja", "tokenizer.json", "tokenizer.model", "generation_config.json")
    facts["beside the weights"] = [name for name in names if (directory / name).is_file()]
    return facts


def misfits(config: Json, tensors: Sequence[TensorHeader]) -> list[str]:
    """Parts whose sizes do not fit each other, as far as config.json says the sizes."""
    shapes = {tensor.name.removeprefix("base_model.model."): tensor.shape for tensor in tensors}
    first = next((shape for name, shape in shapes.items() if name.endswith(_FIRST_LAYER) and len(shape) == 2), None)
    vision, text = config.get("vision_config"), config.get("text_config", config)
    problems = []
    if first is not None and isinstance(vision, dict) and isinstance(width := vision.get("hidden_size"), int):
        layers = config.get("vision_feature_layer", -2)
        width *= len(layers) if isinstance(layers, list) else 1
        if first[1] != width:
            problems.append(f"the projector takes features of width {first[1]}, the vision tower gives {width}")
    if first is not None and isinstance(hidden := text.get("hidden_size"), int) and first[0] != hidden:
        problems.append(f"the projector gives width {first[0]}, the language model takes {hidden}")
    table = next((shape for name, shape in shapes.items() if name.endswith("embed_tokens.weight")), None)
    if table is not None and isinstance(rows := text.get("vocab_size"), int) and table[0] != rows:
        problems.append(f"config.json says {rows} tokens, the table of embeddings has {table[0]} rows")
    return problems


_FIRST_LAYER = ("multi_modal_projector.linear_1.weight", "mm_projector.0.weight", "mm_projector.weight")


def _picked(source: Mapping[str, Any], names: Sequence[str]) -> Json:
    return {name: source[name] for name in names if source.get(name) is not None}


def _processor(directory: Path) -> Json:
    try:
        settings = Contents(directory=directory, config={}, own={}).image_processor()
    except CheckpointError:
        return {}
    return {"image processor": _picked(settings, _PROCESSOR)}
