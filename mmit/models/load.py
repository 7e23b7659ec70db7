"""Open a model directory: mmit's own, or a LLaVA model in the layout of transformers (versions 4 and 5)."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter
from torch import nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from mmit.config import Connector as ConnectorSection
from mmit.config import CustomPart
from mmit.errors import CheckpointError
from mmit.images import ImageSpec
from mmit.models.connectors import Connector, build_connector
from mmit.models.encoders import (
    Cls,
    ImageInput,
    LayeredTower,
    VisionEncoder,
    build_encoder,
    tower_from_config,
)
from mmit.models.language_models import frame_language_model, token_table
from mmit.models.loaded import FORMAT, LoadedModel
from mmit.models.vlm import VisionLanguageModel
from mmit.models.weights import read_into
from mmit.templates import ChatTemplate
from mmit.tokenizer import load_tokenizer, prepare_tokenizer

MARKER = "COMPLETE"
"""File that makes a checkpoint complete; it is written last."""

Json = dict[str, Any]


def load_model(path: Path | str, *, dtype: torch.dtype, template: str = "own") -> LoadedModel:
    """The model in a directory (or in a stage's folder), in eval mode on the CPU.

    template: ``own`` for the one the directory carries, else as in ``ChatTemplate.load``. Raises CheckpointError that
    names the file, or lists the tensors, that do not fit.
    """
    directory = find_model_directory(path)
    config = read_json(directory / "config.json")
    own = read_json(directory / "mmit.json") if (directory / "mmit.json").is_file() else {}
    _check_kind(directory, config, own)
    tokenizer = load_tokenizer(str(directory))
    prepared = prepare_tokenizer(tokenizer)
    image_id = image_token(directory, config)
    if prepared.image_id != image_id:
        raise CheckpointError(
            f"{directory}: config.json has image token {image_id}, but the tokenizer's <image> is {prepared.image_id}"
        )
    frame, encoder, connector = _frame(directory, config, own, dtype=dtype)
    tower = frame.get_submodule("vision_tower")
    projector = frame.get_submodule("multi_modal_projector")
    assert isinstance(tower, VisionEncoder)
    assert isinstance(projector, Connector)
    language_model = frame.get_submodule("language_model")
    assert isinstance(language_model, PreTrainedModel)
    rows = token_table(language_model).num_embeddings
    if len(prepared.tokenizer) > rows:
        raise CheckpointError(
            f"{directory}: the tokenizer (with <image> and padding) has {len(prepared.tokenizer)} tokens, "
            f"the model {rows} embeddings; they do not belong together"
        )
    read_into(frame, directory)
    spec = stored_spec(directory, own, tower.image, tokens=projector.tokens(tower.patches))
    return LoadedModel(
        model=VisionLanguageModel(
            vision_tower=tower,
            connector=projector,
            language_model=language_model,
            spec=spec,
            image_id=image_id,
        ),
        tokenizer=prepared.tokenizer,
        template=ChatTemplate.load(template, prepared.tokenizer),
        image_id=image_id,
        pad_id=prepared.pad_id,
        style=own.get("text_style", "hf"),
        encoder=encoder,
        connector=connector,
    )


def load_weights(model: VisionLanguageModel, path: Path | str) -> None:
    """Fill a built model with the weights of a model directory (or a stage's folder).

    Raises CheckpointError where tensors or the way the encoder is read differ.
    """
    directory = find_model_directory(path)
    config = read_json(directory / "config.json")
    own = read_json(directory / "mmit.json") if (directory / "mmit.json").is_file() else {}
    _check_kind(directory, config, own)
    tower = model.vision_tower
    if "vision_feature_layer" in config and isinstance(tower, LayeredTower):
        from mmit.models.hub_files import feature_layer, select_strategy

        there = (
            _from_end(config["vision_feature_layer"], tower.depth),
            config["vision_feature_select_strategy"],
        )
        here = (feature_layer(tower), select_strategy(tower))
        if there != here:
            raise CheckpointError(
                f"{directory} reads the encoder at layer {there[0]} ({there[1]}), the run file at layer {here[0]} "
                f"({here[1]}); make model.encoder.layer and model.encoder.cls the same"
            )
    read_into(model, directory)


def find_model_directory(path: Path | str) -> Path:
    """The model directory that ``path`` means: itself, a stage's ``model/``, or its newest complete checkpoint's.

    Raises CheckpointError where there is none.
    """
    path = Path(path)
    if not path.is_dir():
        raise CheckpointError(f"there is no model directory {path}")
    complete = sorted(
        (mark.parent for mark in path.glob(f"checkpoints/step-*/{MARKER}")),
        key=lambda folder: int(folder.name.removeprefix("step-")),
    )
    for candidate in (path, path / "model", *(folder / "model" for folder in reversed(complete))):
        if (candidate / "config.json").is_file():
            return candidate
    raise CheckpointError(f"{path} holds no model: no config.json here, in model/, or in a complete checkpoint")


def _check_kind(directory: Path, config: Json, own: Json) -> None:
    if "mm_vision_tower" in config:
        raise CheckpointError(
            f"{directory} has the layout of LLaVA's original code (mm_vision_tower in config.json), which cannot be "
            "read; models in the layout of transformers (model_type llava, safetensors) can"
        )
    if int(own.get("format", 0)) > FORMAT:
        raise CheckpointError(f"{directory}/mmit.json has format {own['format']}, newer than {FORMAT}: update mmit")
    if config.get("model_type") not in ("llava", "mmit"):
        raise CheckpointError(
            f"{directory} holds a model of type '{config.get('model_type')}'; model_type llava, or a directory "
            "written by mmit, can be read"
        )
    if not isinstance(config.get("text_config"), dict):
        raise CheckpointError(f"{directory}/config.json lacks text_config, which describes the language model")


def image_token(directory: Path, config: Json) -> int:
    """The id of the image token. Both names occur in directories that transformers wrote."""
    for name in ("image_token_index", "image_token_id"):
        if isinstance(config.get(name), int):
            return config[name]
    raise CheckpointError(f"{directory}/config.json lacks image_token_index")


def _frame(directory: Path, config: Json, own: Json, *, dtype: torch.dtype) -> tuple[nn.Module, Json, Json]:
    """The three parts with unset weights, and their descriptions."""
    frame = nn.Module()
    with no_init_weights():
        tower, encoder = frame_tower(directory, config, own, dtype=dtype)
        language_model = frame_language_model(config["text_config"], dtype=dtype)
        description = own.get("connector") or {"type": "mlp", "depth": 2}
        frame.multi_modal_projector = build_connector(
            TypeAdapter(ConnectorSection).validate_python(description),
            width_in=tower.width,
            width_out=token_table(language_model).embedding_dim,
            seed=0,
            dtype=dtype,
        )
    frame.language_model = language_model
    frame.vision_tower = tower
    return frame, encoder, dict(description)


def frame_tower(directory: Path, config: Json, own: Json, *, dtype: torch.dtype) -> tuple[Any, Json]:
    """The encoder of a model directory with unset weights, and its description. Raises CheckpointError."""
    encoder: Json = dict(own.get("encoder") or {"type": "transformers", "path": str(directory)})
    cls: Cls = "keep" if config.get("vision_feature_select_strategy") == "full" else "drop"
    if "vision_config" in config:
        layer = config.get("vision_feature_layer", -2)  # transformers' default, which version 4 leaves out
        if not isinstance(layer, int):
            raise CheckpointError(
                f"{directory}/config.json: vision_feature_layer {layer}: one layer can be read, not several"
            )
        tower = tower_from_config(config["vision_config"], _processor(directory), layer=layer, cls=cls, dtype=dtype)
        return tower, encoder | {"layer": layer, "cls": cls}
    if encoder.get("type") == "open_clip":
        from mmit.models.open_clip_encoder import open_clip_from_directory

        return open_clip_from_directory(
            directory, layer=int(encoder["layer"]), cls=encoder["cls"], dtype=dtype
        ), encoder
    return build_encoder(CustomPart.model_validate(encoder), dtype=dtype), encoder


def stored_spec(directory: Path, own: Json, image: ImageInput, *, tokens: int) -> ImageSpec:
    """The image spec of ``mmit.json``, or the one that the image processor of transformers amounts to."""
    if "images" in own:
        return ImageSpec.from_dict(own["images"])
    processor = _processor(directory)
    resize: Literal["pad", "squash", "crop"] = "squash"
    if processor.get("do_pad") and processor.get("image_processor_type", "").startswith("Llava"):
        resize = "pad"
    elif processor.get("do_center_crop"):
        resize = "crop"
    return ImageSpec(size=image.size, mean=image.mean, std=image.std, resize=resize, tokens_per_tile=tokens)


def _processor(directory: Path) -> Mapping[str, Any]:
    """The image processor's settings: its own file (transformers 4), or part of ``processor_config.json`` (5)."""
    alone = directory / "preprocessor_config.json"
    if alone.is_file():
        return read_json(alone)
    joined = directory / "processor_config.json"
    if joined.is_file() and "image_processor" in (inside := read_json(joined)):
        return inside["image_processor"]
    raise CheckpointError(f"{directory} lacks preprocessor_config.json: the mean and std of its pixels are unknown")


def _from_end(layer: int, depth: int) -> int:
    return layer if layer < 0 else layer - depth - 1


def read_json(file: Path) -> Json:
    """A JSON file of a model directory. Raises CheckpointError."""
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{file} cannot be read: {error.strerror}") from error
    except ValueError as error:
        raise CheckpointError(f"{file} is damaged: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file} is damaged: it must hold one JSON object")
    return content
