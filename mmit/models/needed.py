"""Which tokens of a batch its loss depends on: none behind a sample's last label, and no padding.

A causal language model never looks ahead, so leaving these out changes no number. What stays is one row for the whole
micro-batch. Computed on the CPU, from the ids as they were before the batch went to its device: nothing waits for it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from mmit.batch import IGNORE, HostIds


@dataclass(frozen=True, kw_only=True)
class Needed:
    """The tokens that run.

    tokens: (N,) their places in the flattened rows; None where all run in the rows they lie in.
    position_ids: (B, T) of what runs; (1, N) where ``tokens`` is given.
    labelled: (S,) places of the labels among what runs (flattened). labels: (S,) those labels.
    samples: (1, 1, samples, 4) where each lies (see ``attention.boundaries``); None where ``position_ids`` tell it.
    """

    tokens: Tensor | None
    position_ids: Tensor
    labelled: Tensor
    labels: Tensor
    samples: Tensor | None = None

    def to(self, device: torch.device) -> Needed:
        """The same on ``device``."""
        return Needed(
            tokens=None if self.tokens is None else self.tokens.to(device, non_blocking=True),
            position_ids=self.position_ids.to(device, non_blocking=True),
            labelled=self.labelled.to(device, non_blocking=True),
            labels=self.labels.to(device, non_blocking=True),
            samples=self.samples,
        )


def all_tokens(ids: HostIds) -> Needed:
    """Every token, in the rows it lies in."""
    labels = ids.labels.view(-1)
    labelled = (labels != IGNORE).nonzero().view(-1)
    return Needed(tokens=None, position_ids=ids.position_ids, labelled=labelled, labels=labels[labelled])


def needed_tokens(ids: HostIds) -> Needed:
    """The tokens up to the last label of each sample, in one row; the first of all where there is no label."""
    labels = ids.labels.view(-1)
    places = (labels != IGNORE).nonzero().view(-1)
    first = ids.position_ids == 0
    first[:, 0] = True  # rows never share a sample
    sample = first.view(-1).cumsum(0) - 1  # (B * T,) the number of the sample that a token belongs to
    last = torch.full((int(sample[-1]) + 1,), -1)  # place of each sample's last label
    last.scatter_reduce_(0, sample[places], places, "amax")
    is_needed = torch.arange(len(labels)) <= last[sample]
    is_needed[0] |= len(places) == 0  # every module runs in every micro-batch
    tokens = is_needed.nonzero().view(-1)
    return Needed(
        tokens=tokens,
        position_ids=ids.position_ids.view(-1)[tokens][None],
        labelled=(labels[tokens] != IGNORE).nonzero().view(-1),
        labels=labels[places],
    )
