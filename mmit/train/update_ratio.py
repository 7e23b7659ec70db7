"""How far one update moves the weights of each part: the norm of the change over the norm of the weights before it.

A healthy run has about 1e-3 at its peak learning rate; far above, weights are being overwritten, far below, a part does
not learn. Taken from the fp32 master weights, where a small change is not rounded away, of what trains alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from mmit.distributed import all_reduce_sum, rank
from mmit.models.rules import PARTS
from mmit.train.engine import device
from mmit.train.pieces import WEIGHT, is_partitioned, pieces

if TYPE_CHECKING:
    from mmit.train.engine import Engine


class UpdateRatios:
    """Measured in each step whose number ``every`` divides; 0 never measures.

    Between ``before`` and ``after`` a copy of this rank's master weights is kept.
    """

    def __init__(self, engine: Engine, *, every: int) -> None:
        self._engine = engine
        self._every = every
        self._is_due = False
        self._before: list[Tensor] = []

    def before(self, step: int) -> None:
        """Called right before the update of a step (1-based)."""
        self._is_due = self._every > 0 and step % self._every == 0
        if self._is_due:
            self._before = [weight.clone() for _, weight in self._held()]

    def after(self) -> dict[str, float]:
        """The ratio of each part that trains, after the update; empty where none was made or measured. Collective."""
        if not self._is_due:
            return {}
        sums = torch.zeros((2, len(PARTS)), dtype=torch.float64, device=device())
        for (part, weight), before in zip(self._held(), self._before, strict=True):
            sums[1, part] += _square(before).to(sums.device)
            sums[0, part] += _square(before.sub_(weight)).to(sums.device)
        self._is_due, self._before = False, []
        if rank() and not is_partitioned(self._engine):  # every rank holds everything: counted once
            sums.zero_()
        changes, weights = all_reduce_sum(sums).sqrt().tolist()
        if not any(changes):  # the update was left out
            return {}
        return {
            part: change / weight for part, change, weight in zip(PARTS, changes, weights, strict=True) if weight > 0
        }

    def _held(self) -> Iterator[tuple[int, Tensor]]:
        for piece in pieces(self._engine):
            yield part_number(piece.name), piece.read(WEIGHT).detach()


def part_number(name: str) -> int:
    """Which of ``PARTS`` a parameter belongs to."""
    return next(number for number, starts in enumerate(PARTS.values()) if name.startswith(starts))


def _square(values: Tensor) -> Tensor:
    return torch.linalg.vector_norm(values, dtype=torch.float64).square()
