"""LLaVA as its original code writes it (LLaVA 1.0, 1.5, 1.6): a language model's config.json with ``mm_*`` in it.

Three kinds of directory, told apart by their files: the whole model; a trained projector (``mm_projector.bin``), which
needs its language model beside it; a LoRA adapter with ``non_lora_trainables.bin``, which needs it too. The vision
tower is named in config.json, and only checkpoints that trained it hold its weights.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, PreTrainedTokenizerBase

from mmit.distributed import logger
from mmit.errors import CheckpointError, ConfigError
from mmit.images import ImageSpec
from mmit.models.encoders import Cls, ImageInput, tower_from_config
from mmit.models.formats import lora
from mmit.models.formats.contents import Contents, Json, read_contents, read_json
from mmit.models.formats.form import Format
from mmit.models.formats.original_images import original_spec
from mmit.models.formats.original_names import hub_name_of, language_model_name_of, tower_name_of
from mmit.models.formats.original_write import TOWER_FOLDER, WRITER
from mmit.models.formats.places import local_directory, part_directory
from mmit.models.layout import disk_names, tensors_of
from mmit.models.stored import Source, StoredTensors, has_weights, weight_files
from mmit.templates import ChatTemplate
from mmit.tokenizer import IMAGE_TEXT, PreparedTokenizer, is_single_token, load_tokenizer, prepare_tokenizer

IMAGE_MARKS = ("<im_start>", "<im_end>")
"""What stands around a picture in the prompts of models with ``mm_use_im_start_end``."""

Kind = Literal["whole", "projector", "lora"]

_PROJECTOR_FILES = ("mm_projector.safetensors", "mm_projector.bin")
_TRAINED_FILES = ("non_lora_trainables.safetensors", "non_lora_trainables.bin")
# model_type of the original classes -> of the language model in transformers
_LANGUAGE_MODELS = {
    "llava": "llama",
    "llava_llama": "llama",
    "llava_mistral": "mistral",
    "llava_mixtral": "mixtral",
    "llava_qwen": "qwen2",
    "llava_qwen_moe": "qwen2_moe",
    "llava_gemma": "gemma",
    "llava_mpt": "mpt",
}
# fields of config.json that are the original code's, not the language model's
_FOREIGN = ("mm_", "tune_mm_", "freeze_mm_", "unfreeze_mm_", "use_mm_", "image_", "tokenizer_", "vision_tower", "s2")
_NOT_TEXT = ("architectures", "auto_map", "_name_or_path", "transformers_version", "torch_dtype", "model_type")


def is_original(contents: Contents) -> bool:
    """True where ``config.json`` names a vision tower the way the original code does, whatever its model_type."""
    return "mm_vision_tower" in contents.config and "text_config" not in contents.config


def kind_of(contents: Contents) -> Kind:
    """Which of the three kinds of directory this is. Raises CheckpointError where there are no weights at all."""
    directory = contents.directory
    if lora.is_adapter(directory):
        return "lora"
    if has_weights(directory):
        return "whole"
    if _first(directory, _PROJECTOR_FILES):
        return "projector"
    raise CheckpointError(
        f"{directory} is of LLaVA's original code, but holds no weights: pytorch_model.bin, model.safetensors, "
        "mm_projector.bin and adapter_config.json are all missing"
    )


def check(contents: Contents) -> None:
    """Raise CheckpointError for what the original code's descendants can say and mmit cannot do."""
    config, directory = contents.config, contents.directory
    for key, harmless in (("s2", (None, False)), ("mm_resampler_type", (None,))):
        if config.get(key) not in harmless:
            raise CheckpointError(f"{directory}/config.json: {key}: {config[key]} is not supported")
    if config.get("model_type") not in _LANGUAGE_MODELS:
        raise CheckpointError(
            f"{directory}/config.json: model_type {config.get('model_type')} is not known among LLaVA's original "
            f"classes ({', '.join(_LANGUAGE_MODELS)})"
        )
    connector(contents)
    if kind_of(contents) != "whole":
        base_of(contents)
    elif contents.base:
        raise ConfigError(f"{directory} holds its own language model; leave out base: {contents.base}")


def tower(contents: Contents, dtype: torch.dtype) -> tuple[nn.Module, Json]:
    """The CLIP or SigLIP tower that the directory names, with unset weights, and the section that describes it."""
    directory = _tower_directory(contents, weights=False)
    whole: Any = AutoConfig.from_pretrained(directory)
    vision = getattr(whole, "vision_config", whole)
    layer = contents.config.get("mm_vision_select_layer", -2)
    feature = contents.config.get("mm_vision_select_feature", "patch")
    if not isinstance(layer, int) or feature not in ("patch", "cls_patch"):
        raise CheckpointError(
            f"{contents.directory}/config.json: mm_vision_select_layer {layer} with feature '{feature}': one layer, "
            "and patch or cls_patch, can be read"
        )
    cls: Cls = "keep" if feature == "cls_patch" else "drop"
    processor = read_json(directory / "preprocessor_config.json")
    made = tower_from_config(vision.to_dict(), processor, layer=layer, cls=cls, dtype=dtype)
    return made, {"type": "transformers", "path": str(directory), "layer": layer, "cls": cls}


def connector(contents: Contents) -> Json:
    """The section of ``mm_projector_type``: ``linear`` (the default, LLaVA 1.0) or ``mlpNx_gelu``."""
    kind = contents.config.get("mm_projector_type", "linear")
    if kind == "linear":
        return {"type": "linear"}
    depth = str(kind).removeprefix("mlp").removesuffix("x_gelu")
    if kind == f"mlp{depth}x_gelu" and depth.isdecimal() and int(depth) > 0:
        return {"type": "mlp", "depth": int(depth)} if int(depth) > 1 else {"type": "linear"}
    raise CheckpointError(
        f"{contents.directory}/config.json: mm_projector_type {kind} is not known; linear and mlpNx_gelu can be read"
    )


def text_config(contents: Contents) -> Json:
    """The language model's configuration: config.json without what is the original code's, or that of the base."""
    if kind_of(contents) != "whole":
        base = base_of(contents)
        if is_original(base):
            return text_config(base)
        return {name: value for name, value in base.config.items() if name not in _NOT_TEXT or name == "model_type"}
    kept = {
        name: value
        for name, value in contents.config.items()
        if name not in _NOT_TEXT and not name.startswith(_FOREIGN)
    }
    return kept | {"model_type": _LANGUAGE_MODELS[contents.config["model_type"]]}


def tokenizer(contents: Contents) -> PreparedTokenizer:
    """The tokenizer of the directory, or of its base, with ``<image>`` and padding added where absent.

    Raises CheckpointError where it has more tokens than the language model has embeddings.
    """
    directory = contents.directory if kind_of(contents) == "whole" else base_of(contents).directory
    found = load_tokenizer(directory)
    rows = text_config(contents).get("vocab_size")
    if isinstance(rows, int) and len(found) > rows:
        raise CheckpointError(
            f"{directory}: the tokenizer has {len(found)} tokens, the model {rows} embeddings; they do not belong "
            "together"
        )
    return prepare_tokenizer(found)


def spec(contents: Contents, image: ImageInput, tokens: int) -> ImageSpec:
    """How the original code prepares pictures."""
    if "images" in contents.own:
        return ImageSpec.from_dict(contents.own["images"])
    processor = read_json(_tower_directory(contents, weights=False) / "preprocessor_config.json")
    return original_spec(contents.config, processor, image, tokens, where=contents.directory)


def style(contents: Contents) -> Literal["hf", "llava"]:
    """The original code tokenizes the text between images piece by piece; ``mmit.json`` may know better."""
    return contents.own.get("text_style", "llava")


def template(contents: Contents, tokenizer: PreTrainedTokenizerBase) -> str:
    """The chat template, as far as the contents tell: the original code knows it from the directory's name only."""
    if contents.own and isinstance(tokenizer.chat_template, str):
        return "own"
    kind = _LANGUAGE_MODELS[contents.config["model_type"]]
    by_kind = {"mistral": "mistral", "mixtral": "mistral", "qwen2": "qwen", "qwen2_moe": "qwen", "mpt": "mpt"}
    found = by_kind.get(kind, "gemma" if kind == "gemma" else "vicuna")
    if kind == "llama" and is_single_token(tokenizer, "<|im_start|>"):
        found = "chatml_direct"
    logger.info("%s does not say its chat template; taken: %s (--template names another)", contents.directory, found)
    return found


def with_image_marks(contents: Contents, template: ChatTemplate) -> ChatTemplate:
    """The template with ``<im_start>`` and ``<im_end>`` around each picture, where the model was trained so (1.0)."""
    if not contents.config.get("mm_use_im_start_end") or IMAGE_MARKS[0] in template.jinja:
        return template
    plain, marked = f"'{IMAGE_TEXT}'", f"'{IMAGE_MARKS[0]}{IMAGE_TEXT}{IMAGE_MARKS[1]}'"
    as_text = "{{- content -}}"  # a message that comes as one string
    if plain not in template.jinja or as_text not in template.jinja:
        raise CheckpointError(
            f"{contents.directory}: mm_use_im_start_end: the template {template.name} writes no '{IMAGE_TEXT}' that "
            "<im_start> and <im_end> could be put around"
        )
    marking = f"{{{{- content | replace({plain}, {marked}) -}}}}"
    return replace(template, jinja=template.jinja.replace(plain, marked).replace(as_text, marking))


def tensors(contents: Contents, made: nn.Module) -> StoredTensors:
    """The weights: what was trained counts before the base, and a tower inside before the one that is named."""
    directory, kind = contents.directory, kind_of(contents)
    sources = []
    if kind == "lora":
        trained = _first(directory, _TRAINED_FILES)
        if trained is None:
            raise CheckpointError(f"{directory} lacks {_TRAINED_FILES[1]}, which holds the projector")
        sources += [Source([trained], hub_name_of), lora.adapter_source(directory)]
    elif kind == "projector":
        sources.append(Source([file for file in [_first(directory, _PROJECTOR_FILES)] if file], hub_name_of))
    whole = contents
    if kind != "whole":
        whole = base_of(contents)
    rename = hub_name_of if is_original(whole) else language_model_name_of
    sources.append(Source(weight_files(whole.directory), rename))
    stored = StoredTensors(sources, where=directory)
    if kind == "lora":
        lora.fold(stored, directory)
    _add_tower(stored, contents, made)
    return stored


def base_of(contents: Contents) -> Contents:
    """The directory of the language model that a projector or an adapter was trained on.

    It is the one given as ``base``, or, where it lies on this machine, the one that the checkpoint names. Raises
    CheckpointError.
    """
    directory = contents.directory
    file = directory / lora.ADAPTER_CONFIG
    adapter = read_json(file) if file.is_file() else {}
    named = str(adapter.get("base_model_name_or_path") or contents.config.get("_name_or_path") or "")
    remedy = "give a local copy as base (model.base in a run file, --base on the command line)"
    if contents.base:
        found = part_directory(contents.base, Path(), remedy=remedy)
    else:
        local = local_directory(named, directory)
        if local is None or local.resolve() == directory.resolve():
            raise CheckpointError(
                f"{directory} holds no language model, only what was trained beside it"
                f"{f' ({named})' if named else ''}; give that model as base (model.base in a run file, --base on the "
                "command line)"
            )
        found = local
    base = read_contents(found)
    if "text_config" in base.config or lora.is_adapter(found):
        raise CheckpointError(f"base {found} is no plain language model and no whole LLaVA of the original code")
    return base


def _add_tower(stored: StoredTensors, contents: Contents, made: nn.Module) -> None:
    """Take what the checkpoint does not hold of its tower from the one that it names."""
    names = [f"vision_tower.{name}" for name, _ in tensors_of(made)]
    pieces = {piece for found in disk_names(made, names).values() for piece in found}
    inside = {name for name in stored.shapes if name.startswith("vision_tower.")}
    if inside:
        logger.info("%s holds weights of its vision tower, which count before those of the one it names", stored.where)
    if not pieces <= inside:
        directory = _tower_directory(contents, weights=True)
        stored.add(Source(weight_files(directory), tower_name_of))


def _tower_directory(contents: Contents, *, weights: bool) -> Path:
    name = contents.tower or str(contents.config["mm_vision_tower"])
    beside = contents.directory / TOWER_FOLDER
    if not contents.tower and Path(name).name == TOWER_FOLDER and beside.is_dir():
        return beside  # mmit wrote it; the full path in config.json is of where it stood then
    remedy = (
        f"{contents.directory} needs its vision tower: give a local copy as tower (model.tower in a run file, --tower "
        "on the command line)"
    )
    return part_directory(name, Path() if contents.tower else contents.directory, remedy=remedy, weights=weights)


def _first(directory: Path, names: tuple[str, ...]) -> Path | None:
    return next((directory / name for name in names if (directory / name).is_file()), None)


ORIGINAL = Format(
    name="llava-original",
    title="LLaVA as its original code writes it",
    recognises=is_original,
    check=check,
    tower=tower,
    connector=connector,
    text_config=text_config,
    tokenizer=tokenizer,
    spec=spec,
    style=style,
    tensors=tensors,
    template=template,
    adapt_template=with_image_marks,
    names_parts=True,
    adds_tokens=True,
    write=WRITER,
)
