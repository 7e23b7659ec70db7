"""LLaVA in the layout of transformers (``LlavaForConditionalGeneration``), as versions 4 and 5 write it.

The other formats of transformers differ from it in a few functions and take the rest from here.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

import torch
from torch import nn

from mmit.encoding import Style
from mmit.errors import CheckpointError
from mmit.images import ImageSpec
from mmit.models import hub_files
from mmit.models.adapter_names import transformers_name
from mmit.models.connectors import MlpProjector
from mmit.models.encoders import Cls, ImageInput, encoders_of, frame_towers, layer_of, tower_from_config
from mmit.models.formats.contents import Contents, Json, read_json
from mmit.models.formats.form import Format, Writer
from mmit.models.formats.parts import section_of
from mmit.models.layout import hub_form, hub_name
from mmit.models.loaded import LoadedModel
from mmit.models.stored import Source, StoredTensors, weight_files
from mmit.models.vlm import VisionLanguageModel
from mmit.tokenizer import PreparedTokenizer, load_tokenizer, prepare_tokenizer

PROJECTOR = {"type": "mlp", "depth": 2}
"""The connector of every LLaVA model of transformers, as a section of a run file."""


def is_llava(contents: Contents) -> bool:
    """True where ``config.json`` is that of a LLaVA model of transformers."""
    return contents.config.get("model_type") == "llava"


def check(contents: Contents) -> None:
    """Raise CheckpointError where the language model is not described."""
    contents.text_config()


def tower(contents: Contents, dtype: torch.dtype) -> tuple[nn.Module, Json]:
    """The encoder of a model directory with unset weights, and the section that describes it."""
    config, directory = contents.config, contents.directory
    encoder = section_of(contents, "encoder", default={"type": "transformers", "path": str(directory)})
    cls: Cls = "keep" if config.get("vision_feature_select_strategy") == "full" else "drop"
    if "vision_config" in config:
        layer = config.get("vision_feature_layer", -2)  # transformers' default, which version 4 leaves out
        made = tower_from_config(
            config["vision_config"], contents.image_processor(), layer=layer_of(layer), cls=cls, dtype=dtype
        )
        if config.get("model_type") != "mmit" and (reason := made.hub_form().why_not_llava):
            raise CheckpointError(
                f"{directory}/config.json: this LLaVA model cannot be read as transformers does: {reason}"
            )
        return made, encoder | {"layer": layer, "cls": cls}
    if "towers" in contents.own:
        return frame_towers(contents.own["towers"], dtype=dtype), encoder
    if encoder.get("type") == "open_clip":
        return frame_towers([_old_open_clip(directory, encoder)], dtype=dtype), encoder
    # mmit 0.1 kept of an encoder of one's own only its section
    return frame_towers([{"library": "custom", "config": {"args": {}} | encoder}], dtype=dtype), encoder


def _old_open_clip(directory: Path, encoder: Json) -> Json:
    """The description of an open_clip tower that mmit 0.1 kept in ``open_clip_config.json``."""
    stored = read_json(directory / "open_clip_config.json")
    return {
        "library": "open_clip",
        "config": stored["model_cfg"],
        "layer": encoder["layer"],
        "cls": encoder["cls"],
        "image": stored["preprocess_cfg"],
    }


def connector(contents: Contents) -> Json:
    """The connector's section of a run file."""
    return section_of(contents, "connector", default=PROJECTOR)


def tokenizer(contents: Contents) -> PreparedTokenizer:
    """The directory's tokenizer. Raises CheckpointError where its ``<image>`` is not the model's image token."""
    prepared = prepare_tokenizer(load_tokenizer(str(contents.directory)))
    image_id = contents.image_token()
    if prepared.image_id != image_id:
        raise CheckpointError(
            f"{contents.directory}: config.json has image token {image_id}, but the tokenizer's <image> is "
            f"{prepared.image_id}"
        )
    return prepared


def spec(contents: Contents, image: ImageInput, tokens: int) -> ImageSpec:
    """The image spec of ``mmit.json``, or the one that the image processor of transformers amounts to."""
    if "images" in contents.own:
        return ImageSpec.from_dict(contents.own["images"])
    processor = contents.image_processor()
    resize: Literal["pad", "squash", "crop"] = "squash"
    if processor.get("do_pad") and processor.get("image_processor_type", "").startswith("Llava"):
        resize = "pad"
    elif processor.get("do_center_crop"):
        resize = "crop"
    return ImageSpec(size=image.size, mean=image.mean, std=image.std, resize=resize, tokens_per_tile=tokens)


def style(contents: Contents) -> Style:
    """As ``mmit.json`` says; transformers' own style in a directory that mmit did not write."""
    return contents.own.get("text_style", "hf")


def tensors(contents: Contents, made: nn.Module) -> StoredTensors:
    """The weights, whichever of transformers' three layouts of names they have."""
    form = hub_form(made)
    source = Source(files=weight_files(contents.directory), rename=lambda stored: hub_name(stored, form))
    return StoredTensors([source], where=contents.directory)


def why_not(model: VisionLanguageModel) -> str | None:
    """Why transformers' LlavaForConditionalGeneration cannot hold this model, or None where it can."""
    if model.spec.tiling is not None:
        return f"Llava has one tile for an image, this model cuts it ({type(model.spec.tiling).__name__.lower()})"
    return why_not_parts(model)


def why_not_parts(model: VisionLanguageModel) -> str | None:
    """Why no LLaVA class of transformers has the parts of this model, or None where they have."""
    projector = model.multi_modal_projector
    if (reason := _why_not_tower(model.vision_tower)) is not None:
        return reason
    if not isinstance(projector, MlpProjector) or projector.depth != 2:
        depth = f" of {projector.depth} layers" if isinstance(projector, MlpProjector) else ""
        return f"its projector has exactly two linear layers, this connector is {type(projector).__name__}{depth}"
    return why_not_head(model)


def why_not_head(model: VisionLanguageModel) -> str | None:
    """Why a language model does not fit into a LLaVA class as it is, or None where it does."""
    language_model = model.language_model
    head = language_model.get_output_embeddings()
    if not model.head_is_plain or not isinstance(head, nn.Linear) or head.bias is not None:
        return f"its head is a plain matrix, the one of {type(language_model).__name__} does more"
    if language_model.base_model_prefix != "model":
        return f"the tensors of {type(language_model).__name__} are not named model.* and lm_head.*"
    return None


def _why_not_tower(made: nn.Module) -> str | None:
    if (encoders := len(encoders_of(made))) > 1:
        return f"its LLaVA classes have one encoder, this model has {encoders}"
    form = hub_form(made)
    return f"transformers has no class for the encoder {type(made).__name__}" if form is None else form.why_not_llava


def no_files(_: LoadedModel) -> dict[str, Json]:
    """For formats that keep no settings of a processor beside the model."""
    return {}


def config(loaded: LoadedModel, dtype: torch.dtype) -> Json:
    """``config.json`` of a LLaVA model."""
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        **hub_files.common_config(loaded.model, pad_id=loaded.pad_id, dtype=dtype),
        "ignore_index": -100,
        "projector_hidden_act": "gelu",
        "multimodal_projector_bias": True,
    }


def files(loaded: LoadedModel) -> dict[str, Json]:
    """The processor's settings, for transformers 4 and 5."""
    found = {"preprocessor_config.json": hub_files.preprocessor_config(loaded.spec)}
    if hub_form(loaded.model.vision_tower) is not None:
        found["processor_config.json"] = hub_files.processor_config(loaded.model)
    return found


LLAVA = Format(
    name="llava",
    title="LLaVA in the layout of transformers",
    recognises=is_llava,
    check=check,
    tower=tower,
    connector=connector,
    text_config=Contents.text_config,
    tokenizer=tokenizer,
    spec=spec,
    style=style,
    tensors=tensors,
    write=Writer(
        why_not=why_not,
        config=config,
        files=files,
        module_name=transformers_name,
        opens_as="LlavaForConditionalGeneration",
    ),
)
