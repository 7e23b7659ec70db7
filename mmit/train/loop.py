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

from mmit.distributed import all_reduce_sum, logger, rank, world_size
from mmit.errors import TrainingError
from mmit.train.engine import Engine, device, peak_memory
from mmit.train.metrics import Recorder, StepRecord
from mmit.train.optim import LearningRate
from mmit.train.watchdog import COMPUTING, READING, SAVING, WAITING, Watchdog

if TYPE_CHECKING:
    from mmit.data import Loader, StepBatches
    from mmit.train.skipped import SkippedRecord


_DIGESTS = 2**48


class StopRequest:
    """Notes SIGTERM and Ctrl-C; the loop looks at it between steps."""

    def __init__(self) -> None:
        self.asked = False
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._note)

    def _note(self, number: int, frame: FrameType | None) -> None:
        del frame
        if not self.asked and rank() == 0:
            logger.info("%s: saving after this step", signal.Signals(number).name)
        self.asked = True


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Integers of one step, summed over all ranks. skipped_of: for each source of the plan."""

    trained_tokens: int
    tokens: int
    images: int
    samples: int
    skipped: int
    digest: int
    stops: int
    skipped_of: tuple[int, ...]

    @classmethod
    def of(cls, step: StepBatches, *, stop: bool, sources: int) -> Counts:
        """The sums over all ranks; collective. sources: of the plan."""
        digest = sum(_hash(name) for batch in step.batches for name in batch.sample_ids) % _DIGESTS
        local = [
            sum(batch.trained_tokens for batch in step.batches),
            sum(batch.tokens for batch in step.batches),
            sum(batch.tiles for batch in step.batches),
            sum(len(batch.sample_ids) for batch in step.batches),
            len(step.skipped),
            digest,
            int(stop),
            *(sum(of == source for of, _ in step.skipped) for source in range(sources)),
        ]
        # equal on all ranks if, and only if, the mean of the squares is the square of the mean
        same = [step.step, len(step.batches)]
        squares = [value * value for value in same]
        sent = torch.tensor([*local, *same, *squares], dtype=torch.int64, device=device())
        *total, steps, batches, steps_squared, batches_squared = all_reduce_sum(sent).tolist()
        ranks = world_size()
        if ranks * steps_squared != steps * steps or ranks * batches_squared != batches * batches:
            raise TrainingError(
                f"the ranks disagree: rank {rank()} is at step {step.step + 1} with {len(step.batches)} micro-batches, "
                f"on average they are at step {steps / ranks + 1:g} with {batches / ranks:g}; "
                "they must read the same data with the same version of mmit"
            )
        sums = dict(zip(cls.__dataclass_fields__, total[: len(local) - sources], strict=False))
        sums["digest"] %= _DIGESTS  # however many ranks the samples were dealt to
        return cls(**sums, skipped_of=tuple(total[len(local) - sources :]))


def _hash(sample_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(sample_id.encode(), digest_size=6).digest(), "big")


def train_steps(
    loader: Loader,
    engine: Engine,
    schedule: LearningRate,
    recorder: Recorder | None,
    skipped: SkippedRecord,
    *,
    stop: StopRequest,
    watchdog: Watchdog,
    seed: int,
    after_step: Callable[[int, Counts], None],
) -> bool:
    """Train on every step of ``loader``; True when the plan is done, False when it was asked to stop.

    after_step: called after each step with the number of steps done and what it held.
    Raises TrainingError for a step without a trained token and for a loss or gradient that is not finite.
    """
    for step, wait in _timed(iter(loader), watchdog, loader.start_step):
        started = time.perf_counter() - wait
        watchdog.mark(WAITING, step=step.step + 1)
        counts = Counts.of(step, stop=stop.asked, sources=len(loader.plan.sources))
        if counts.stops:
            return False
        skipped.note(step.skipped, counts.skipped_of, step=step.step + 1)
        if counts.trained_tokens == 0:
            raise TrainingError(
                f"step {step.step + 1} has no trained token on any rank: {counts.samples} samples, "
                f"{counts.skipped} skipped; "
                "see the skipped records in the log, and the labels with `mmit data show`"
            )
        torch.manual_seed(_step_seed(seed, step.step))
        factor = schedule.factor(step.step)
        names = loader.plan.names if loader.by_source else ()
        loss, norm, by_source = _optimizer_step(
            step, engine, counts.trained_tokens, factor, sources=names, watchdog=watchdog
        )
        if recorder is not None:
            recorder.add(
                StepRecord(
                    step=step.step + 1,
                    loss=loss,
                    lr={group["name"]: group["lr"] for group in engine.optimizer.param_groups},
                    grad_norm=norm,
                    tokens=counts.tokens,
                    trained_tokens=counts.trained_tokens,
                    images=counts.images,
                    samples=counts.samples,
                    skipped=counts.skipped,
                    skipped_in_all=sum(skipped.totals.values()),
                    samples_digest=counts.digest,
                    seconds=time.perf_counter() - started,
                    wait_seconds=wait,
                    memory_bytes=peak_memory(),
                    loss_by_source=by_source,
                )
            )
        watchdog.mark(SAVING, step=step.step + 1)
        after_step(step.step + 1, counts)
    skipped.announce()
    return True


def _optimizer_step(
    step: StepBatches, engine: Engine, trained_tokens: int, factor: float, *, sources: Sequence[str], watchdog: Watchdog
) -> tuple[float, float, dict[str, float]]:
    """Loss (mean over all trained tokens of all ranks), gradient norm, and the loss of each of ``sources``."""
    # the sum of -log p of all, then of each source, then the trained tokens of each source: one message for all
    sums = torch.zeros(1 + 2 * len(sources), dtype=torch.float64, device=device())
    loss = norm = math.nan
    by_source: dict[str, float] = {}
    for number, batch in enumerate(step.batches, start=1):
        watchdog.mark(COMPUTING, step=step.step + 1, samples=batch.sample_ids)
        here = batch.to(device())
        sums[0] += engine.micro_step(here, trained_tokens=trained_tokens).double()
        if here.by_source is not None:
            sums[1 : 1 + len(sources)] += here.by_source.nll
            sums[1 + len(sources) :] += torch.tensor(here.by_source.trained_tokens, device=device())
        if number == len(step.batches):
            total, *parts = all_reduce_sum(sums).tolist()
            loss = total / trained_tokens
            pairs = zip(sources, parts[: len(sources)], parts[len(sources) :], strict=True)
            by_source = {name: nll / tokens for name, nll, tokens in pairs if tokens}
            # before the update, so that the weights stay those of the last good step
            _check_finite(loss, step, "loss")
        done = engine.close_micro_step(factor=factor)
        norm = norm if done is None else done
    _check_finite(norm, step, "gradient norm")
    return loss, norm, by_source


def _check_finite(value: float, step: StepBatches, what: str) -> None:
    if math.isfinite(value):
        return
    ids = [name for batch in step.batches for name in batch.sample_ids]
    raise TrainingError(
        f"the {what} of step {step.step + 1} is {value}; the last checkpoint is intact. "
        f"Samples of this rank: {', '.join(ids[:8])}{' ...' if len(ids) > 8 else ''}. "
        "Lower the learning rate, or look at these samples with `mmit data show`"
    )


def _step_seed(seed: int, step: int) -> int:
    text = f"{seed}/{step}/{rank()}".encode()
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
