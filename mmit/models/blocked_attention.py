"""Causal attention within the samples of packed rows for fp32 on CPUs: blocks of queries on the keys they may see.

A block is one matrix product of all heads for the scores and one for the outputs. torch's fused kernel for CPUs makes
products of 32 or 64 queries of one head, and its backward pass computes all weights again; here, short samples keep
theirs. docs/performance.md has the figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

BLOCK = 64
"""Queries of a block, more or less: the blocks of a sample are of equal size."""

KEPT = 8
"""Tokens per width of a head up to which a sample keeps its weights: then they take about as much as its queries, keys,
values and outputs; a longer one computes them again in the backward pass."""


@dataclass(frozen=True, slots=True)
class Place:
    """Where a sample lies: tokens from ``start`` to ``end`` of a row, behind the first ``shared`` ones of that row."""

    row: int
    start: int
    end: int
    shared: int

    def seen(self, states: Tensor) -> Tensor:
        """What the sample may look at of (B, H, T, d): (H, N, d), the shared tokens in front."""
        own = states[self.row, :, self.start : self.end]
        return torch.cat([states[self.row, :, : self.shared], own], dim=1) if self.shared else own

    def blocks(self) -> list[tuple[slice, slice]]:
        """(queries of the row, keys of what is seen) of each block, in reading order."""
        length = self.end - self.start
        count = max(1, round(length / BLOCK))
        ends = [length * number // count for number in range(count + 1)]
        return [
            (slice(self.start + begin, self.start + end), slice(0, self.shared + end)) for begin, end in pairwise(ends)
        ]

    def hand_back(self, gradient: Tensor, states: Tensor) -> None:
        """Put the gradient of what is seen (H, N, d) into that of the states; one of a view lies there already."""
        if self.shared:
            states[self.row, :, : self.shared] += gradient[:, : self.shared]
            states[self.row, :, self.start : self.end] = gradient[:, self.shared :]

    def keeps_weights(self, query: Tensor) -> bool:
        """Whether the weights wait for the backward pass."""
        return self.shared + self.end - self.start <= KEPT * query.shape[-1]


WORTHWHILE = 100_000
"""Scores of a sample (heads times tokens squared), on average, from which blocks are faster: each is some ten calls."""


def serves(query: Tensor, samples: Sequence[Sequence[int]], dropout: float) -> bool:
    """Whether a row is attended block by block; a meta tensor stands for one of the device that this process has."""
    on_cpu = query.is_cpu or (query.is_meta and not torch.accelerator.is_available())
    if not on_cpu or query.dtype != torch.float32 or dropout:
        return False
    scores = query.shape[1] * sum((shared + end - start) ** 2 for _, start, end, shared in samples)
    return scores >= WORTHWHILE * len(samples)


def blocked_attention(
    query: Tensor, key: Tensor, value: Tensor, samples: Sequence[Sequence[int]], scale: float | None
) -> Tensor:
    """(B, T, H, d) of queries (B, H, T, d), keys and values (B, H_kv, T, d).

    samples: (row, start, end, shared) of each as ``boundaries`` gives them, all tokens of a row among them. scale: of
    the scores; None is d ** -0.5.
    """
    places = [Place(*sample) for sample in samples]
    if before := places[0].start:  # tokens that samples share are a sample too
        places.insert(0, Place(0, 0, before, 0))
    if (groups := query.shape[1] // key.shape[1]) > 1:
        key, value = (states.repeat_interleave(groups, dim=1) for states in (key, value))
    return _BlockedAttention.apply(query, key, value, places, query.shape[-1] ** -0.5 if scale is None else scale)


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(  # noqa: PLR0917 - torch hands them on by place
        ctx: Any,  # noqa: ANN401 - torch's context
        query: Tensor,
        key: Tensor,
        value: Tensor,
        places: Sequence[Place],
        scale: float,
    ) -> Tensor:
        rows, heads, tokens, _ = query.shape
        out = query.new_empty(rows, tokens, heads, value.shape[-1])
        kept = list[Tensor]()
        for place in places:
            keys, values = place.seen(key), place.seen(value)
            for own, seen in place.blocks():
                weights = _weights(query[place.row, :, own], keys[:, seen], scale)
                out[place.row, own] = (weights @ values[:, seen]).transpose(0, 1)
                if any(ctx.needs_input_grad) and place.keeps_weights(query):
                    kept.append(weights)
        ctx.save_for_backward(query, key, value, *kept)
        ctx.places, ctx.scale = places, scale
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:  # noqa: ANN401
        query, key, value, *kept = ctx.saved_tensors
        to_query, to_key, to_value = (torch.empty_like(states) for states in (query, key, value))
        for place in ctx.places:
            keys, values = place.seen(key), place.seen(value)
            to_keys, to_values = place.seen(to_key), place.seen(to_value)  # what lies there is written over
            blocks = place.blocks()
            of_blocks, kept = (kept[: len(blocks)], kept[len(blocks) :]) if place.keeps_weights(query) else ([], kept)
            add = 0  # the last block sees all keys, so it is the first, and writes
            for own, seen in reversed(blocks):
                queries, gradients = query[place.row, :, own], grad[place.row, own].transpose(0, 1)
                weights = of_blocks.pop() if of_blocks else _weights(queries, keys[:, seen], ctx.scale)
                to_values[:, seen].baddbmm_(weights.transpose(1, 2), gradients, beta=add)
                to_weights = gradients @ values[:, seen].transpose(1, 2)
                to_scores = torch.ops.aten._softmax_backward_data(to_weights, weights, -1, weights.dtype)
                to_query[place.row, :, own].baddbmm_(to_scores, keys[:, seen], beta=0, alpha=ctx.scale)
                to_keys[:, seen].baddbmm_(to_scores.transpose(1, 2), queries, beta=add, alpha=ctx.scale)
                add = 1
            place.hand_back(to_keys, to_key)
            place.hand_back(to_values, to_value)
        return to_query, to_key, to_value, None, None


def _weights(query: Tensor, key: Tensor, scale: float) -> Tensor:
    """(H, n, N): how much each of n queries (H, n, d) looks at keys (H, N, d), of which theirs are the last n."""
    count = query.shape[1]
    scores = torch.baddbmm(query.new_empty(()), query, key.transpose(1, 2), beta=0, alpha=scale)
    scores[:, :, -count:] += query.new_full((count, count), float("-inf")).triu_(1)
    return scores.softmax(-1)
