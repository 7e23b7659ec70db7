"""Attention inside a language model that keeps the samples of a packed row apart, without a mask of T x T.

A row holds whole samples one after the other; ``position_ids`` restart at 0 with each. The boundaries travel through
the language model in the place of the attention mask, as an integer tensor of four dimensions, which transformers
hands on untouched (``masking_utils``: a mask of four dimensions is returned as it is). Attention then runs once for
each sample, by torch's kernels or in blocks on CPUs. Registered under ``mmit_packed``; calls without boundaries
(generation) are transformers' own sdpa.

The vision tower is not touched: the name is set on the language model only.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from mmit.models.blocked_attention import blocked_attention, serves

PACKED = "mmit_packed"
"""Name of the attention in transformers' registry."""

FLASH = "flash_attention_2"
"""transformers' name of the flash-attn package."""


def boundaries(position_ids: Tensor) -> Tensor:
    """Where each sample lies: (1, 1, S, 4) int64 on the CPU, (row, start, end, shared) of each in reading order.

    position_ids: (B, T), restarting at 0 with every sample. shared: tokens at the begin of the row, in front of the
    first sample, that this one begins with too; 0 here (see shared_prefix.py).
    """
    rows, length = position_ids.shape
    first = position_ids == 0
    first[:, 0] = True
    starts = first.view(-1).nonzero().view(-1).cpu()  # positions in the flattened batch: rows never share a sample
    ends = torch.cat([starts[1:], torch.tensor([rows * length])])
    row = starts // length
    first_places = row * length
    return torch.stack([row, starts - first_places, ends - first_places, torch.zeros_like(row)], dim=1)[None, None]


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
    told: list[list[int]] = attention_mask[0, 0].tolist()
    if serves(query, told, dropout):
        return blocked_attention(query, key, value, told, scaling), None
    samples: list[list[tuple[int, int, int]]] = [[] for _ in range(query.shape[0])]
    for row, start, end, shared in told:
        samples[row].append((start, end, shared))
    attend = partial(
        scaled_dot_product_attention,
        dropout_p=dropout,
        scale=scaling,
        is_causal=True,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    each_row = zip(query.split(1), key.split(1), value.split(1), samples, strict=True)
    rows = [_attended(attend, states, of_row) for *states, of_row in each_row]
    return (rows[0] if len(rows) == 1 else torch.cat(rows)), None


def _attended(attend: Callable[..., Tensor], states: list[Tensor], samples: list[tuple[int, int, int]]) -> Tensor:
    """(1, T, H, d) of the queries, keys and values (1, H, T, d) of a row, sample by sample."""
    prefix = samples[0][0]  # tokens in front of all samples, which some of them begin with
    # split, not slices: the gradient of a slice is a tensor of zeros as large as the row, for every sample
    lengths = [*[prefix][: prefix > 0], *(end - start for start, end, _ in samples)]
    parts = list(zip(*(state.split(lengths, dim=2) for state in states), strict=True))
    before, own = parts[0], parts[prefix > 0 :]
    firsts, pieces = list[Tensor](), list[Tensor]()
    for part, (_, _, shared) in zip(own, samples, strict=True):
        joined = [torch.cat(both, dim=2) for both in zip(before, part, strict=True)] if shared else part
        piece = attend(*joined).transpose(1, 2)
        if shared:
            first, piece = piece.split([shared, piece.shape[1] - shared], dim=1)
            firsts.append(first)  # the same for all that share it: one is enough
        pieces.append(piece)
    return torch.cat([*firsts[:1], *pieces], dim=1)


AttentionInterface.register(PACKED, packed_attention)
AttentionMaskInterface.register(PACKED, sdpa_mask)


def attention_arguments(
    position_ids: Tensor,
    samples: Tensor | None = None,
    *,
    implementation: str,
    window: int | None,
    device: torch.device | None = None,
) -> dict[str, Any]:
    """What a language model is told about the samples of its rows, by the words its attention understands.

    position_ids: on the CPU where nothing shall wait for the device; device: the model's, where they are not on it.
    samples: the boundaries, where ``position_ids`` do not tell them.

    Ours gets the boundaries in the place of the mask; flash attention gets the cumulative lengths of all samples of
    all rows. A mask of None lets transformers build a block mask of T x T from ``position_ids``, which it does right
    only without a cache: the way for other implementations, and for ours where a sample exceeds the sliding window.
    """
    if implementation not in (PACKED, FLASH):
        return {"attention_mask": None}
    samples = boundaries(position_ids) if samples is None else samples
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
