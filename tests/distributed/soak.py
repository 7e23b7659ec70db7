"""Interrupt a run again and again, and hold its end to that of a run that nobody touched: ``make soak``.

    PYTHONPATH=tests python tests/distributed/soak.py --interruptions 50 --seed 0

Half of the interruptions hit a run on one rank in fp32, whose weights must be equal in every bit; the other half hit
one that changes its ranks, its ZeRO stage and its micro-batches each time it goes on, whose weights must be within
TOLERANCE.
Everything lies on a disk in memory that can be filled; one line is printed for each interruption, then the verdict.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import psutil
import torch
from interruptions import KINDS, Kind, Run, complete, last_step, wait_until
from runs import command, environment, make_run, metrics, rank_processes
from safetensors.torch import load_file

STAGE = "align"
STEPS_EACH = 30
"""Steps of the plan for each interruption: so many that it does not end before the last of them."""
DISK = "256m"
TOLERANCE = 1e-3
"""Largest difference of a weight where the order of sums changed, after some hundred steps in fp32."""
SAME = ("step", "lr", "samples_digest", "samples", "tokens", "trained_tokens", "images", "skipped_in_all")


def main() -> int:
    """Run the soak on disks of its own; the exit code is 0 where all held."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--interruptions", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    if "MMIT_SOAK_DISK" not in os.environ:
        return _both()
    disk, part = Path(os.environ["MMIT_SOAK_DISK"]), os.environ["MMIT_SOAK_PART"]
    with tempfile.TemporaryDirectory(prefix="mmit-soak-logs-") as logs:
        soak = Soak(disk, Path(logs), random.Random(f"{asked.seed} {part}"))
        if part == "one-rank":
            soak.interrupt_one_rank(asked.interruptions - asked.interruptions // 2)
        else:
            soak.interrupt_many(asked.interruptions // 2)
    for fault in soak.faults:
        print(f"WRONG: {fault}")
    print(f"{part}: {soak.done} interruptions, {len(soak.faults)} faults (seed {asked.seed})", flush=True)
    return int(bool(soak.faults))


def _both() -> int:
    """Both halves at the same time, each in a mount namespace of its own."""
    with ExitStack() as disks:
        halves = []
        for part in ("one-rank", "elastic"):
            disk = disks.enter_context(tempfile.TemporaryDirectory(prefix="mmit-soak-"))
            mount = f'mount -t tmpfs -o size={DISK} tmpfs "$MMIT_SOAK_DISK" && exec "$@"'
            words = ["unshare", "-rm", "bash", "-c", mount, "soak", sys.executable, *sys.argv]
            own = {"MMIT_SOAK_DISK": disk, "MMIT_SOAK_PART": part}
            halves.append(subprocess.Popen(words, env={**os.environ, **own}))
        return max([half.wait() for half in halves], key=abs)


class Soak:
    """The runs of one soak on one disk. done: interruptions so far; faults: what was not as it must be."""

    def __init__(self, disk: Path, logs: Path, dice: random.Random) -> None:
        self.done = 0
        self.faults: list[str] = []
        self._disk, self._logs, self._dice = disk, logs, dice
        self._run_file = make_run(disk / "world")

    def interrupt_one_rank(self, count: int) -> None:
        """A run on one rank against itself: the same bits."""
        self._compare("one-rank", count, [["--ranks", "1"]], tolerance=0.0)

    def interrupt_many(self, count: int) -> None:
        """A run that goes on with something else each time: the same samples, nearly the same weights."""
        ways = [
            ["--ranks", ranks, f"stages.{STAGE}.zero.stage={zero}", f"stages.{STAGE}.batch.rows_per_micro_batch={rows}"]
            for ranks in ("1", "2")
            for zero in (0, 1, 2, 3)
            for rows in (1, 2)
        ]
        self._compare("elastic", count, ways, tolerance=TOLERANCE)

    def _compare(self, name: str, count: int, ways: Sequence[Sequence[str]], *, tolerance: float) -> None:
        steps = max(1, count) * STEPS_EACH
        changes = [f"stages.{STAGE}.max_steps={steps}", f"stages.{STAGE}.epochs={steps}"]
        changes += [f"stages.{STAGE}.save.every_steps=10", f"stages.{STAGE}.log.every_steps=100"]
        words = ["train", str(self._run_file), "--stage", STAGE, *changes]
        whole, pieced = (self._disk / name / side for side in ("whole", "pieced"))
        self._to_the_end([*words, "--ranks", "1", f"output={whole}"], whole / STAGE)
        print(f"{name}: a run of {steps} steps that nobody touched is done", flush=True)
        words += [f"output={pieced}"]
        kinds: list[str] = []
        for _ in range(count):
            kinds = kinds or self._dice.sample(sorted(KINDS), len(KINDS))
            self._interrupt(kinds.pop(), [*words, *self._dice.choice(ways)], pieced / STAGE, name)
        self._to_the_end([*words, *self._dice.choice(ways)], pieced / STAGE)
        self._hold(whole / STAGE, pieced / STAGE, name, steps=steps, tolerance=tolerance)

    def _to_the_end(self, words: Sequence[str], folder: Path) -> None:
        with self._started(words) as (run, log):
            code = run.wait(timeout=1800)
        if code:
            raise SystemExit(f"the run did not end: {log.read_text()[-3000:]}")
        assert (folder / "model").is_dir()

    @contextmanager
    def _started(self, words: Sequence[str]) -> "Generator[tuple[subprocess.Popen[bytes], Path]]":
        log = self._logs / f"{self.done}.log"
        with log.open("wb") as file:
            started = subprocess.Popen(command(*words), env=environment(), stdout=file, stderr=subprocess.STDOUT)
            try:
                yield started, log
            finally:
                started.kill()
                started.wait()

    def _interrupt(self, name: str, words: Sequence[str], folder: Path, title: str) -> None:
        kind = KINDS[name]
        found = complete(folder)
        begins = time.monotonic()
        with self._started(words) as (launcher, log):
            run = Run(launcher=launcher, folder=folder, disk=self._disk, dice=self._dice)
            code = self._bring_down(run, kind)
        if kind.mends is not None:
            kind.mends(run)
        self.done += 1
        text = log.read_text(errors="replace")
        for fault in _faults(kind, code, text, found):
            self.faults.append(f"{title}, {self.done} {name}: {fault}")
            print(f"   {fault}\n{text[-3000:]}", flush=True)
        now = [path.name for path in complete(folder)]
        print(
            f"{title} {self.done:3d}  {name:36s} exit {code:3d}  step {last_step(folder):5d}  "
            f"checkpoints {', '.join(now) or 'none'}  {time.monotonic() - begins:.1f} s",
            flush=True,
        )

    def _bring_down(self, run: Run, kind: Kind) -> int:
        """Interrupt a run when its time has come; its exit code, once no process of it is left."""
        wait_until(lambda: bool(rank_processes(run.launcher)), run.launcher)
        if kind.at_start:
            time.sleep(self._dice.uniform(0.0, 12.0))
        else:
            reached = [last_step(run.folder), *(int(path.name[5:]) for path in complete(run.folder))]
            target = max(reached) + self._dice.randint(1, 20)
            wait_until(lambda: last_step(run.folder) >= target, run.launcher)
        left = run.ranks() if run.launcher.poll() is None else []
        left += [child for rank in left for child in _children(rank)]
        if run.launcher.poll() is None:
            kind.act(run)
        code = run.launcher.wait(timeout=90)
        _, alive = psutil.wait_procs(left, timeout=60)
        if alive:
            self.faults.append(f"{self.done + 1}: processes {[process.pid for process in alive]} are left behind")
        return code

    def _hold(self, whole: Path, pieced: Path, name: str, *, steps: int, tolerance: float) -> None:
        wanted, seen = metrics(whole), metrics(pieced)
        if [line["step"] for line in seen] != list(range(1, steps + 1)):
            self.faults.append(f"{name}: metrics.jsonl does not tell every step once")
        if [{key: line[key] for key in SAME} for line in seen] != [{key: line[key] for key in SAME} for line in wanted]:
            self.faults.append(f"{name}: a step had other samples or another learning rate")
        loss = max(abs(one["loss"] - two["loss"]) for one, two in zip(seen, wanted, strict=False))
        ours, theirs = (load_file(path / "model" / "model.safetensors") for path in (pieced, whole))
        off = max(float((ours[key] - theirs[key]).abs().max()) for key in theirs)
        same_bits = ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
        if ours.keys() != theirs.keys() or off > tolerance or (tolerance == 0.0 and not same_bits):
            self.faults.append(f"{name}: weights differ by {off:.1e}")
        samples = [sum(line["samples"] for line in lines) for lines in (seen, wanted)]
        print(
            f"{name}: {steps} steps with {samples[0]} samples, {samples[1]} in the run that nobody touched; "
            f"losses differ by at most {loss:.1e}, weights by {off:.1e}",
            flush=True,
        )


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def _faults(kind: Kind, code: int, text: str, found: Sequence[Path]) -> Iterator[str]:
    """What is wrong with how a run went on from ``found``, the complete checkpoints before it, and ended."""
    if code not in kind.codes:
        yield f"ended with {code}, not {kind.codes}"
    if kind.says and not any(sentence in text for sentence in kind.says):
        yield f"none of {kind.says} is said"
    if "Traceback" in text and -9 not in kind.codes:  # readers whose rank is gone may say so to nobody
        yield "a traceback is shown"
    went_on = [line.split("continues from ")[1] for line in text.splitlines() if line.startswith("continues from ")]
    damaged = sum("and the checkpoint before it is taken" in line for line in text.splitlines())
    if went_on and (not found or went_on != [str(found[-1 - damaged])]):
        yield f"went on from {went_on}, not from the newest of {[path.name for path in found]}"
    if found and not went_on and not kind.at_start:
        yield "did not say from where it went on"


if __name__ == "__main__":
    sys.exit(main())
