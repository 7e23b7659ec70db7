"""What is known of a stage while it trains: of each step, of each measurement on held-out samples, of answers."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """What is known after an optimizer step; counts are over all ranks.

    loss: mean of -log p over the trained tokens of the step, in nats.
    grad_norm: 2-norm of the gradient over all trained parameters, before clipping; None where it overflowed in fp16.
    loss_scale, left_out_in_all: in fp16, that of the next step, and steps so far that overflowed and changed nothing.
    seconds, wait_seconds: wall clock of the step, and the part of it spent waiting for data (rank 0).
    loss_by_source: the loss over the trained tokens of each source that has any, where ``log.by_source`` asks for it.
    skipped, skipped_in_all: broken samples of the step, and of all steps so far.
    memory_bytes: the most that rank 0 has held so far: on its device, or in all where there is none.
    samples_digest: sum of 64-bit hashes of the sample ids, modulo 2**63: equal where the same samples were seen.
    flops, mfu: operations of the step, and the share of what the devices reach, where ``log.mfu`` asks for it.
    update_ratio: norm of the update over norm of the weights of each part, in the steps where it is measured.
    spike: what was done with a step whose loss jumped: ``skip`` (its update was left out) or ``warn``.
    """

    step: int
    loss: float
    lr: dict[str, float]
    grad_norm: float | None
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
    flops: int = 0
    mfu: float | None = None
    update_ratio: dict[str, float] = field(default_factory=dict)
    spike: str = ""
    loss_scale: float | None = None
    left_out_in_all: int | None = None

    def line(self) -> dict[str, Any]:
        """The line of ``metrics.jsonl``: what is not known or did not happen is left out."""
        known = ("loss_by_source", "flops", "mfu", "update_ratio", "spike")
        fp16 = () if self.loss_scale is not None else ("loss_scale", "left_out_in_all")
        return {key: value for key, value in asdict(self).items() if key not in fp16 and (value or key not in known)}

    def values(self) -> dict[str, float]:
        """The numbers by name, as curves are called."""
        apart = ("step", "lr", "samples_digest", "loss_by_source", "update_ratio", "spike")
        parts = {"lr": self.lr, "loss": self.loss_by_source, "update_ratio": self.update_ratio}
        named = {f"{kind}/{name}": value for kind, part in parts.items() for name, value in part.items()}
        alone = {key: value for key, value in self.line().items() if key not in apart and value is not None}
        return alone | named


@dataclass(frozen=True, kw_only=True)
class EvaluationRecord:
    """What was measured on held-out samples after a step; losses are means over all trained tokens, in nats.

    visual_gain: by how much the loss is higher with other pictures, over the samples that can be given others:
    ``blank`` ones, or an ``other`` sample's. trained_tokens, samples: of the measurement with the true pictures.
    text_loss: of text without pictures, where ``evaluate.text`` names some.
    """

    step: int
    loss: float
    loss_by_source: dict[str, float]
    visual_gain: dict[str, float]
    visual_gain_by_source: dict[str, dict[str, float]]
    trained_tokens: int
    samples: int
    seconds: float
    text_loss: float | None = None

    def values(self) -> dict[str, float]:
        """The numbers by name, as curves are called."""
        text = {} if self.text_loss is None else {"held_out/text_loss": self.text_loss}
        by_source = {f"held_out/loss/{name}": loss for name, loss in self.loss_by_source.items()}
        gained = {f"held_out/visual_gain/{name}": gain for name, gain in self.visual_gain.items()}
        return {"held_out/loss": self.loss, **by_source, **gained, **text}


@dataclass(frozen=True, kw_only=True)
class AnswerRecord:
    """The greedy answer to the first question of a held-out sample after a step.

    pictures: files beside the log, made smaller. reference: the sample's own answer.
    """

    step: int
    id: str
    source: str
    pictures: tuple[str, ...]
    question: str
    reference: str
    answer: str
