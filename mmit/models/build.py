"""A model from the ``model`` section of a run file: parts that exist, and a fresh connector between them."""

from __future__ import annotations

import torch
from torch import nn

from mmit.config import ComposedModel, QFormerConnector, WholeModel
from mmit.images import ImageSpec, View
from mmit.models.absent import AbsentTower, frame_of
from mmit.models.connectors import Connector, build_connector, check_picture, instruction_reader
from mmit.models.connectors.qformer import QFormer
from mmit.models.connectors.qformer_weights import start_from
from mmit.models.encoders import VisionEncoder, build_encoder, encoders_of, section_of
from mmit.models.language_models import check_vocabulary, grow_embeddings, read_language_model, start_rows, token_table
from mmit.models.load import Adapter, load_model
from mmit.models.loaded import LoadedModel
from mmit.models.tiling import fresh_newline, tiling_of
from mmit.models.vlm import VisionLanguageModel
from mmit.templates import ChatTemplate
from mmit.tokenizer import add_tokens, load_tokenizer, prepare_tokenizer


def build_model(
    section: ComposedModel | WholeModel,
    *,
    dtype: torch.dtype,
    seed: int,
    adapter: Adapter = "merge",
    tower: AbsentTower | None = None,
) -> LoadedModel:
    """The model of a run file, in eval mode on the CPU; the fresh connector depends on ``seed`` alone.

    adapter: what becomes of the one that a model directory holds. tower: stands in the tower's place, which is then not
    read. Raises ConfigError or CheckpointError for parts that are missing or do not fit.
    """
    if isinstance(section, WholeModel):
        return load_model(section, dtype=dtype, adapter=adapter, absent=tower)
    return _compose(section, tower or build_encoder(section.encoder, dtype=dtype), dtype=dtype, seed=seed)


def _compose(section: ComposedModel, tower: nn.Module, *, dtype: torch.dtype, seed: int) -> LoadedModel:
    assert isinstance(tower, VisionEncoder), "build_encoder checks it"
    llm_path = section.language_model.path
    language_model = read_language_model(llm_path, dtype=dtype)
    tokenizer = load_tokenizer(llm_path)
    check_vocabulary(llm_path, len(tokenizer), language_model)
    prepared = prepare_tokenizer(tokenizer, rows=token_table(language_model).num_embeddings)
    new_ids = add_tokens(prepared.tokenizer, section.language_model.new_tokens)
    grow_embeddings(language_model, len(prepared.tokenizer))
    start_rows(language_model, new_ids)
    width = token_table(language_model).embedding_dim
    connector = build_connector(
        section.connector,
        width_in=tower.width,
        width_out=width,
        patches=tower.patches,
        seed=seed,
        dtype=dtype,
    )
    assert isinstance(connector, Connector), "build_connector checks it"
    if isinstance(section.connector, QFormerConnector) and section.connector.pretrained:
        assert isinstance(connector, QFormer), "the section is that of one"
        start_from(connector, section.connector.pretrained)
    spec = image_spec(section, frame_of(tower), connector)
    return LoadedModel(
        model=VisionLanguageModel(
            vision_tower=tower,
            connector=connector,
            language_model=language_model,
            spec=spec,
            image_id=prepared.image_id,
            tokens=len(prepared.tokenizer),
            new_ids=new_ids,
            image_newline=fresh_newline(width, seed=seed, dtype=dtype) if spec.has_newline else None,
        ),
        tokenizer=prepared.tokenizer,
        template=ChatTemplate.load(section.language_model.template, prepared.tokenizer),
        image_id=prepared.image_id,
        pad_id=prepared.pad_id,
        style=section.language_model.text_style,
        encoder=section_of(section.encoder),
        connector=section.connector.model_dump(),
        instructions=instruction_reader(connector),
    )


def image_spec(section: ComposedModel, tower: nn.Module, connector: Connector) -> ImageSpec:
    """How pictures enter the model that is composed of these parts. Raises ConfigError where they do not fit."""
    sections = section.encoder if isinstance(section.encoder, tuple) else (section.encoder,)
    seen = [
        View(
            size=encoder.image.size,
            mean=encoder.image.mean,
            std=encoder.image.std,
            resize=getattr(one, "resize", "pad"),
        )
        for one, encoder in zip(sections, encoders_of(tower), strict=True)
    ]
    assert isinstance(tower, VisionEncoder), "build_encoder checks it"
    check_picture(connector, seen[0].size)
    return ImageSpec(
        size=seen[0].size,
        mean=seen[0].mean,
        std=seen[0].std,
        resize=seen[0].resize,
        views=tuple(seen[1:]),
        tokens_per_tile=connector.tokens(tower.patches),
        exact=any(getattr(one, "exact_resize", False) for one in sections),
        draft=all(getattr(one, "draft", False) for one in sections),
        tiling=tiling_of(section, seen[0].size, connector),
    )
