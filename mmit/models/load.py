"""Open a model directory of any format (see ``formats``)."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import TypeAdapter
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase
from transformers.initialization import no_init_weights

from mmit.config import Connector as ConnectorSection
from mmit.config import WholeModel
from mmit.errors import CheckpointError
from mmit.models.absent import AbsentTower, frame_of
from mmit.models.adapter_names import base_directory, holds_adapter
from mmit.models.connectors import Connector, build_connector, instruction_reader
from mmit.models.encoders import LayeredTower, VisionEncoder, encoders_of
from mmit.models.formats import Contents, Format, detect, read_contents
from mmit.models.formats.contents import Json, buildable
from mmit.models.formats.places import model_from_hub
from mmit.models.hub_files import feature_layer, select_strategy
from mmit.models.language_models import frame_language_model, grow_embeddings, token_table
from mmit.models.loaded import LoadedModel
from mmit.models.placement import placed
from mmit.models.vlm import VisionLanguageModel
from mmit.models.weights import read_into
from mmit.templates import ChatTemplate

logger = logging.getLogger("mmit")

NEWLINE = "image_newline"
"""The newline token, in a model and in a directory."""

MARKER = "COMPLETE"
"""File that makes a checkpoint complete; it is written last."""


Adapter = Literal["merge", "keep", "drop"]
"""What becomes of the adapter of a directory: added to the weights, put beside them, or not read."""


ModelSource = WholeModel | Path | str
"""A model directory, or a run file's section that names one with its base, tower and template."""


def load_model(
    model: ModelSource,
    *,
    dtype: torch.dtype,
    adapter: Adapter = "merge",
    absent: AbsentTower | None = None,
) -> LoadedModel:
    """The model in a directory (or in a stage's folder), in eval mode on the CPU.

    absent: stands in the tower's
    place, which is then not read. Raises CheckpointError that names the file, or lists the tensors, that do not fit.
    """
    section = model if isinstance(model, WholeModel) else WholeModel(path=str(model))
    contents, form = open_section(section)
    prepared = form.tokenizer(contents)
    with buildable(contents.directory):
        frame, encoder, connector = _frame(contents, form, dtype=dtype)
    tower = frame.get_submodule("vision_tower")
    projector = frame.get_submodule("multi_modal_projector")
    assert isinstance(tower, VisionEncoder)
    assert isinstance(projector, Connector)
    if absent is not None:
        frame.vision_tower = absent
    language_model = frame.get_submodule("language_model")
    assert isinstance(language_model, PreTrainedModel)
    rows = token_table(language_model).num_embeddings
    if len(prepared.tokenizer) > rows and not form.adds_tokens:
        raise CheckpointError(
            f"{contents.directory}: the tokenizer (with <image> and padding) has {len(prepared.tokenizer)} tokens, "
            f"the model {rows} embeddings; they do not belong together"
        )
    with buildable(contents.directory):
        spec = form.spec(contents, tower.image, projector.tokens(tower.patches))
    newline = None
    if spec.has_newline:
        newline = nn.Parameter(torch.empty(token_table(language_model).embedding_dim, dtype=dtype))
        frame.image_newline = newline
    with form.tensors(contents, tower) as stored:
        read_into(frame, stored)
    vocabulary = contents.own.get("vocabulary")
    if len(prepared.tokenizer) > rows:
        grow_embeddings(language_model, len(prepared.tokenizer))
        vocabulary = rows  # the rows for <image> and padding are no words that the model was trained not to say
    template = chosen_template(section, contents, form, prepared.tokenizer)
    made = VisionLanguageModel(
        vision_tower=absent or tower,
        connector=projector,
        language_model=language_model,
        spec=spec,
        image_id=prepared.image_id,
        image_newline=newline,
        vocabulary=vocabulary,
        tokens=len(prepared.tokenizer),
        new_ids=tuple(contents.own.get("new_tokens", ())),
    )
    _take_adapter(made, find_model_directory(section.path), adapter)
    return LoadedModel(
        model=made,
        tokenizer=prepared.tokenizer,
        template=template,
        image_id=prepared.image_id,
        pad_id=prepared.pad_id,
        style=form.style(contents),
        encoder=encoder,
        connector=connector,
        instructions=instruction_reader(projector),
    )


def load_weights(
    model: VisionLanguageModel,
    path: Path | str,
    *,
    adapter: Adapter = "merge",
    connector: Mapping[str, Any] | None = None,
) -> None:
    """Fill a built model with the weights of a model directory (or a stage's folder).

    A model that cuts pictures into tiles may start from one that does not; its newline token stays as it was drawn.
    connector: the section of the model's connector, held against the directory's, since not all of it shows in shapes.
    Raises CheckpointError where tensors, the connector, or the way the encoder is read differ.
    """
    directory = find_model_directory(path)
    contents = read_contents(directory)
    form = detect(contents)
    if form.names_parts:
        raise CheckpointError(
            f"{directory} is {form.title}, whose rows for <image> and padding are added when it is opened; give it as "
            "model.path (with base and tower where it needs them), not as init_from"
        )
    tower = frame_of(model.vision_tower)
    _check_reading(contents, tower)
    _check_connector(contents, connector)
    with placed(model.placement), form.tensors(contents, tower) as stored:
        stays = model.image_newline is not None and NEWLINE not in stored.shapes and not _unpads(contents, form, model)
        if stays:
            logger.info("%s has no %s, as it does not unpad pictures: the fresh one stays", directory, NEWLINE)
        read_into(model, stored, may_lack=(NEWLINE,) if stays else ())
    _take_adapter(model, directory, adapter)


def _check_connector(contents: Contents, connector: Mapping[str, Any] | None) -> None:
    there = contents.own.get("connector")
    if connector is None or not isinstance(there, dict):
        return
    ways = ("pretrained", "dropout")  # where weights come from, and what only training does
    differ = [key for key in there if key not in ways and key in connector and there[key] != connector[key]]
    if differ:
        told = "; ".join(f"{key} {there[key]!r}, here {connector[key]!r}" for key in differ[:3])
        raise CheckpointError(
            f"{contents.directory} has another connector than the run file: {told}; make model.connector the same"
        )


def open_section(section: WholeModel) -> tuple[Contents, Format]:
    """The contents of the directory that a run file names, and its format."""
    directory = find_model_directory(section.path)
    contents = read_contents(directory, base=section.base or "", tower=section.tower or "")
    return contents, detect(contents)


def chosen_template(
    section: WholeModel, contents: Contents, form: Format, tokenizer: PreTrainedTokenizerBase
) -> ChatTemplate:
    """The chat template that a run file names, or the directory's own."""
    name = section.template if section.template != "own" else form.template(contents, tokenizer)
    return form.adapt_template(contents, ChatTemplate.load(name, tokenizer))


def _is_step(folder: Path) -> bool:
    return folder.name.removeprefix("step-").isdecimal()


def find_model_directory(path: Path | str) -> Path:
    """The model directory that ``path`` means: itself, a stage's ``model/``, its newest complete checkpoint's, or the
    copy of what has that name on the hub.

    Raises CheckpointError where there is none.
    """
    path = Path(path) if Path(path).is_dir() else model_from_hub(str(path))
    complete = sorted(
        (mark.parent for mark in path.glob(f"checkpoints/step-*/{MARKER}") if _is_step(mark.parent)),
        key=lambda folder: int(folder.name.removeprefix("step-")),
    )
    for candidate in (path, path / "model", *(folder / "model" for folder in reversed(complete))):
        if (base_directory(candidate) / "config.json").is_file():
            return candidate
    raise CheckpointError(f"{path} holds no model: no config.json here, in model/, or in a complete checkpoint")


def _unpads(contents: Contents, form: Format, model: VisionLanguageModel) -> bool:
    """Whether the model in a directory puts newline tokens between the rows of its pictures."""
    assert isinstance(model.vision_tower, VisionEncoder)
    return form.spec(contents, model.vision_tower.image, model.spec.tokens_per_tile).has_newline


def _take_adapter(model: VisionLanguageModel, directory: Path, adapter: Adapter) -> None:
    if adapter == "drop" or not holds_adapter(directory):
        return
    from mmit.models.adapter_files import read_adapter
    from mmit.models.adapters import merge_adapter

    read_adapter(model, directory)
    if adapter == "merge":
        merge_adapter(model)


def _frame(contents: Contents, form: Format, *, dtype: torch.dtype) -> tuple[nn.Module, Json, Json]:
    """The three parts with unset weights, and the sections of tower and connector."""
    frame = nn.Module()
    connector = form.connector(contents)
    with no_init_weights():
        tower, encoder = form.tower(contents, dtype)
        assert isinstance(tower, VisionEncoder)
        language_model = frame_language_model(form.text_config(contents), dtype=dtype)
        frame.multi_modal_projector = build_connector(
            TypeAdapter(ConnectorSection).validate_python(connector),
            width_in=tower.width,
            width_out=token_table(language_model).embedding_dim,
            patches=tower.patches,
            seed=0,
            dtype=dtype,
        )
    frame.language_model = language_model
    frame.vision_tower = tower
    return frame, encoder, connector


def _check_reading(contents: Contents, tower: nn.Module) -> None:
    """Raise CheckpointError where the directory reads its encoders elsewhere than the run file does."""
    stored, encoders = _stored_readings(contents), encoders_of(tower)
    if stored and len(stored) != len(encoders):
        raise CheckpointError(
            f"{contents.directory} has {len(stored)} encoders, the run file {len(encoders)}; make the lists the same"
        )
    for (layer, strategy), encoder in zip(stored, encoders, strict=False):
        if layer is None or not isinstance(encoder, LayeredTower):
            continue
        there, here = (_from_end(layer, encoder.depth), strategy), (feature_layer(encoder), select_strategy(encoder))
        if there != here:
            raise CheckpointError(
                f"{contents.directory} reads the encoder at layer {there[0]} ({there[1]}), the run file at layer "
                f"{here[0]} ({here[1]}); make model.encoder.layer and model.encoder.cls the same"
            )


def _stored_readings(contents: Contents) -> list[tuple[int | list[int] | None, str]]:
    """Layer, and transformers' word for the class token, of each encoder; nothing where the directory does not say.

    An encoder of one's own has no layer: None.
    """
    config = contents.config
    if "vision_feature_layer" in config:
        return [(config["vision_feature_layer"], config["vision_feature_select_strategy"])]
    if config.get("model_type") == "instructblip":  # it has no choice
        return [(-1, "full")]
    towers = contents.own.get("towers", [])
    return [(tower.get("layer"), "default" if tower.get("cls") == "drop" else "full") for tower in towers]


def _from_end(layer: int | list[int], depth: int) -> int | list[int]:
    if isinstance(layer, int):
        return layer if layer < 0 else layer - depth - 1
    counts = [count if count < 0 else count - depth - 1 for count in layer]
    return counts[0] if len(counts) == 1 else counts
