"""What a run that tunes a finished model takes for granted, by how many samples there are.

The numbers lie between recipes that are known to work: LIMA (1,000 samples, 15 epochs, 32 to 64 a step), QLoRA (9,209
samples, 16 a step), Alpaca (52,000, 3 epochs, 128 a step) and LLaVA 1.5 (665,000, 1 epoch, 128 a step);
docs/finetune.md has them as a table, with the reasons.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

LORA_RATE = 2e-4
"""LLaVA 1.5's and QLoRA's (arXiv 2310.03744, 2305.14314)."""
CONNECTOR_RATE = 2e-5
"""LLaVA 1.5's, in its LoRA scripts."""
DROPOUT = 0.05
MEASUREMENTS = 10
"""Of the held-out loss in a run."""

_EPOCHS = ((300, 10), (3_000, 5), (50_000, 3), (200_000, 2))
_RANKS = ((3_000, 16), (50_000, 64))
_HELD_OUT_SHARE, _LEAST_HELD_OUT, _MOST_HELD_OUT = 0.05, 10, 1_000
_LARGEST_STEP = 128
_LONGEST_ROW = 4_096
_ROWS = 16
_SHORTEST_ROW = 128
_FEW_STEPS = 300


@dataclass(frozen=True, kw_only=True)
class Lengths:
    """Of the samples, in tokens; context: most that the language model takes, 0 where it names no limit."""

    mean: float
    longest: int
    context: int


@dataclass(frozen=True, kw_only=True)
class Defaults:
    """What is chosen; ``steps`` is an estimate, since packing decides."""

    epochs: int
    rank: int
    length: int
    rows_per_step: int
    warmup_fraction: float
    steps: int

    @property
    def measure_every(self) -> int:
        """Steps between measurements of the held-out loss, and between checkpoints."""
        return max(1, round(self.steps / MEASUREMENTS))


def held_out(samples: int) -> int:
    """How many of all samples are measured and not trained on: 5 %, at least 10, at most 1,000 and a fifth.

    Of fewer than five, none.
    """
    wanted = max(_LEAST_HELD_OUT, round(_HELD_OUT_SHARE * samples))
    return min(wanted, _MOST_HELD_OUT, samples // 5)


def choose(samples: int, lengths: Lengths) -> Defaults:
    """The defaults for ``samples`` to train on."""
    epochs = _by_size(samples, _EPOCHS, 1)
    wanted = min(_LARGEST_STEP, _power_below(math.sqrt(samples)))  # samples of a step
    length = _row(wanted, lengths)
    in_a_row = max(1, int(length / lengths.mean))
    rows = _power_below(max(1.0, wanted / in_a_row))
    steps = epochs * -(-samples // min(rows * in_a_row, samples))
    return Defaults(
        epochs=epochs,
        rank=_by_size(samples, _RANKS, 128),
        length=length,
        rows_per_step=rows,
        warmup_fraction=0.1 if steps < _FEW_STEPS else 0.03,
        steps=steps,
    )


def _row(samples_per_step: int, lengths: Lengths) -> int:
    """Tokens of a row: all of the longest sample, and so many samples that a step is no more than 16 rows."""
    shared = min(_LONGEST_ROW, samples_per_step / _ROWS * lengths.mean)
    row = max(_SHORTEST_ROW, _power_above(max(lengths.longest, shared)))
    return min(row, lengths.context) if lengths.context else row


def _by_size(samples: int, table: Sequence[tuple[int, int]], otherwise: int) -> int:
    return next((value for most, value in table if samples <= most), otherwise)


def _power_below(value: float) -> int:
    """The largest power of two that is not above ``value`` (at least 1), so that 2, 4 or 8 ranks share it evenly."""
    return 1 << max(0, math.floor(math.log2(value)))


def _power_above(value: float) -> int:
    return 1 << math.ceil(math.log2(max(1.0, value)))
