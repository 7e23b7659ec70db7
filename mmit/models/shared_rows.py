"""A row shared by several ranks: each runs the language model on a part of its tokens.

DeepSpeed-Ulysses (arXiv 2309.14509): everything but attention looks at one token at a time, so each rank runs it on its
part of the row; for attention the ranks trade tokens for heads, look at the whole row with their part of the heads, and
trade back. The sum of the ranks' losses is the loss of the row, and the sum of their gradients its gradient.

Tower and connector run on every rank of a group, on the whole row; each takes gradients through its own part.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import sdpa_mask

from mmit.batch import BySource
from mmit.distributed import all_reduce_sum
from mmit.errors import ConfigError
from mmit.models.attention import PACKED, boundaries, packed_attention
from mmit.models.language_models import token_table
from mmit.models.needed import Needed
from mmit.models.placement import runnable

if TYPE_CHECKING:
    from mmit.models.vlm import VisionLanguageModel

SHARED = "mmit_shared_rows"
"""Name of the attention in transformers' registry."""


@dataclass(frozen=True)
class RowGroup:
    """The ranks that share a row. ranks: their process group; number, size: of this rank, and of the group."""

    ranks: torch.distributed.ProcessGroup
    number: int
    size: int

    def part(self, needed: Needed, by_source: BySource | None) -> tuple[Needed, Tensor, BySource | None]:
        """What this rank runs of ``needed`` (one row), the position ids (1, N) of all ranks, the sources of its labels.

        Padding makes the parts equally long; it is a sample of its own behind the others, and has no label.
        """
        assert needed.tokens is not None, "a row is shared where the needed tokens are one row"
        count = len(needed.tokens)
        length = -(-count // self.size)
        padding = torch.arange(length * self.size - count)
        positions = torch.cat([needed.position_ids, padding[None]], dim=1)
        begin, end = self.number * length, (self.number + 1) * length
        own = ((needed.labelled >= begin) & (needed.labelled < end)).nonzero().view(-1)
        part = Needed(
            tokens=functional.pad(needed.tokens, (0, len(padding)))[begin:end],
            position_ids=positions[:, begin:end],
            labelled=needed.labelled[own] - begin,
            labels=needed.labels[own],
        )
        if by_source is not None:
            by_source = replace(by_source, source_of=by_source.source_of[own.to(by_source.source_of.device)])
        return part, positions, by_source


class _Trade(torch.autograd.Function):
    """(B, H, T / n, d) to (B, H / n, T, d), or back; the gradient goes the other way."""

    @staticmethod
    def forward(ctx: Any, states: Tensor, group: RowGroup, to_heads: bool) -> Tensor:  # noqa: ANN401 - torch's context
        ctx.way = group, not to_heads
        return _traded(states, group, to_heads)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:  # noqa: ANN401
        return _traded(grad, *ctx.way), None, None


def _traded(states: Tensor, group: RowGroup, to_heads: bool) -> Tensor:
    rows, heads, tokens, width = states.shape
    size = group.size
    if to_heads:
        sent = states.reshape(rows, size, heads // size, tokens, width).transpose(0, 1).contiguous()
    else:
        sent = states.reshape(rows, heads, size, tokens // size, width).permute(2, 0, 1, 3, 4).contiguous()
    got = torch.empty_like(sent)  # by rank: its tokens of my heads, or its heads of my tokens
    torch.distributed.all_to_all_single(got, sent, group=group.ranks)
    if to_heads:
        return got.permute(1, 2, 0, 3, 4).reshape(rows, heads // size, tokens * size, width)
    return got.transpose(0, 1).reshape(rows, heads * size, tokens // size, width)


def shared_attention(  # noqa: PLR0917 - transformers' signature
    group: RowGroup,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **others: Any,  # noqa: ANN401 - whatever the model's layer knows: transformers' own signature
) -> tuple[Tensor, None]:
    """``packed_attention`` of a row whose tokens lie on the ranks of ``group``; without boundaries, of this rank alone.

    query: (B, H, T / n, d), key and value: (B, H_kv, T / n, d); the boundaries are those of the whole row.
    """
    if attention_mask is None or attention_mask.dtype != torch.int64:
        return packed_attention(module, query, key, value, attention_mask, scaling=scaling, dropout=dropout, **others)
    if key.shape[1] < group.size:  # every rank needs a head of its own
        key, value = (states.repeat_interleave(group.size // key.shape[1], dim=1) for states in (key, value))
    whole = [_Trade.apply(states, group, True) for states in (query, key, value)]
    out, _ = packed_attention(module, *whole, attention_mask, scaling=scaling, dropout=dropout, **others)
    return _Trade.apply(out.transpose(1, 2), group, False).transpose(1, 2), None


def share_rows(model: VisionLanguageModel, group: RowGroup) -> None:
    """Let the ranks of ``group`` share their rows from now on, in ``model.forward``; collective over all ranks.

    Raises ConfigError where the model cannot be run on a part of a row.
    """
    language_model = model.language_model
    reason = why_not_shared(model, group.size, attention=model.attention)
    if not reason:
        before = _states(model, None)
        AttentionInterface.register(SHARED, partial(shared_attention, group))
        AttentionMaskInterface.register(SHARED, sdpa_mask)
        language_model.set_attn_implementation(SHARED)
        difference = float((_states(model, group) - before).abs().max())
        allowed = 32 * torch.finfo(before.dtype).eps * float(before.abs().max())
        if all_reduce_sum(torch.tensor([int(not difference <= allowed)], device=before.device)).item():
            reason = f"a row in parts gives other states than the row in one (by {difference:.2g})"
    if reason:
        raise ConfigError(
            f"parallel.sequence: {type(language_model).__name__} cannot share a row: {reason}; set it to 1"
        )
    model.row_group = group


def why_not_shared(model: VisionLanguageModel, size: int, *, attention: str) -> str:
    """Why ``size`` ranks cannot share the rows of a model with an attention, as far as its configuration tells."""
    text = model.language_model.config.get_text_config()
    heads = text.num_attention_heads
    key_heads = getattr(text, "num_key_value_heads", None) or heads
    if attention != PACKED:
        return f"its attention is '{attention}', not {PACKED}"
    if model.window is not None:
        return f"its layers look back on {model.window} tokens only"
    if model.packing_fault or not model.head_is_plain:
        return model.packing_fault or "its logits are more than its output layer"
    if heads % size or (key_heads % size and size % key_heads):
        return f"its {heads} heads ({key_heads} of keys) cannot be dealt to {size} ranks"
    return ""


@torch.no_grad()
def _states(model: VisionLanguageModel, group: RowGroup | None) -> Tensor:
    """The last hidden states of a row of two samples; with a group, those of this rank's part in their places."""
    language_model, count = model.language_model, 16
    device, first = language_model.device, 5
    table = token_table(language_model)
    positions = torch.cat([torch.arange(first), torch.arange(count - first)])[None]
    none = torch.zeros(0, dtype=torch.int64)
    needed = Needed(tokens=torch.arange(count), position_ids=positions, labelled=none, labels=none)
    part, positions, _ = (needed, positions, None) if group is None else group.part(needed, None)
    assert part.tokens is not None
    with runnable(language_model, model.placement):
        ids = (torch.arange(count) * 7 + 3) % table.num_embeddings
        states = language_model.base_model(
            inputs_embeds=table(ids.to(device))[part.tokens.to(device)][None],
            position_ids=part.position_ids.to(device),
            use_cache=False,
            attention_mask=boundaries(positions),
        ).last_hidden_state[0]
    if group is None:
        return states
    parts = [torch.empty_like(states) for _ in range(group.size)]
    torch.distributed.all_gather(parts, states.contiguous(), group=group.ranks)
    return torch.cat(parts)[:count]
