"""What the measurements on held-out samples say, in sentences: that a model overfits, that it forgets plain text."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mmit.train.run_files import read_lines

Lines = Sequence[Mapping[str, Any]]
"""Those of ``evaluation.jsonl``, in the order of their steps."""

PATIENCE = 2
"""Measurements in a row that are above the best before it is called overfitting."""
MARGIN = 0.01
"""And the last is above it by so large a share: less is noise."""
TEXT_RISE = 0.1
"""The share by which the loss on plain text may rise before it is said."""


def best_of(lines: Lines) -> tuple[int, float] | None:
    """Step and held-out loss of the best measurement, the first of equal ones; None where there is none."""
    measured = [(line["loss"], line["step"]) for line in lines if _is_number(line.get("loss"))]
    loss, step = min(measured, default=(math.nan, -1))
    return None if step < 0 else (step, loss)


def best_so_far(folder: Path, *, step: int) -> tuple[int, float] | None:
    """The best measurement of a stage up to ``step``, from its folder."""
    return best_of([line for line in read_lines(folder / "evaluation.jsonl") if line["step"] <= step])


def verdicts(lines: Lines, folder: Path) -> dict[str, str]:
    """Kind of finding -> the sentence about it; empty where all is well. folder: of the stage."""
    found = {"overfitting": _overfitting(lines, folder), "text": _forgetting(lines)}
    return {kind: sentence for kind, sentence in found.items() if sentence}


def text_change(lines: Lines) -> str:
    """The loss on plain text before and now, ``2.3100 -> 2.5800 (+11.7 %)``; empty where it was not measured twice."""
    losses = _text_losses(lines)
    if len(losses) < 2:
        return ""
    return f"{losses[0]:.4f} -> {losses[-1]:.4f} ({losses[-1] / losses[0] - 1:+.1%})"


def _overfitting(lines: Lines, folder: Path) -> str:
    best = best_of(lines)
    if best is None:
        return ""
    step, loss = best
    later = [line for line in lines if line["step"] > step and _is_number(line.get("loss"))]
    trained = [line for line in lines if line["step"] >= step and _is_number(line.get("training_loss"))]
    if len(later) < PATIENCE or later[-1]["loss"] <= loss * (1 + MARGIN) or not trained:
        return ""
    before, now = trained[0]["training_loss"], trained[-1]["training_loss"]
    if now >= before:
        return ""
    return (
        f"the model overfits: the held-out loss was best at step {step}, {loss:.4f}, and is {later[-1]['loss']:.4f} "
        f"now, while the training loss fell from {before:.4f} to {now:.4f}; {_remedy(folder, step)}"
    )


def _remedy(folder: Path, step: int) -> str:
    if step == 0:
        return "no training was better than none: lower the learning rates, and look at the data"
    model = folder / "checkpoints" / f"step-{step:06d}" / "model"
    if model.is_dir():
        return f"take the model of that step, {model}, or train again with fewer epochs"
    return "train again with fewer epochs, or with save.keep_best, which keeps the model of that step"


def _forgetting(lines: Lines) -> str:
    losses = _text_losses(lines)
    if not losses or losses[-1] <= losses[0] * (1 + TEXT_RISE):
        return ""
    return (
        f"the language model forgets: its loss on plain text went {text_change(lines)}; lower the learning rates, take "
        "fewer epochs, or mix text without pictures into data.mix"
    )


def _text_losses(lines: Lines) -> list[float]:
    return [line["text_loss"] for line in lines if _is_number(line.get("text_loss"))]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)
