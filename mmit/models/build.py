"""A model from the ``model`` section of a run file: parts that exist, and a fresh connector between them."""

from __future__ import annotations

import torch

from mmit.config import ComposedModel, WholeModel
from mmit.images import ImageSpec
from mmit.models.connectors import Connector, build_connector
from mmit.models.encoders import VisionEncoder, build_encoder
from mmit.models.language_models import check_vocabulary, grow_embeddings, read_language_model, token_table
from mmit.models.load import load_model
from mmit.models.loaded import LoadedModel
from mmit.models.tiling import fresh_newline, tiling_of
from mmit.models.vlm import VisionLanguageModel
from mmit.templates import ChatTemplate
from mmit.tokenizer import load_tokenizer, prepare_tokenizer


def build_model(section: ComposedModel | WholeModel, *, dtype: torch.dtype, seed: int) -> LoadedModel:
    """The model of a run file, in eval mode on the CPU; the fresh connector depends on ``seed`` alone.

    Raises ConfigError or CheckpointError for parts that are missing or do not fit.
    """
    if isinstance(section, WholeModel):
        return load_model(section.path, dtype=dtype, template=section.template)
    return _compose(section, dtype=dtype, seed=seed)


def _compose(section: ComposedModel, *, dtype: torch.dtype, seed: int) -> LoadedModel:
    tower = build_encoder(section.encoder, dtype=dtype)
    assert isinstance(tower, VisionEncoder), "build_encoder checks it"
    llm_path = section.language_model.path
    language_model = read_language_model(llm_path, dtype=dtype)
    tokenizer = load_tokenizer(llm_path)
    check_vocabulary(llm_path, len(tokenizer), language_model)
    prepared = prepare_tokenizer(tokenizer)
    grow_embeddings(language_model, len(prepared.tokenizer))
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
    spec = image_spec(section, tower, connector)
    return LoadedModel(
        model=VisionLanguageModel(
            vision_tower=tower,
            connector=connector,
            language_model=language_model,
            spec=spec,
            image_id=prepared.image_id,
            image_newline=fresh_newline(width, seed=seed, dtype=dtype) if spec.has_newline else None,
        ),
        tokenizer=prepared.tokenizer,
        template=ChatTemplate.load(section.language_model.template, prepared.tokenizer),
        image_id=prepared.image_id,
        pad_id=prepared.pad_id,
        style=section.language_model.text_style,
        encoder=section.encoder.model_dump(),
        connector=section.connector.model_dump(),
    )


def image_spec(section: ComposedModel, tower: VisionEncoder, connector: Connector) -> ImageSpec:
    """How pictures enter the model that is composed of these parts. Raises ConfigError where they do not fit."""
    return ImageSpec(
        size=tower.image.size,
        mean=tower.image.mean,
        std=tower.image.std,
        resize=getattr(section.encoder, "resize", "pad"),
        tokens_per_tile=connector.tokens(tower.patches),
        exact=getattr(section.encoder, "exact_resize", False),
        draft=getattr(section.encoder, "draft", False),
        tiling=tiling_of(section, tower.image.size, connector),
    )
