"""One comparison: a size and a stage, the same samples for both systems, a fresh process for every run.

mmit's plan is known before it trains, so the other system can be given exactly the samples of the timed steps.
"""

from __future__ import annotations

import json
import socket
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import yaml
from observe import Span, watch
from padded_trainer import Task
from world import (
    LEARNING_RATE,
    ROWS_PER_STEP,
    SAMPLES_PER_ROW,
    SAMPLES_PER_STEP,
    World,
    make_data,
    run_file,
)

HERE = Path(__file__).parent
STAGE = "measured"
LONG = 4096
LONGER = range(31)
"""Percent by which a row may be longer than eight average samples, so that all samples find room."""
SEEDS = range(40)


@dataclass(frozen=True, kw_only=True)
class Contest:
    """A size and a stage, ready to be run.

    warm, timed: ids of the records in mmit's steps before and within the timed ones. length: tokens of a row.
    """

    world: World
    size: str
    stage: int
    length: int
    warm: tuple[str, ...]
    timed: tuple[str, ...]
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
        """The four figures that are compared, and the loss."""
        return {
            "samples_per_second": self.samples / self.span.seconds,
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
    seen = [_ids(plan, step) for step in range(wanted)]
    return Contest(
        world=world,
        size=size,
        stage=stage,
        length=length,
        warm=tuple(name for step in seen[:warmup_steps] for name in step),
        timed=tuple(name for step in seen[warmup_steps:] for name in step),
        warmup_steps=warmup_steps,
        steps=steps,
    )


def _is_typical(plan: Any, warmup_steps: int, mean_length: float) -> bool:
    rows = [row for step in range(warmup_steps, plan.steps) for row in plan.step(step)]
    samples = sum(len(row.samples) for row in rows)
    tokens = sum(row.tokens for row in rows)
    return samples == (plan.steps - warmup_steps) * SAMPLES_PER_STEP and abs(tokens / samples / mean_length - 1) < 0.01


def _ids(plan: Any, step: int) -> list[str]:
    """The records' own ids; a sample is named after its record's place in the source, which here is the id."""
    found = [plan.sources[source].read(number).id for row in plan.step(step) for source, number in row.samples]
    return [f"{int(name.rpartition('/')[2]):06d}" for name in found]


def run_mmit(contest: Contest, *, ranks: int, overrides: list[str]) -> Run:
    """``mmit train`` as a user calls it."""
    folder = contest.world.folder / "runs" / STAGE
    progress = folder / "metrics.jsonl"
    progress.unlink(missing_ok=True)
    file = str(contest.world.run_file(contest.stage))
    command = [sys.executable, "-m", "mmit", "train", file, "--ranks", str(ranks), "--fresh", *overrides]
    last = contest.warmup_steps + contest.steps
    log = contest.world.folder / "mmit.log"
    span = watch([(command, _environment())], progress=progress, first=contest.warmup_steps, last=last, log=log)
    lines = [json.loads(line) for line in progress.read_text(encoding="utf-8").splitlines()][contest.warmup_steps :]
    assert sum(line["samples"] for line in lines) == len(contest.timed), "the run departed from the plan"
    return Run(
        span=span,
        samples=len(contest.timed),
        tokens=sum(line["tokens"] for line in lines),
        trained_tokens=sum(line["trained_tokens"] for line in lines),
        loss=sum(line["loss"] for line in lines) / len(lines),
    )


def run_trainer(contest: Contest, *, ranks: int) -> Run:
    """The padded Trainer on the same samples: warm-up steps, then those of mmit's timed steps.

    In the order of the records, which is random in length: mmit's own order would hand it batches grouped by length.
    """
    folder = contest.world.folder
    progress, counts, path = folder / "trainer.jsonl", folder / "trainer-counts", folder / "trainer-task.json"
    progress.unlink(missing_ok=True)
    records = {record["id"]: record for record in json.loads(contest.world.records(contest.stage).read_text())}
    warm = (contest.warm * 2)[: contest.warmup_steps * SAMPLES_PER_STEP]
    task = Task(
        stage=contest.stage,
        model=str(contest.world.whole(contest.stage)),
        images=str(contest.world.images),
        records=[records[name] for name in (*warm, *sorted(contest.timed))],
        samples_per_micro_batch=SAMPLES_PER_ROW,
        micro_batches=ROWS_PER_STEP // ranks,
        learning_rate=LEARNING_RATE,
        progress=str(progress),
        counts=str(counts),
    )
    task.save(path)
    command = [sys.executable, str(HERE / "padded_trainer.py"), str(path)]
    first, last = contest.warmup_steps, contest.warmup_steps + contest.steps
    commands = [(command, _environment() | more) for more in _ranks(ranks)]
    span = watch(commands, progress=progress, first=first, last=last, log=folder / "trainer.log")
    found = [json.loads(Path(f"{counts}.{rank}").read_text(encoding="utf-8")) for rank in range(ranks)]
    of_sample = {name: pair for rank in found for name, pair in rank["samples"].items()}
    losses = [loss for step, loss in found[0]["losses"].items() if int(step) > first]
    return Run(
        span=span,
        samples=len(contest.timed),
        tokens=sum(of_sample[name][0] for name in contest.timed),
        trained_tokens=sum(of_sample[name][1] for name in contest.timed),
        loss=sum(losses) / len(losses),
    )


def check_same_work(ours: Run, theirs: Run) -> None:
    """Raise AssertionError unless both trained on the same number of tokens."""
    mine, other = (ours.tokens, ours.trained_tokens), (theirs.tokens, theirs.trained_tokens)
    assert mine == other, f"tokens and trained tokens differ: mmit {mine}, Trainer {other}"


def _environment() -> dict[str, str]:
    return {
        "OMP_NUM_THREADS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }


def _ranks(ranks: int) -> list[dict[str, str]]:
    if ranks == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
