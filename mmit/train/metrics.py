"""The record of a stage: one JSON line per step, a line on the screen, a loss curve as a picture, sinks elsewhere."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from mmit.distributed import logger
from mmit.train.curves import line_chart
from mmit.train.records import AnswerRecord, EvaluationRecord, StepRecord
from mmit.train.sinks import Sinks
from mmit.train.verdicts import text_change, verdicts


class Recorder:
    """Writes the record of rank 0; on other ranks it is not made."""

    def __init__(self, folder: Path, *, steps: int, every_steps: int, resume_step: int, sinks: Sinks) -> None:
        self._folder = folder
        self._path = folder / "metrics.jsonl"
        self._evaluations = folder / "evaluation.jsonl"
        self._answers = folder / "answers.jsonl"
        self._curve = folder / "loss.svg"
        self._steps = steps
        self._every = every_steps
        self._losses: list[tuple[int, float]] = []
        self._seconds = 0.0
        self._done_here = 0
        self._losses += [(line["step"], line["loss"]) for line in _kept(self._path, resume_step)]
        self._measured = _kept(self._evaluations, resume_step)
        self._said: set[str] = set()
        _kept(self._answers, resume_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._sinks = sinks

    def add(self, record: StepRecord) -> None:
        """Note one step."""
        self._file.write(json.dumps(record.line()) + "\n")
        self._file.flush()
        self._losses.append((record.step, record.loss))
        self._seconds += record.seconds
        self._done_here += 1
        if record.step % self._every == 0 or record.step in (1, self._steps):
            logger.info(self._line(record))
        self._sinks.write(record.values(), record.step)

    def add_evaluation(self, record: EvaluationRecord) -> None:
        """Note a measurement on held-out samples, beside the training loss of the steps since the one before."""
        last = self._measured[-1]["step"] if self._measured else 0
        recent = [loss for step, loss in self._losses if step > last]
        training = sum(recent) / len(recent) if recent else None
        self._measured.append({**asdict(record), "training_loss": training})
        with self._evaluations.open("a", encoding="utf-8") as file:
            file.write(json.dumps(self._measured[-1]) + "\n")
        gains = "".join(f"  gain over {name} pictures {gain:+.4f}" for name, gain in record.visual_gain.items())
        told = f"step {record.step}/{self._steps}  held-out loss {record.loss:.4f}"
        trained = f"  (training {training:.4f} over {len(recent)} steps)" if training is not None else ""
        change = text_change(self._measured)
        logger.info("%s%s%s%s", told, trained, gains, f"  text-only loss {change}" if change else "")
        for kind, sentence in verdicts(self._measured, self._folder).items():
            if kind not in self._said or record.step == self._steps:
                logger.warning("%s", sentence)
            self._said.add(kind)
        self._sinks.write(record.values(), record.step)

    def add_answers(self, records: Sequence[AnswerRecord]) -> None:
        """Note answers to held-out questions."""
        with self._answers.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(asdict(record), ensure_ascii=False) + "\n" for record in records)
        self._sinks.show(records, self._folder)

    def _line(self, record: StepRecord) -> str:
        left = (self._steps - record.step) * self._seconds / self._done_here
        lr = max(record.lr.values())
        parts = [
            f"step {record.step}/{self._steps}",
            f"loss {record.loss:.4f}",
            f"lr {lr:.2e}",
            "grad overflow" if record.grad_norm is None else f"grad {record.grad_norm:.2f}",
            f"{record.tokens / record.seconds:,.0f} tok/s",
            f"trained {record.trained_tokens / max(1, record.tokens):.1%}",
            f"data wait {record.wait_seconds / record.seconds:.0%}",
            f"ETA {_clock(left)}",
        ]
        if record.mfu is not None:
            parts.insert(5, f"MFU {record.mfu:.1%}")
        if record.update_ratio:
            parts.append("update " + ", ".join(f"{part} {ratio:.1e}" for part, ratio in record.update_ratio.items()))
        if record.skipped_in_all:
            parts.append(f"skipped {record.skipped}, in all {record.skipped_in_all}")
        if record.left_out_in_all:
            parts.append(f"loss scale {record.loss_scale:g}, steps left out {record.left_out_in_all}")
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
        self._sinks.close()


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


def _clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
