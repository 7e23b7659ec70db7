"""Attention inside a language model that keeps the samples of a packed row apart, without a mask of T x T.

A row holds whole samples one after the other; ``position_ids`` restart at 0 with each. The boundaries travel through
the language model in the place of the attention mask, as an integer tensor of four dimensions, which transformers
hands on untouched (``masking_utils``: a mask of four dimensions is returned as it is). Attention then runs once for
each sample. Registered under ``mmit_packed``; calls without boundaries (generation) are transformers' own sdpa.

The vision tower is not touched: the name is set on the language model only.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

PACKED = "mmit_packed"
"""Name of the attention in transformers' registry."""

FLASH = "flash_attention_2"
"""transformers' name of the flash-attn package."""


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
    lengths: list[list[int]] = [[] for _ in range(query.shape[0])]
    for row, start, end in attention_mask[0, 0].tolist():
        lengths[row].append(end - start)
    grouped = query.shape[1] != key.shape[1]
    rows = []
    for *states, of_row in zip(query.split(1), key.split(1), value.split(1), lengths, strict=True):
        pieces = [
            scaled_dot_product_attention(
                q, k, v, dropout_p=dropout, scale=scaling, is_causal=True, enable_gqa=grouped
            ).transpose(1, 2)
            # split, not slices: the gradient of a slice is a tensor of zeros as large as the row, for every sample
            for q, k, v in zip(*(state.split(of_row, dim=2) for state in states), strict=True)
        ]
        rows.append(torch.cat(pieces, dim=1))  # (1, T, H, d)
    return (rows[0] if len(rows) == 1 else torch.cat(rows)), None


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)


def attention_arguments(
    position_ids: Tensor, *, implementation: str, window: int | None, device: torch.device | None = None
) -> dict[str, Any]:
    """What a language model is told about the samples of its rows, by the words its attention understands.

    position_ids: on the CPU where nothing shall wait for the device; device: the model's, where they are not on it.

    Ours gets the boundaries in the place of the mask; flash attention gets the cumulative lengths of all samples of
    all rows. A mask of None lets transformers build a block mask of T x T from ``position_ids``, which it does right
    only without a cache: the way for other implementations, and for ours where a sample exceeds the sliding window.
    """
    if implementation not in (PACKED, FLASH):
        return {"attention_mask": None}
    samples = boundaries(position_ids)
    lengths = samples[0, 0, :, 2] - samples[0, 0, :, 1]
    longest = int(lengths.max())
    if implementation == PACKED:
        return {"attention_mask": None if window is not None and longest > window else samples}
    ends = torch.cat([lengths.new_zeros(1), lengths.cumsum(0)]).to(device or position_ids.device, torch.int32)
    return {
        "attention_mask": None,
        "cu_seq_lens_q": ends,
        "cu_seq_lens_k": ends,
        "max_length_q": longest,
        "max_length_k": longest,
    }
