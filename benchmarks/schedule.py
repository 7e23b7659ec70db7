"""How long a comparison takes, before it starts, and how many steps and rounds fit into the time there is."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from world import SAMPLES_PER_STEP, SIZES, Size

MOST_STEPS = 6
LEAST_STEPS = 2
OVER_MATRICES = {"mmit": 1.8, "compiled": 1.8, "trainer": 3.2, "grouped": 2.8, "trl": 4.2, "deepspeed": 3.4}
"""CPU time over that of the useful matrix products, roughly: padding, attention, element-wise work, unused logits."""
TEXT_PER_PICTURE = {1: 0.05, 2: 0.45}
"""Text tokens for each image token, on average over all samples."""
PREPARING = 15.0
"""Seconds for the data and the models of a size and a stage."""


@dataclass(frozen=True)
class Cell:
    """What is compared at a time."""

    size: str
    stage: int
    ranks: int


@dataclass(frozen=True)
class Speed:
    """Of this machine: multiplications and additions a second on one thread, seconds until a system can train."""

    flops: float
    start: float

    def run_seconds(self, cell: Cell, system: str, *, steps: int) -> float:
        """Of one run with ``steps`` steps, the warm-up among them."""
        work = steps * SAMPLES_PER_STEP * sample_flops(SIZES[cell.size], cell.stage)
        return self.start * cell.ranks**0.5 + OVER_MATRICES[system] * work / self.flops / cell.ranks


def sample_flops(size: Size, stage: int) -> float:
    """Operations of the matrix products of one sample's forward and backward pass, roughly (mmit.models.flops)."""
    tokens = size.image_tokens * (1 + TEXT_PER_PICTURE[stage])
    parameters = size.layers * (4 * size.width**2 + 3 * size.width * size.inner)
    tower = 2 * 12 * (size.vision_layers - 1) * size.vision_width**2 * size.image_tokens
    head = 6 * size.width * size.rows * TEXT_PER_PICTURE[2] / 3 * size.image_tokens if stage == 2 else 0
    return tower + (4 if stage == 1 else 6) * parameters * tokens + head


def measure_speed() -> Speed:
    """A few products of the shapes of ``small``, and one start of Python with what every system imports."""
    import torch

    # CPU time, so that a busy machine does not look like a slow one
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    left, right = torch.randn(1024, 640), torch.randn(640, 1728)
    best = float("inf")
    for _ in range(20):
        started = time.process_time()
        left @ right
        best = min(best, time.process_time() - started)
    torch.set_num_threads(threads)
    before = os.times()
    imports = [sys.executable, "-W", "ignore", "-c", "import peer_task, transformers.trainer"]
    subprocess.run(imports, cwd=Path(__file__).parent, check=True)
    after = os.times()
    spent = after.children_user + after.children_system - before.children_user - before.children_system
    return Speed(flops=2 * 1024 * 640 * 1728 / best, start=1.5 * spent)


def round_seconds(
    speed: Speed, cells: Iterable[Cell], systems: Sequence[str], steps: Mapping[tuple[str, int], int], *, warmup: int
) -> float:
    """Of one round of all cells."""
    return sum(
        speed.run_seconds(cell, system, steps=warmup + steps[cell.size, cell.stage])
        for cell in cells
        for system in systems
    )


def choose_steps(
    speed: Speed, cells: Sequence[Cell], systems: Sequence[str], *, warmup: int, seconds: float
) -> dict[tuple[str, int], int]:
    """Timed steps of each size and stage, so that a round of all cells fits into ``seconds`` where that is possible.

    From MOST_STEPS down to LEAST_STEPS, the longest runs first; fewer samples would be too few to group by length.
    """
    steps = {(cell.size, cell.stage): MOST_STEPS for cell in cells}
    while round_seconds(speed, cells, systems, steps, warmup=warmup) > seconds:
        open_to = [key for key, count in steps.items() if count > LEAST_STEPS]
        if not open_to:
            break
        longest = max(open_to, key=lambda key: steps[key] * sample_flops(SIZES[key[0]], key[1]))
        steps[longest] -= 1
    return steps
