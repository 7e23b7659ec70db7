"""Spikes of the loss: a step whose loss is far above those before it, seen before its update is made.

The loss of a step is the same number on every rank, and so is the verdict. What the verdict depends on travels in the
checkpoint: a run that was resumed judges as one that was not.
"""

from __future__ import annotations

import statistics
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from mmit.config import Spike
from mmit.distributed import gathered, logger, rank
from mmit.errors import TrainingError


@dataclass(frozen=True, kw_only=True)
class SpikeState:
    """What a checkpoint keeps: the last losses, and how many updates were left out so far."""

    recent: tuple[float, ...] = ()
    skipped: int = 0


Part = tuple[Tensor, int, tuple[str, ...]]
"""A micro-batch: the sum of -log p, the trained tokens, the ids of its samples."""


class Spikes:
    """Judges every step of a stage by ``rules``; without rules there are no spikes.

    stage: its name, for messages.
    """

    def __init__(self, rules: Spike | None, state: SpikeState, *, stage: str) -> None:
        self._rules = rules
        self._stage = stage
        self._recent = deque(state.recent, maxlen=rules.window if rules else 0)
        self._skipped = state.skipped

    @property
    def state(self) -> SpikeState:
        """After the steps that were judged so far."""
        return SpikeState(recent=tuple(self._recent), skipped=self._skipped)

    def judge(self, loss: float, *, step: int, batches: Sequence[Part]) -> str:
        """What is to be done with a step (1-based): ``skip`` its update, ``warn``, or nothing (an empty string).

        batches: the micro-batches of this rank; the worst of all ranks is named. Collective at a spike. Raises
        TrainingError where the run is to end, before the update.
        """
        rules = self._rules
        if rules is None:
            return ""
        usual = statistics.median(self._recent) if len(self._recent) == rules.window else None
        if usual is None or loss <= rules.factor * usual:
            self._recent.append(loss)
            return ""
        told = (
            f"the loss of step {step} is {loss:.4g}, more than {rules.factor:g} times {usual:.4g}, the median of the "
            f"{rules.window} before it"
        )
        named = f"Highest is a micro-batch of {_worst(batches)}"
        key = f"stages.{self._stage}.spike"
        if rules.action == "stop":
            raise TrainingError(
                f"{told}; no update was made and the last checkpoint is intact. {named}. Look at them with "
                f"`mmit data show`, lower the learning rate, or go on with {key}.action=skip"
            )
        if rules.action == "skip" and self._skipped >= rules.limit:
            raise TrainingError(
                f"{told}, and {self._skipped} updates were left out already, as many as {key}.limit allows; the last "
                f"checkpoint is intact. {named}. Lower the learning rate, or raise the limit"
            )
        if rules.action == "skip":
            self._skipped += 1
            logger.warning("%s; its update is left out (%d of %d). %s", told, self._skipped, rules.limit, named)
        else:
            self._recent.append(loss)
            logger.warning("%s. %s", told, named)
        return rules.action


def _worst(batches: Sequence[Part]) -> str:
    """The micro-batch of all ranks with the highest loss; collective."""
    mine = [(float(nll) / trained, rank(), ids) for nll, trained, ids in batches if trained]
    loss, owner, ids = max(found for found in gathered(max(mine, default=None)) if found is not None)
    return f"rank {owner} with {loss:.4g}: {', '.join(ids[:8])}{' ...' if len(ids) > 8 else ''}"
