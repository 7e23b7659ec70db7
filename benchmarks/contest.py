"""What is compared: a size and a stage with the samples of the timed steps, and a run of mmit on them.

mmit's plan is known before it trains, so the other systems can be given exactly the samples of the timed steps.
"""

from __future__ import annotations

import json
import sys
from dataclasses import dataclass
from itertools import product
from typing import Any

import yaml
from observe import Span, watch
from world import (
    SAMPLES_PER_ROW,
    SAMPLES_PER_STEP,
    World,
    make_data,
    run_file,
)

STAGE = "measured"
LONG = 4096
LONGER = range(31)
"""Percent by which a row may be longer than eight average samples, so that all samples find room."""
SEEDS = range(40)


@dataclass(frozen=True, kw_only=True)
class Contest:
    """A size and a stage, ready to be run.

    warm, timed: ids of the records in mmit's steps before and within the timed ones. tokens: of each of them.
    length: tokens of a row.
    """

    world: World
    size: str
    stage: int
    length: int
    warm: tuple[str, ...]
    timed: tuple[str, ...]
    tokens: dict[str, int]
    warmup_steps: int
    steps: int

    def facts(self) -> dict[str, Any]:
        """What was compared, for the record."""
        return {
            "size": self.size,
            "stage": self.stage,
            "row_tokens": self.length,
            "warmup_steps": self.warmup_steps,
            "steps": self.steps,
            "samples": len(self.timed),
        }


@dataclass(frozen=True, kw_only=True)
class Run:
    """One run: what it used for the timed steps, their tokens, and the mean of their losses."""

    span: Span
    samples: int
    tokens: int
    trained_tokens: int
    loss: float

    def figures(self) -> dict[str, float]:
        """What is compared."""
        return {
            "samples_per_second": self.samples / self.span.seconds,
            "tokens_per_second": self.tokens / self.span.seconds,
            "trained_tokens_per_second": self.trained_tokens / self.span.seconds,
            "cpu_seconds_per_sample": self.span.cpu_seconds / self.samples,
            "peak_mib": self.span.peak_bytes / 2**20,
            "loss": self.loss,
        }


def prepare(world: World, size: str, stage: int, *, warmup_steps: int, steps: int) -> Contest:
    """Make the data of a stage, mmit's run file and plan, and the directory that the other system opens.

    The plan takes every sample. Of the seeds, which shuffle the steps, the first is chosen whose timed steps hold as
    many samples as those of the other system, and samples that are as long as all are on average.
    """
    import torch

    from mmit.config import RunConfig
    from mmit.models import build_model, save_model
    from mmit.train.feed import make_encode, plan_stage

    wanted = warmup_steps + steps
    make_data(world, stage, steps=wanted)
    content = run_file(world, stage, length=LONG, seed=0)
    draft = RunConfig.model_validate(content)
    loaded = build_model(draft.model, dtype=torch.float32, seed=draft.seed)
    encode = make_encode(draft.stages[STAGE].data, loaded)
    lengths = plan_stage(draft, draft.stages[STAGE], encode).tables[0].tokens
    for longer, seed in product(LONGER, SEEDS):
        length = max(int(lengths.mean() * SAMPLES_PER_ROW * (1 + longer / 100)), int(lengths.max()))
        content = run_file(world, stage, length=length, seed=seed)
        config = RunConfig.model_validate(content)
        plan = plan_stage(config, config.stages[STAGE], encode)
        if plan.steps == wanted and _is_typical(plan, warmup_steps, float(lengths.mean())):
            break
    else:
        raise AssertionError(f"no row length and seed make {wanted} steps of equal size of {len(lengths)} samples")
    world.run_file(stage).write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    loaded = build_model(config.model, dtype=torch.float32, seed=seed)
    save_model(loaded, None, world.whole(stage), made_from={"benchmark": "random weights"})
    seen = [_seen(plan, step) for step in range(wanted)]
    return Contest(
        world=world,
        size=size,
        stage=stage,
        length=length,
        warm=tuple(name for step in seen[:warmup_steps] for name in step),
        timed=tuple(name for step in seen[warmup_steps:] for name in step),
        tokens={name: tokens for step in seen for name, tokens in step.items()},
        warmup_steps=warmup_steps,
        steps=steps,
    )


def _is_typical(plan: Any, warmup_steps: int, mean_length: float) -> bool:
    rows = [row for step in range(warmup_steps, plan.steps) for row in plan.step(step)]
    samples = sum(len(row.samples) for row in rows)
    tokens = sum(row.tokens for row in rows)
    return samples == (plan.steps - warmup_steps) * SAMPLES_PER_STEP and abs(tokens / samples / mean_length - 1) < 0.01


def _seen(plan: Any, step: int) -> dict[str, int]:
    """The records' own ids, with their tokens; a sample is named after its record's place in the source: the id."""
    samples = [sample for row in plan.step(step) for sample in row.samples]
    names = [plan.sources[source].read(number).id.rpartition("/")[2] for source, number in samples]
    tokens = [int(plan.tables[source].tokens[number]) for source, number in samples]
    return {f"{int(name):06d}": count for name, count in zip(names, tokens, strict=True)}


def run_mmit(contest: Contest, *, ranks: int, overrides: list[str]) -> Run:
    """``mmit train`` as a user calls it."""
    folder = contest.world.folder / "runs" / STAGE
    progress = folder / "metrics.jsonl"
    progress.unlink(missing_ok=True)
    file = str(contest.world.run_file(contest.stage))
    command = [sys.executable, "-m", "mmit", "train", file, "--ranks", str(ranks), "--fresh", *overrides]
    last = contest.warmup_steps + contest.steps
    log = contest.world.folder / "mmit.log"
    span = watch([(command, environment())], progress=progress, first=contest.warmup_steps, last=last, log=log)
    lines = [json.loads(line) for line in progress.read_text(encoding="utf-8").splitlines()][contest.warmup_steps :]
    assert sum(line["samples"] for line in lines) == len(contest.timed), "the run departed from the plan"
    return Run(
        span=span,
        samples=len(contest.timed),
        tokens=sum(line["tokens"] for line in lines),
        trained_tokens=sum(line["trained_tokens"] for line in lines),
        loss=sum(line["loss"] for line in lines) / len(lines),
    )


def environment() -> dict[str, str]:
    """What every system runs under, beside the environment of the benchmark itself."""
    return {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
