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


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord:
    """What was measured on held-out samples after a step; losses are means over all trained tokens, in nats.

    visual_gain: by how much the loss is higher with other pictures, over the samples that can be given others:
    ``blank`` ones, or an ``other`` sample's. trained_tokens, samples: of the measurement with the true pictures.
    """

    step: int
    loss: float
    loss_by_source: dict[str, float]
    visual_gain: dict[str, float]
    visual_gain_by_source: dict[str, dict[str, float]]
    trained_tokens: int
    samples: int
    seconds: float


class Recorder:
    """Writes the record of rank 0; on other ranks it is not made."""

    def __init__(self, folder: Path, *, steps: int, every_steps: int, tensorboard: bool, resume_step: int) -> None:
        self._path = folder / "metrics.jsonl"
        self._evaluations = folder / "evaluation.jsonl"
        self._curve = folder / "loss.svg"
        self._steps = steps
        self._every = every_steps
        self._losses: list[tuple[int, float]] = []
        self._seconds = 0.0
        self._done_here = 0
        self._losses += [(line["step"], line["loss"]) for line in _kept(self._path, resume_step)]
        evaluated = _kept(self._evaluations, resume_step)
        self._evaluated = evaluated[-1]["step"] if evaluated else 0
        self._file = self._path.open("a", encoding="utf-8")
        self._board = _tensorboard(folder / "tensorboard", resume_step) if tensorboard else None

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

    def add_evaluation(self, record: EvaluationRecord) -> None:
        """Note a measurement on held-out samples, beside the training loss of the steps since the one before."""
        recent = [loss for step, loss in self._losses if step > self._evaluated]
        training = sum(recent) / max(1, len(recent))
        self._evaluated = record.step
        with self._evaluations.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**asdict(record), "training_loss": training}) + "\n")
        gains = "".join(f"  gain over {name} pictures {gain:+.4f}" for name, gain in record.visual_gain.items())
        told = f"step {record.step}/{self._steps}  held-out loss {record.loss:.4f}"
        logger.info("%s  (training %.4f over %d steps)%s", told, training, len(recent), gains)
        if self._board is not None:
            by_source = {f"held_out/loss/{name}": loss for name, loss in record.loss_by_source.items()}
            gained = {f"held_out/visual_gain/{name}": gain for name, gain in record.visual_gain.items()}
            for name, value in {"held_out/loss": record.loss, **by_source, **gained}.items():
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


def _kept(path: Path, step: int) -> list[dict[str, Any]]:
    """What a log says up to ``step``; it loses the lines that a killed run wrote beyond its last checkpoint."""
    if not path.exists():
        return []
    records = [_parsed(line) for line in path.read_text(encoding="utf-8").splitlines()]
    kept = [record for record in records if record is not None and record["step"] <= step]
    temporary = path.with_suffix(".tmp")
    temporary.write_text("".join(f"{json.dumps(record)}\n" for record in kept), encoding="utf-8")
    os.replace(temporary, path)
    return kept


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
