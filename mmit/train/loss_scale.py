"""The loss scale of fp16: gradients are computed of a multiple of the loss, so that small ones do not become 0.

DeepSpeed halves the scale and leaves the step out where a gradient overflows, and doubles it after many steps without
(arXiv 1710.03740, sec. 3.2). The plan and the schedule go on: the samples of a step that was left out are not trained.
"""

from __future__ import annotations

from typing import Any

from mmit.errors import TrainingError

_KEPT = ("cur_scale", "cur_iter", "last_overflow_iter", "cur_hysteresis")
"""What DeepSpeed's scaler remembers; one of a fixed scale has the first only."""


class LossScale:
    """DeepSpeed's scaler of one engine, and how many steps were left out so far.

    optimizer: DeepSpeed's, of an engine in fp16.
    """

    def __init__(self, optimizer: Any) -> None:  # noqa: ANN401 - DeepSpeed's classes share no type
        self._scaler = optimizer.loss_scaler
        self._scaler.raise_error_at_min_scale = False  # it would raise a bare Exception; see ``note``
        self.left_out = 0

    @property
    def scale(self) -> float:
        """What the loss of the next step is multiplied by."""
        return float(self._scaler.cur_scale)

    def note(self, *, before: float) -> None:
        """Count a step that was left out; ``before`` is the scale it was made with.

        Raises TrainingError where the scale cannot fall any more.
        """
        self.left_out += 1
        if self.scale == before <= getattr(self._scaler, "min_scale", before):
            raise TrainingError(
                f"gradients overflow in fp16 at the smallest loss scale, {before:g}; the last checkpoint is intact. "
                "Take precision: bf16 or fp32, or lower the learning rate"
            )

    def state(self) -> dict[str, float]:
        """What a run that continues needs."""
        kept = {key: getattr(self._scaler, key) for key in _KEPT if hasattr(self._scaler, key)}
        return {**kept, "left_out": self.left_out}

    def restore(self, state: dict[str, float]) -> None:
        """Go on from a ``state``."""
        for key in _KEPT:
            if key in state and hasattr(self._scaler, key):
                setattr(self._scaler, key, state[key])
        self.left_out = int(state["left_out"])
