"""The loop: one optimizer step after another, until the plan ends or somebody asks to stop.

A step starts with one all-reduce of a few integers (trained tokens, samples, the wish to stop): the exact mean needs
the first before any backward pass, and all ranks must agree on the last.
"""

from __future__ import annotations

import hashlib
import math
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from types import FrameType
from typing import TYPE_CHECKING

import torch

from mmit.distributed import Readers, all_reduce_sum, logger, rank, world_size
from mmit.errors import TrainingError
from mmit.train.counts import Counts
from mmit.train.engine import Engine, device, peak_memory
from mmit.train.insight import Insight
from mmit.train.metrics import Recorder
from mmit.train.optim import LearningRate
from mmit.train.records import StepRecord
from mmit.train.spikes import Part
from mmit.train.watchdog import COMPUTING, EVALUATING, READING, WAITING, Watchdog

if TYPE_CHECKING:
    from mmit.data import Loader, StepBatches
    from mmit.train.skipped import SkippedRecord


class StopRequest:
    """Notes SIGTERM and Ctrl-C; the loop looks at it between steps."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def ask(self) -> None:
        """Stop after this step, as a signal would."""
        self.asked = True

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        if not self.asked and rank() == 0:
            logger.info("%s: stops when what is done so far is saved", signal.Signals(number).name)
        self.asked = True


def train_steps(
    loader: Loader,
    engine: Engine,
    schedule: LearningRate,
    recorder: Recorder | None,
    skipped: SkippedRecord,
    *,
    insight: Insight,
    stop: StopRequest,
    watchdog: Watchdog,
    seed: int,
    after_step: Callable[[int, Counts], None],
) -> bool:
    """Train on every step of ``loader``; True when the plan is done, False when it was asked to stop.

    after_step: called after each step with the number of steps done and what it held.
    Raises TrainingError for a step without a trained token, for a loss or gradient that is not finite, and for a spike
    where that ends the run.
    """
    readers = Readers(world_size() // loader.world)
    for step, wait in _timed(iter(loader), watchdog, loader.start_step):
        started = time.perf_counter() - wait
        watchdog.mark(WAITING, step=step.step + 1)
        counts = Counts.of(step, stop=stop.asked, sources=len(loader.plan.sources), readers=readers)
        if counts.stops:
            return False
        skipped.note(step.skipped if readers.speaks else (), counts.skipped_of, step=step.step + 1)
        if counts.trained_tokens == 0:
            raise TrainingError(
                f"step {step.step + 1} has no trained token on any rank: {counts.samples} samples, "
                f"{counts.skipped} skipped; "
                "see the skipped records in the log, and the labels with `mmit data show`"
            )
        torch.manual_seed(_step_seed(seed, step.step, readers))
        factor = schedule.factor(step.step)
        names = loader.plan.names if loader.by_source else ()
        done = _optimizer_step(
            step, engine, insight, counts.trained_tokens, factor, readers=readers, sources=names, watchdog=watchdog
        )
        seconds = time.perf_counter() - started
        if recorder is not None:
            recorder.add(
                StepRecord(
                    step=step.step + 1,
                    lr={group["name"]: group["lr"] for group in engine.optimizer.param_groups},
                    tokens=counts.tokens,
                    trained_tokens=counts.trained_tokens,
                    images=counts.images,
                    samples=counts.samples,
                    skipped=counts.skipped,
                    skipped_in_all=sum(skipped.totals.values()),
                    samples_digest=counts.digest,
                    seconds=seconds,
                    wait_seconds=wait,
                    memory_bytes=peak_memory(),
                    flops=insight.work.flops(counts) if insight.work else 0,
                    mfu=insight.work.mfu(counts, seconds) if insight.work else None,
                    loss=done.loss,
                    grad_norm=done.norm if math.isfinite(done.norm) else None,
                    loss_by_source=done.by_source,
                    loss_scale=None if engine.loss_scale is None else engine.loss_scale.scale,
                    left_out_in_all=None if engine.loss_scale is None else engine.loss_scale.left_out,
                    spike=done.spike,
                    update_ratio=done.ratios,
                )
            )
        watchdog.mark(EVALUATING, step=step.step + 1)
        after_step(step.step + 1, counts)
    skipped.announce()
    return True


@dataclass(frozen=True)
class _Done:
    """A step after its update: loss (mean over all trained tokens of all ranks), gradient norm, and what was seen."""

    loss: float
    norm: float
    by_source: dict[str, float]
    spike: str
    ratios: dict[str, float]


def _optimizer_step(
    step: StepBatches,
    engine: Engine,
    insight: Insight,
    trained_tokens: int,
    factor: float,
    *,
    readers: Readers,
    sources: Sequence[str],
    watchdog: Watchdog,
) -> _Done:
    # the sum of -log p of all, then of each source, then the trained tokens of each source: one message for all
    sums = torch.zeros(1 + 2 * len(sources), dtype=torch.float64, device=device())
    loss = norm = math.nan
    by_source: dict[str, float] = {}
    spike = ""
    parts: list[Part] = []
    for number, batch in enumerate(step.batches, start=1):
        watchdog.mark(COMPUTING, step=step.step + 1, samples=batch.sample_ids)
        here = batch.to(device())
        nll = engine.micro_step(here, trained_tokens=trained_tokens)
        sums[0] += nll.double()
        parts.append((nll, batch.trained_tokens, batch.sample_ids))
        if here.by_source is not None:
            sums[1 : 1 + len(sources)] += here.by_source.nll
            if readers.speaks:
                sums[1 + len(sources) :] += torch.tensor(here.by_source.trained_tokens, device=device())
        if number == len(step.batches):
            total, *shares = all_reduce_sum(sums).tolist()
            loss = total / trained_tokens
            pairs = zip(sources, shares[: len(sources)], shares[len(sources) :], strict=True)
            by_source = {name: nll / tokens for name, nll, tokens in pairs if tokens}
            # before the update, so that the weights stay those of the last good step
            _check_finite(loss, step, "loss")
            spike = insight.spikes.judge(loss, step=step.step + 1, batches=parts)
            insight.ratios.before(step.step + 1)
        done = engine.close_micro_step(factor=factor, update=spike != "skip")
        norm = norm if done is None else done
    if engine.loss_scale is None or math.isnan(norm):  # in fp16 a step that overflowed is left out, and counted
        _check_finite(norm, step, "gradient norm")
    return _Done(loss, norm, by_source, spike, insight.ratios.after())


def _check_finite(value: float, step: StepBatches, what: str) -> None:
    if math.isfinite(value):
        return
    ids = [name for batch in step.batches for name in batch.sample_ids]
    raise TrainingError(
        f"the {what} of step {step.step + 1} is {value}; the last checkpoint is intact. "
        f"Samples of this rank: {', '.join(ids[:8])}{' ...' if len(ids) > 8 else ''}. "
        "Lower the learning rate, or look at these samples with `mmit data show`"
    )


def _step_seed(seed: int, step: int, readers: Readers) -> int:
    text = f"{seed}/{step}/{readers.number}".encode()
    return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big")


def _timed(steps: Iterator[StepBatches], watchdog: Watchdog, start_step: int) -> Iterator[tuple[StepBatches, float]]:
    """Each step with the seconds that its data took to arrive."""
    for number in count(start_step + 1):
        watchdog.mark(READING, step=number)
        started = time.perf_counter()
        step = next(steps, None)
        if step is None:
            return
        yield step, time.perf_counter() - started
