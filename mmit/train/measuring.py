"""When the held-out samples of a stage are measured and asked, and which measurement was the best so far."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mmit.train.verdicts import best_so_far
from mmit.train.watchdog import EVALUATING, Watchdog

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from mmit.train.answers import Answers
    from mmit.train.engine import Engine
    from mmit.train.evaluation import Evaluation
    from mmit.train.metrics import Recorder


class Measuring:
    """The measurements of a stage in ``folder`` that goes on after ``step``; the same on every rank.

    best: step of the lowest held-out loss so far; None before the first measurement.
    """

    def __init__(
        self,
        evaluation: Evaluation | None,
        answers: Answers | None,
        engine: Engine,
        recorder: Recorder | None,
        *,
        folder: Path,
        step: int,
    ) -> None:
        self._evaluation = evaluation
        self._answers = answers
        self._engine = engine
        self._recorder = recorder
        self._start = step
        self.best, self._lowest = best_so_far(folder, step=step) or (None, float("inf"))

    def before(self, watchdog: Watchdog) -> None:
        """Before step 1, where text is watched: what the language model knew; collective."""
        if self._evaluation is not None and self._evaluation.text is not None and self._start == 0:
            self._measure(self._evaluation, 0, watchdog)

    def after(self, step: int, watchdog: Watchdog, *, last: bool) -> None:
        """After a step, where it is time; collective. last: of the stage."""
        if self._evaluation is not None and (step % self._evaluation.every_steps == 0 or last):
            self._ask(step, watchdog)
            self._measure(self._evaluation, step, watchdog)

    def _ask(self, step: int, watchdog: Watchdog) -> None:
        if self._answers is None:
            return
        found = self._answers.give(
            self._engine, step, lambda samples: watchdog.mark(EVALUATING, step=step, samples=samples)
        )
        if self._recorder is not None:
            self._recorder.add_answers(found)

    def _measure(self, evaluation: Evaluation, step: int, watchdog: Watchdog) -> None:
        def mark(samples: Sequence[str]) -> None:
            watchdog.mark(EVALUATING, step=step, samples=samples)

        record = evaluation.measure(self._engine, step, mark)
        if self._recorder is not None:
            self._recorder.add_evaluation(record)
        if record.loss < self._lowest:
            self.best, self._lowest = step, record.loss
