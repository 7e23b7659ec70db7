"""Attention inside a language model that keeps the samples of a packed row apart, without a mask of T x T.

A row holds whole samples one after the other; ``position_ids`` restart at 0 with each. The boundaries travel through
the language model in the place of the attention mask, as an integer tensor of four dimensions, which transformers
hands on untouched (``masking_utils``: a mask of four dimensions is returned as it is). Attention then runs once for
each sample. Registered under ``mmit_packed``; calls without boundaries (generation) are transformers' own sdpa.

The vision tower is not touched: the name is set on the language model only.
"""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mmit.errors import ConfigError
from mmit.models.language_models import token_table

PACKED = "mmit_packed"
"""Name of the attention in transformers' registry."""

logger = logging.getLogger("mmit")


def boundaries(position_ids: Tensor) -> Tensor:
    """Where each sample lies: (1, 1, S, 3) int64 on the CPU, one (row, start, end) per sample in reading order.

    position_ids: (B, T), restarting at 0 with every sample.
    """
    rows, length = position_ids.shape
    first = position_ids == 0
    first[:, 0] = True
    starts = first.view(-1).nonzero().view(-1).cpu()  # positions in the flattened batch: rows never share a sample
    ends = torch.cat([starts[1:], torch.tensor([rows * length])])
    row = starts // length
    return torch.stack([row, starts - row * length, ends - row * length], dim=1)[None, None]


def packed_attention(  # noqa: PLR0917 - transformers' signature
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,  # noqa: ANN401 - whatever the model's layer knows: transformers' own signature
) -> tuple[Tensor, None]:
    """Causal attention within each sample of each row; without boundaries, transformers' sdpa.

    query: (B, H, T, d), key and value: (B, H_kv, T, d). Returns (B, T, H, d).
    """
    if attention_mask is None or attention_mask.dtype != torch.int64:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **others
        )
    grouped = query.shape[1] != key.shape[1]
    pieces = [
        scaled_dot_product_attention(
            query[row : row + 1, :, start:end],
            key[row : row + 1, :, start:end],
            value[row : row + 1, :, start:end],
            dropout_p=dropout,
            scale=scaling,
            is_causal=True,
            enable_gqa=grouped,
        )
        for row, start, end in attention_mask[0, 0].tolist()
    ]
    flat = torch.cat([piece[0].transpose(0, 1) for piece in pieces])  # (B * T, H, d)
    return flat.view(query.shape[0], query.shape[2], query.shape[1], value.shape[3]), None


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)


def choose_attention(language_model: PreTrainedModel) -> str:
    """The attention that fits: ``mmit_packed`` where each head is plain causal softmax, else transformers' choice.

    Soft-capped scores (Gemma 2), attention sinks (GPT-OSS), chunked or linear attention, and models that do not go
    through transformers' attention interface keep the implementation they were built with.
    """
    config = language_model.config.get_text_config()
    special_layers = _layer_types(language_model) - {"full_attention", "sliding_attention"}
    special_heads = any(name.rsplit(".", 1)[-1] == "sinks" for name, _ in language_model.named_parameters())
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "eager"
    if not language_model._supports_attention_backend or special_layers or special_heads:
        return str(config._attn_implementation)
    return PACKED


def attention_mask_for(position_ids: Tensor, *, implementation: str, window: int | None) -> Tensor | None:
    """What goes to the language model as its attention mask: the boundaries, or None.

    None lets transformers build a block mask of T x T from ``position_ids``, which it does right only without a cache
    and without a mask. That is the way for other implementations, and where a sample exceeds the sliding window.
    """
    if implementation != PACKED:
        return None
    samples = boundaries(position_ids)
    if window is not None and int((samples[..., 2] - samples[..., 1]).max()) > window:
        return None
    return samples


def sliding_window(language_model: PreTrainedModel) -> int | None:
    """The smallest number of tokens that a layer looks back on, or None where all look back on everything."""
    window = getattr(language_model.config.get_text_config(), "sliding_window", None)
    return window if isinstance(window, int) and window > 0 else None


@torch.no_grad()
def check_isolation(language_model: PreTrainedModel, *, implementation: str) -> None:
    """Raise ConfigError unless a packed sample is blind to its neighbour and the same as when it is alone.

    Tried on a row of a sample of one token and a sample of two. The logits of the second must not depend on the first,
    to the bit (in a mixture of experts, whose matrix products change their shapes, up to rounding), and must be those
    of the sample alone, up to rounding.
    """
    stateful = _layer_types(language_model) - {"full_attention", "sliding_attention", "chunked_attention"}
    if stateful:
        raise ConfigError(
            f"{type(language_model).__name__} has layers of type {', '.join(sorted(stateful))}, which carry "
            "a state from one sample of a packed row to the next; choose another model"
        )
    device = language_model.device
    table = token_table(language_model)
    rows = table.num_embeddings
    positions = torch.tensor([[0, 0, 1]], device=device)

    def logits(ids: list[int], position_ids: Tensor) -> Tensor:
        out = language_model(
            inputs_embeds=table(torch.tensor([ids], device=device)),
            position_ids=position_ids,
            attention_mask=attention_mask_for(position_ids, implementation=implementation, window=None),
            use_cache=False,
        )
        return out.logits.float()

    second = [rows // 3, rows // 5]
    packed = logits([rows // 2, *second], positions)[:, 1:]
    beside_another = logits([rows // 7, *second], positions)[:, 1:]
    alone = logits(second, positions[:, 1:])
    rounding = 8 * torch.finfo(table.weight.dtype).eps * float(alone.abs().max())
    leak = float((packed - beside_another).abs().max())
    difference = float((packed - alone).abs().max())
    allowed = rounding if _has_experts(language_model) else 0.0
    if not (leak <= allowed and difference <= 4 * rounding):  # also for a NaN
        raise ConfigError(
            f"{type(language_model).__name__} does not keep the samples of a packed row apart (attention "
            f"'{implementation}': logits differ by {difference:.2g} from the sample alone); choose another model"
        )
    logger.info("attention of %s: %s", type(language_model).__name__, implementation)


def _layer_types(language_model: PreTrainedModel) -> set[str]:
    return set(getattr(language_model.config.get_text_config(), "layer_types", None) or ())


def _has_experts(language_model: PreTrainedModel) -> bool:
    config = language_model.config.get_text_config()
    return any(getattr(config, name, 0) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
