"""What a stage does not train on, counted by source over all ranks and over every resumption, and listed.

Samples that are left out of the plan are known before step 1; broken ones turn up while it runs. The counts of both
stand in the log, in each checkpoint and in the ``mmit.json`` of the model; ``skipped-rankN.jsonl`` names the broken.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mmit.data import BadSample, Plan, ShardSet
from mmit.data.control import ControlledSet
from mmit.data.frames import FewerFrames
from mmit.distributed import logger, rank
from mmit.errors import DataError

if TYPE_CHECKING:
    from mmit.train.checkpoint import RunState


class SkippedRecord:
    """The broken samples of a stage.

    totals: how many of each source were left out of the steps done so far, over all ranks.
    """

    def __init__(self, folder: Path, plan: Plan, state: RunState, *, max_skipped: float) -> None:
        """state: where the run goes on; the lists lose what was noted after it."""
        self.totals = dict.fromkeys(plan.names, 0) | dict(state.skipped)
        self._plan = plan
        self._max_skipped = max_skipped
        self._path = folder / f"skipped-rank{rank()}.jsonl"
        if rank() == 0:
            for path in folder.glob("skipped-rank*.jsonl"):
                _keep_until(state.step, path)
            if count := sum(self.totals.values()):
                logger.info("skipped before step %d: %s", state.step + 1, _shown(self.totals, count))

    def note(self, skipped: Sequence[tuple[int, BadSample]], counts: Sequence[int], *, step: int) -> None:
        """Write down what was left out of a step.

        skipped: of this rank, with the number of its source. counts: of all ranks, for each source.
        Raises DataError, on every rank, where it is more than ``max_skipped`` of the plan's samples by now.
        """
        names = self._plan.names
        if skipped:
            with self._path.open("a", encoding="utf-8") as file:
                for source, sample in skipped:
                    logger.warning("skipped: %s", sample)
                    file.write(json.dumps({"step": step, "source": names[source], **asdict(sample)}) + "\n")
        if not any(counts):
            return
        for name, count in zip(names, counts, strict=True):
            self.totals[name] += count
        total, allowed = sum(self.totals.values()), self._max_skipped * self._plan.samples
        if total > allowed:
            raise DataError(
                f"{_shown(self.totals, total)} of {self._plan.samples} samples were broken by step {step}, max_skipped "
                f"{self._max_skipped:g} allows {int(allowed)}; skipped-rank*.jsonl beside the checkpoints lists them, "
                "`mmit data check` finds all"
            )

    def facts(self) -> dict[str, Any]:
        """What ``mmit.json`` says of it: the samples that the plan left out, and those that were broken."""
        return {"left_out": left_out(self._plan), "skipped": self.totals}

    def announce(self) -> None:
        """Log the totals, at the end of a stage."""
        if count := sum(self.totals.values()):
            logger.info("skipped in all: %s", _shown(self.totals, count))


def _shown(totals: Mapping[str, int], count: int) -> str:
    """``3 (photos 2, charts 1)``; the name alone where there is one source."""
    parts = ", ".join(f"{name} {number}" for name, number in totals.items() if number)
    return f"{count} ({parts})"


def left_out(plan: Plan) -> dict[str, dict[str, int]]:
    """The samples of each source that the plan leaves out, by reason; sources that lose none are not named.

    broken: could not be encoded. quarantined: listed in quarantine.txt. too_long: did not fit a row.
    """
    found: dict[str, dict[str, int]] = {}
    for name, source, table in zip(plan.names, plan.sources, plan.tables, strict=True):
        quarantined = len(source.quarantined) if isinstance(source, ShardSet | ControlledSet | FewerFrames) else 0
        whole = int(np.count_nonzero(table.tokens == 0))
        counts = {
            "broken": len(table.refused),
            "quarantined": quarantined,
            "too_long": whole - len(table.refused) - quarantined,
        }
        if whole:
            found[name] = {reason: count for reason, count in counts.items() if count}
    return found


def _keep_until(step: int, path: Path) -> None:
    """Drop the lines of steps that a killed run did beyond its last checkpoint: they are done again."""
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            entry: Any = json.loads(line)
        except json.JSONDecodeError:
            continue  # the half line that a kill can leave at the end
        if entry["step"] <= step:
            kept.append(line)
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    os.replace(temporary, path)
