"""A model from the ``model`` section of a run file: parts that exist, and a fresh connector between them."""

from __future__ import annotations

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from mmit.config import ComposedModel, WholeModel
from mmit.errors import ConfigError
from mmit.images import ImageSpec
from mmit.models.connectors import Connector, build_connector
from mmit.models.encoders import VisionEncoder, build_encoder
from mmit.models.load import load_model
from mmit.models.loaded import LoadedModel
from mmit.models.vlm import VisionLanguageModel
from mmit.templates import ChatTemplate
from mmit.tokenizer import load_tokenizer, prepare_tokenizer

ROWS_MULTIPLE = 64
"""Embedding tables that must grow are padded to a multiple of this: matrix kernels like it."""


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
    language_model = _read_language_model(llm_path, dtype=dtype)
    tokenizer = load_tokenizer(llm_path)
    _check_vocabulary(llm_path, len(tokenizer), language_model)
    prepared = prepare_tokenizer(tokenizer)
    grow_embeddings(language_model, len(prepared.tokenizer))
    connector = build_connector(
        section.connector,
        width_in=tower.width,
        width_out=language_model.get_input_embeddings().weight.shape[1],
        seed=seed,
        dtype=dtype,
    )
    assert isinstance(connector, Connector), "build_connector checks it"
    resize = getattr(section.encoder, "resize", "pad")
    spec = ImageSpec(
        size=tower.image.size,
        mean=tower.image.mean,
        std=tower.image.std,
        resize=resize,
        tokens_per_tile=connector.tokens(tower.patches),
        exact=getattr(section.encoder, "exact_resize", False),
    )
    return LoadedModel(
        model=VisionLanguageModel(
            vision_tower=tower,
            connector=connector,
            language_model=language_model,
            spec=spec,
            image_id=prepared.image_id,
        ),
        tokenizer=prepared.tokenizer,
        template=ChatTemplate.load(section.language_model.template, prepared.tokenizer),
        image_id=prepared.image_id,
        pad_id=prepared.pad_id,
        style=section.language_model.text_style,
        encoder=section.encoder.model_dump(),
        connector=section.connector.model_dump(),
    )


def grow_embeddings(language_model: PreTrainedModel, tokens: int) -> None:
    """Give the language model a row for every token; a table that is large enough stays as it is.

    New rows are the mean of the old ones, in the input and the output table; a tied pair stays tied.
    """
    rows = language_model.get_input_embeddings().weight.shape[0]
    if tokens <= rows:
        return
    language_model.resize_token_embeddings(tokens, pad_to_multiple_of=ROWS_MULTIPLE, mean_resizing=False)
    tables = [language_model.get_input_embeddings(), language_model.get_output_embeddings()]
    with torch.no_grad():
        for table in tables:
            if isinstance(table, nn.Embedding | nn.Linear):
                mean = table.weight[:rows].float().mean(dim=0)
                table.weight[rows:] = mean.to(table.weight.dtype)
                bias = getattr(table, "bias", None)
                if bias is not None:
                    bias[rows:] = bias[:rows].float().mean().to(bias.dtype)


def _read_language_model(path: str, *, dtype: torch.dtype) -> PreTrainedModel:
    try:
        model, report = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, output_loading_info=True)
    except (OSError, ValueError) as error:
        first = str(error).splitlines()[0]
        raise ConfigError(
            f"model.language_model.path: {path} cannot be read as a causal language model: {first}"
        ) from error
    if report["missing_keys"]:
        some = ", ".join(sorted(report["missing_keys"])[:3])
        raise ConfigError(
            f"model.language_model.path: {path} lacks {len(report['missing_keys'])} tensors ({some}), which would be random"
        )
    return model


def _check_vocabulary(path: str, tokens: int, language_model: PreTrainedModel) -> None:
    rows = language_model.get_input_embeddings().weight.shape[0]
    if tokens > rows:
        raise ConfigError(
            f"model.language_model.path: {path} has a tokenizer of {tokens} tokens but a model of {rows} embeddings: "
            "they do not belong together"
        )
