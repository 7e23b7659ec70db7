"""Causal language models of transformers: read, frame without weights, token table, more rows for more tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from mmit.errors import ConfigError
from mmit.hub import revision_of
from mmit.models.encoders import check_is_there, readable
from mmit.models.placement import placement, take_whole

ROWS_MULTIPLE = 64
"""Token tables that must grow are padded to a multiple of this: matrix kernels like it."""


def token_table(language_model: PreTrainedModel) -> nn.Embedding:
    """The input embeddings: one row per token id."""
    table = language_model.get_input_embeddings()
    assert isinstance(table, nn.Embedding), f"{type(language_model).__name__} has no table of token embeddings"
    return table


def has_experts(language_model: PreTrainedModel) -> bool:
    """Whether it is a mixture of experts."""
    config: Any = language_model.config.get_text_config()
    return any(getattr(config, name, 0) for name in ("num_experts", "num_local_experts", "n_routed_experts"))


def read_language_model(path: str, *, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a directory or hub name, as ``AutoModelForCausalLM`` builds it. Raises ConfigError."""
    check_is_there(path, key="model.language_model.path")
    reader: Any = AutoModelForCausalLM
    kept = placement()
    report: dict[str, Any] = {"missing_keys": ()}
    with readable(path, key="model.language_model.path", what="a causal language model"), kept.born():
        if kept.holds:
            model, report = reader.from_pretrained(
                path, revision=revision_of(path), dtype=dtype, output_loading_info=True
            )
        else:
            model = reader.from_config(AutoConfig.from_pretrained(path, revision=revision_of(path)), dtype=dtype)
            model.tie_weights()
    if report["missing_keys"]:
        some = ", ".join(sorted(report["missing_keys"])[:3])
        raise ConfigError(
            f"model.language_model.path: {path} lacks {len(report['missing_keys'])} tensors ({some}); "
            "they would be random, so take a complete copy"
        )
    return model


def frame_language_model(text_config: Mapping[str, Any], *, dtype: torch.dtype) -> PreTrainedModel:
    """The model of a ``text_config``, to be filled with weights; tied tensors are tied."""
    fields = dict(text_config)
    config = AutoConfig.for_model(fields.pop("model_type", "llama"), **fields)
    maker: Any = AutoModelForCausalLM
    with placement().born():
        model = maker.from_config(config, dtype=dtype)
    model.tie_weights()
    return model


def check_vocabulary(path: str, tokens: int, language_model: PreTrainedModel) -> None:
    """Raise ConfigError where a directory's tokenizer has more tokens than its model has embeddings."""
    rows = token_table(language_model).num_embeddings
    if tokens > rows:
        raise ConfigError(
            f"model.language_model.path: {path} has a tokenizer of {tokens} tokens but a model of {rows} embeddings: "
            "they do not belong together"
        )


def grow_embeddings(language_model: PreTrainedModel, tokens: int) -> None:
    """Give the language model a row for every token; a table that is large enough stays as it is.

    New rows are the mean of the old ones, in the input and the output table; a tied pair stays tied.
    """
    rows = token_table(language_model).num_embeddings
    if tokens <= rows:
        return
    take_whole(_tables(language_model), placement())
    language_model.resize_token_embeddings(tokens, pad_to_multiple_of=ROWS_MULTIPLE, mean_resizing=False)
    with torch.no_grad():
        for table in _tables(language_model):
            for tensor in _by_row(table):
                tensor[rows:] = tensor[:rows].float().mean(dim=0).to(tensor.dtype)
    placement().place(language_model)


@torch.no_grad()
def start_rows(language_model: PreTrainedModel, ids: Sequence[int]) -> None:
    """Let the rows of new tokens, in both tables, start as the mean of the rows before them."""
    for tensor in row_parameters(language_model).values() if ids else ():
        with placement().whole([tensor], write=True):
            tensor[list(ids)] = tensor[: min(ids)].float().mean(dim=0).to(tensor.dtype)


def row_parameters(language_model: PreTrainedModel) -> dict[str, nn.Parameter]:
    """The parameters with one row per token: the input table and the head; one where they are tied."""
    of_tables = {id(tensor) for table in _tables(language_model) for tensor in _by_row(table)}
    return {name: p for name, p in language_model.named_parameters() if id(p) in of_tables}


def _by_row(table: nn.Embedding | nn.Linear) -> list[Tensor]:
    return [table.weight] if isinstance(table, nn.Embedding) or table.bias is None else [table.weight, table.bias]


def _tables(language_model: PreTrainedModel) -> list[nn.Embedding | nn.Linear]:
    both = (token_table(language_model), language_model.get_output_embeddings())
    return [table for table in both if isinstance(table, nn.Embedding | nn.Linear)]
