"""Tokens that several samples of a micro-batch begin with: they run once, and every such sample looks back on them.

A chat template writes the same system message in front of every conversation. A causal language model makes the same
states of the same first tokens, so one copy serves all, and its gradient is the sum of theirs: no number changes but
for rounding. Not so in what a model counts over all positions; mixtures of experts keep their copies. Dropout draws for
the one copy what it would draw for any.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import groupby, pairwise

import torch

from mmit.batch import IGNORE, HostIds
from mmit.models.attention import boundaries
from mmit.models.needed import Needed

LEAST_SHARE = 1 / 32
"""Share of the tokens that has to be saved: to join keys and values of samples costs about a hundredth of a step."""


def share_prefix(needed: Needed, ids: HostIds, *, image_id: int) -> Needed:
    """``needed`` with the prefix that saves most in front, once, and without the copies of it; else as it was.

    Neither an image token nor a labelled position is shared: pictures differ, and every label has a state of its own.
    """
    assert needed.tokens is not None, "the needed tokens are one row"
    samples = boundaries(needed.position_ids)[0, 0]
    kept = ids.input_ids.view(-1)[needed.tokens]
    ends_prefix = (kept == image_id) | (ids.labels.view(-1)[needed.tokens] != IGNORE)
    begins: list[list[int]] = []
    for _, start, end, _ in samples.tolist():
        first_ends = int(ends_prefix[start:end].int().argmax())  # 0 too where none does: without a label nothing runs
        begins.append(kept[start : start + first_ends].tolist())
    length, sharers = longest_shared(begins)
    if length * (len(sharers) - 1) < LEAST_SHARE * len(kept):
        return needed
    copies = torch.zeros(len(kept), dtype=torch.bool)
    for sharer in sharers:
        start = int(samples[sharer, 1])
        copies[start : start + length] = True
    first = int(samples[sharers[0], 1])
    own = (~copies).nonzero().view(-1)
    order = torch.cat([torch.arange(first, first + length), own])
    shared = torch.zeros(len(samples), dtype=torch.int64)
    shared[list(sharers)] = length
    ends = length + (samples[:, 2] - samples[:, 1] - shared).cumsum(0)
    starts = torch.cat([torch.tensor([length]), ends[:-1]])
    place = length - 1 + (~copies).cumsum(0)  # of a token of its own, in the new order
    return replace(
        needed,
        tokens=needed.tokens[order],
        position_ids=needed.position_ids[:, order],
        labelled=place[needed.labelled],
        samples=torch.stack([samples[:, 0], starts, ends, shared], dim=1)[None, None],
    )


def longest_shared(begins: Sequence[list[int]]) -> tuple[int, tuple[int, ...]]:
    """(length, which ones): the prefix of several lists whose copies are most tokens; (0, ()) where none is shared.

    In sorted order, lists with a common prefix stand side by side.
    """
    order = sorted(range(len(begins)), key=begins.__getitem__)
    common = [_common(begins[a], begins[b]) for a, b in pairwise(order)]
    best, most = (0, ()), 0
    for length in sorted(set(common) - {0}):
        for is_shared, run in groupby(range(len(common)), key=lambda at: common[at] >= length):
            places = list(run)
            if is_shared and length * len(places) > most:
                most = length * len(places)
                best = (length, tuple(sorted(order[places[0] : places[-1] + 2])))
    return best


def _common(one: list[int], other: list[int]) -> int:
    return next((at for at, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
