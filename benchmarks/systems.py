"""The systems that are compared, and a run of each on the samples of a contest, in fresh processes.

The other systems get the samples in the order of the records, which is random in length: mmit's own order would hand
them batches grouped by length.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from contest import STAGE, Contest, Run, environment, run_mmit
from observe import watch
from world import LEARNING_RATE, ROWS_PER_STEP, SAMPLES_PER_ROW, SAMPLES_PER_STEP

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Peer:
    """A system that is started as a script of this folder, once for each rank."""

    title: str
    script: str
    grouped: bool = False


PEERS = {
    "trainer": Peer("Trainer, padded", "peer_trainer.py"),
    "grouped": Peer("Trainer, grouped by length", "peer_trainer.py", grouped=True),
    "trl": Peer("TRL SFTTrainer", "peer_trl.py"),
    "deepspeed": Peer("DeepSpeed ZeRO-2, padded", "peer_deepspeed.py"),
}
OURS = "mmit"
COMPILED = "compiled"
"""mmit with ``compile: true``, which takes a C++ compiler; some of the compiling falls into the timed steps."""
BASE = "trainer"
"""The system that ratios are taken to."""
TITLES = {OURS: "mmit", COMPILED: "mmit, compiled"} | {name: peer.title for name, peer in PEERS.items()}


def here() -> list[str]:
    """The systems that this machine has what it takes for."""
    lacking = set() if shutil.which(os.environ.get("CXX", "g++")) else {COMPILED}
    return [name for name in TITLES if name not in lacking]


class UnequalWork(AssertionError):
    """Two systems that should have trained on the same tokens did not."""


def run(system: str, contest: Contest, *, ranks: int, overrides: Sequence[str]) -> Run:
    """One run of a system; ``overrides`` are changes to mmit's run file. Raises RunError."""
    if system in (OURS, COMPILED):
        compiles = [f"stages.{STAGE}.compile=true"] if system == COMPILED else []
        return run_mmit(contest, ranks=ranks, overrides=[*overrides, *compiles])
    return _run_peer(system, contest, ranks=ranks)


def check_same_work(runs: dict[str, Run]) -> None:
    """Raise UnequalWork unless all counted the same tokens and the same trained tokens in the timed steps."""
    counted = {name: (run.tokens, run.trained_tokens) for name, run in runs.items()}
    if len(set(counted.values())) > 1:
        said = "; ".join(f"{TITLES[name]}: {tokens} and {trained}" for name, (tokens, trained) in counted.items())
        raise UnequalWork(f"tokens and trained tokens of the timed steps differ: {said}")


def _run_peer(system: str, contest: Contest, *, ranks: int) -> Run:
    # here, because mmit alone needs no task and features.py no peer
    from peer_task import Task

    peer, folder = PEERS[system], contest.world.folder
    progress, counts, path = (folder / f"{system}{suffix}" for suffix in (".jsonl", "-counts", "-task.json"))
    progress.unlink(missing_ok=True)
    records = {record["id"]: record for record in json.loads(contest.world.records(contest.stage).read_text())}
    warm = (contest.warm * 2)[: contest.warmup_steps * SAMPLES_PER_STEP]
    Task(
        stage=contest.stage,
        model=str(contest.world.whole(contest.stage)),
        images=str(contest.world.images),
        records=[records[name] | {"tokens": contest.tokens[name]} for name in (*warm, *sorted(contest.timed))],
        timed=len(contest.timed),
        samples_per_micro_batch=SAMPLES_PER_ROW,
        micro_batches=ROWS_PER_STEP // ranks,
        learning_rate=LEARNING_RATE,
        progress=str(progress),
        counts=str(counts),
        grouped=peer.grouped,
    ).save(path)
    command = [sys.executable, "-W", "ignore", str(HERE / peer.script), str(path)]
    first, last = contest.warmup_steps, contest.warmup_steps + contest.steps
    commands = [(command, environment() | more) for more in _ranks(ranks)]
    span = watch(commands, progress=progress, first=first, last=last, log=folder / f"{system}.log")
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


def _ranks(ranks: int) -> list[dict[str, str]]:
    """What torchrun would tell each rank."""
    if ranks == 1:
        return [{}]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    common = {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    return [{**common, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)]
