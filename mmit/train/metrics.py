"""The record of a stage: one JSON line per step, a line on the screen, a loss curve as a picture, TensorBoard."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from mmit.distributed import logger
from mmit.errors import MissingExtra
from mmit.train.curves import line_chart


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What is known after an optimizer step; counts are over all ranks.

    loss: mean of -log p over the trained tokens of the step, in nats.
    grad_norm: 2-norm of the gradient over all trained parameters, before clipping.
    seconds, wait_seconds: wall clock of the step, and the part of it spent waiting for data (rank 0).
    loss_by_source: the loss over the trained tokens of each source that has any, where ``log.by_source`` asks for it.
    skipped, skipped_in_all: broken samples of the step, and of all steps so far.
    memory_bytes: the most that rank 0 has held so far: on its device, or in all where there is none.
    samples_digest: sum of 64-bit hashes of the sample ids, modulo 2**63: equal where the same samples were seen.
    """

    step: int
    loss: float
    lr: dict[str, float]
    grad_norm: float
    tokens: int
    trained_tokens: int
    images: int
    samples: int
    skipped: int
    skipped_in_all: int
    samples_digest: int
    seconds: float
    wait_seconds: float
    memory_bytes: int = 0
    loss_by_source: dict[str, float] = field(default_factory=dict)


class Recorder:
    """Writes the record of rank 0; on other ranks it is not made."""

    def __init__(self, folder: Path, *, steps: int, every_steps: int, tensorboard: bool, resume_step: int) -> None:
        self._path = folder / "metrics.jsonl"
        self._curve = folder / "loss.svg"
        self._steps = steps
        self._every = every_steps
        self._losses: list[tuple[int, float]] = []
        self._seconds = 0.0
        self._done_here = 0
        self._keep_until(resume_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._board = _tensorboard(folder / "tensorboard", resume_step) if tensorboard else None

    def _keep_until(self, step: int) -> None:
        """Drop lines of steps that a killed run did beyond its last checkpoint: they are done again."""
        if not self._path.exists():
            return
        kept = []
        for line in self._path.read_text(encoding="utf-8").splitlines():
            record = _parsed(line)
            if record is not None and record["step"] <= step:
                kept.append(line)
                self._losses.append((record["step"], record["loss"]))
        temporary = self._path.with_suffix(".tmp")
        temporary.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        os.replace(temporary, self._path)

    def add(self, record: StepRecord) -> None:
        """Note one step."""
        line = asdict(record)
        if not record.loss_by_source:
            del line["loss_by_source"]
        self._file.write(json.dumps(line) + "\n")
        self._file.flush()
        self._losses.append((record.step, record.loss))
        self._seconds += record.seconds
        self._done_here += 1
        if record.step % self._every == 0 or record.step in (1, self._steps):
            logger.info(self._line(record))
        if self._board is not None:
            for name, value in _flat(record).items():
                self._board.add_scalar(name, value, record.step)

    def _line(self, record: StepRecord) -> str:
        left = (self._steps - record.step) * self._seconds / self._done_here
        lr = max(record.lr.values())
        parts = [
            f"step {record.step}/{self._steps}",
            f"loss {record.loss:.4f}",
            f"lr {lr:.2e}",
            f"grad {record.grad_norm:.2f}",
            f"{record.tokens / record.seconds:,.0f} tok/s",
            f"trained {record.trained_tokens / max(1, record.tokens):.1%}",
            f"data wait {record.wait_seconds / record.seconds:.0%}",
            f"ETA {_clock(left)}",
        ]
        if record.skipped_in_all:
            parts.append(f"skipped {record.skipped}, in all {record.skipped_in_all}")
        return "  ".join(parts)

    def draw(self) -> None:
        """Write the loss curve."""
        temporary = self._curve.with_suffix(".tmp")
        temporary.write_text(line_chart({"loss": self._losses}, title="loss"), encoding="utf-8")
        os.replace(temporary, self._curve)

    def close(self) -> None:
        """Draw the curve and close the files."""
        if self._losses:
            self.draw()
        self._file.close()
        if self._board is not None:
            self._board.close()


def _parsed(line: str) -> dict[str, Any] | None:
    """A line of the log, or None for the half line that a kill can leave at the end."""
    try:
        return json.loads(line)
    except json.JSONDecodeError:
        return None


def _flat(record: StepRecord) -> dict[str, float]:
    apart = ("step", "lr", "samples_digest", "loss_by_source")
    values = {k: v for k, v in asdict(record).items() if k not in apart}
    by_source = {f"loss/{name}": loss for name, loss in record.loss_by_source.items()}
    return {**values, **{f"lr/{name}": lr for name, lr in record.lr.items()}, **by_source}


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def _tensorboard(folder: Path, resume_step: int) -> Any:  # noqa: ANN401  (an optional package's type)
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise MissingExtra("tensorboard", "track", "log.tensorboard") from None
    return SummaryWriter(str(folder), purge_step=resume_step + 1)
