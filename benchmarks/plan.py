"""What planning costs and what the plan is worth, on synthetic lengths like those of LLaVA's 665k.

    python benchmarks/plan.py [--samples 10000000]

First the useful work of 665k samples at rows of 2k, 4k and 8k tokens on 8 ranks, then the start-up of many samples in a
process of its own: seconds, and the highest memory it ever held.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from mmit.conversation import Conversation
from mmit.data.lengths import ROW, LengthTable
from mmit.data.plan import Plan, make_plan
from mmit.data.summary import summarize

SAMPLES_OF_LLAVA = 665_298
SHARE_WITH_IMAGE = 624_610 / 665_298


class Counted:
    """A data set that is only counted."""

    def __init__(self, name: str, size: int) -> None:
        self.name = name
        self.fingerprint = f"{name} {size}"
        self.blocks: Sequence[int] = ()
        self.size = size

    def __len__(self) -> int:
        return self.size

    def read(self, number: int) -> Conversation:
        raise AssertionError(number)

    def place(self, number: int) -> tuple[str, str]:
        return self.name, str(number)


def llava_like(count: int, *, length: int, seed: int = 0) -> LengthTable:
    """Lengths as assumed for LLaVA's 665k, cut at a row.

    94 % hold an image: 576 image tokens, 40 of the template, lognormal text (median 150, sigma 0.8). The others are
    text alone: lognormal, median 1100, sigma 0.8.
    """
    generator = np.random.default_rng(seed)
    rows: Any = np.zeros(count, dtype=ROW)
    for first in range(0, count, 1 << 20):
        part = rows[first : first + (1 << 20)]
        with_image = generator.random(len(part)) < SHARE_WITH_IMAGE
        text = generator.standard_normal(len(part)) * 0.8
        tokens = np.where(with_image, 616 + 150 * np.exp(text), 1100 * np.exp(text))
        part["tokens"] = np.clip(tokens, 1, length)
        part["trained"] = part["tokens"] // 4
        part["tiles"] = with_image
    return LengthTable(rows=rows)


def planned(table: LengthTable, *, length: int) -> Plan:
    return make_plan(
        [(Counted("synthetic", len(table)), len(table))],
        [table],
        length=length,
        rows_per_step=(1 << 18) // length,
        packing=True,
        tiles_per_row=64,
        seed=0,
    )


def start_up(samples: int) -> dict[str, float]:
    """Seconds and MiB of planning, in this process."""
    table = llava_like(samples, length=4096)
    before = peak()
    started, busy = time.perf_counter(), time.process_time()
    plan = planned(table, length=4096)
    plan.step(plan.steps - 1)
    seconds, cpu = time.perf_counter() - started, time.process_time() - busy
    held = sum(a.nbytes for a in (plan.source_of, plan.sample_of, plan.starts, plan.tokens, plan.tiles))
    return {"seconds": seconds, "cpu": cpu, "before": before, "peak": peak(), "plan": held / 2**20, "steps": plan.steps}


def peak() -> float:
    """The highest resident memory of this process so far, MiB (getrusage would count the parent's before exec)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return int(status.partition("VmHWM:")[2].split()[0]) / 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--samples", type=int, default=10_000_000)
    parser.add_argument("--ranks", type=int, default=8)
    parser.add_argument("--start-up", type=int, default=0, help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.start_up:
        print(json.dumps(start_up(asked.start_up)))
        return
    print(f"{SAMPLES_OF_LLAVA:,} samples, {asked.ranks} ranks, 262,144 tokens a step")
    print("length  rows filled  useful work  with 4 rows a micro-batch  balance of cost")
    for length in (2048, 4096, 8192):
        plan = planned(llava_like(SAMPLES_OF_LLAVA, length=length), length=length)
        one = summarize(plan, length=length, world=asked.ranks)
        four = summarize(plan, length=length, world=asked.ranks, rows_per_micro_batch=4)
        print(f"{length:6}  {one.fill:11.3f}  {one.useful:11.4f}  {four.useful:25.4f}  {one.balance:15.4f}")
    for samples in (asked.samples // 10, asked.samples):
        done = subprocess.run(
            [sys.executable, __file__, "--start-up", str(samples)], capture_output=True, text=True, check=True
        )
        found = json.loads(done.stdout)
        print(
            f"planning {samples:,} samples: {found['seconds']:.1f} s ({found['cpu']:.1f} s of one core), "
            f"peak {found['peak']:.0f} MiB ({found['before']:.0f} before planning: imports and the length table), "
            f"the plan holds {found['plan']:.0f} MiB; {found['steps']:.0f} steps"
        )


if __name__ == "__main__":
    main()
