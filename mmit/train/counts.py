"""The integers of one step, summed over all ranks in one message before the first backward pass."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mmit.distributed import Readers, all_reduce_sum, rank, world_size
from mmit.errors import TrainingError
from mmit.train.engine import device

if TYPE_CHECKING:
    from mmit.data import StepBatches

_DIGESTS = 2**48


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Integers of one step, summed over all ranks.

    squares: of the lengths of the samples. skipped_of: for each source of the plan.
    """

    trained_tokens: int
    tokens: int
    images: int
    squares: int
    samples: int
    skipped: int
    digest: int
    stops: int
    skipped_of: tuple[int, ...]

    @classmethod
    def of(cls, step: StepBatches, *, stop: bool, sources: int, readers: Readers) -> Counts:
        """The sums over all ranks, each row once; collective. sources: of the plan. readers: who reads it."""
        digest = sum(_hash(name) for batch in step.batches for name in batch.sample_ids) % _DIGESTS
        batches, holes = (step.batches, step.skipped) if readers.speaks else ([], [])
        local = [
            sum(batch.trained_tokens for batch in batches),
            sum(batch.tokens for batch in batches),
            sum(batch.tiles for batch in batches),
            sum(batch.squares for batch in batches),
            sum(len(batch.sample_ids) for batch in batches),
            len(holes),
            digest if readers.speaks else 0,
            int(stop),
            *(sum(of == source for of, _ in holes) for source in range(sources)),
        ]
        # equal on all ranks if, and only if, the mean of the squares is the square of the mean
        same = [step.step, len(step.batches)]
        squares = [value * value for value in same]
        sent = torch.tensor([*local, digest, *same, *squares], dtype=torch.int64, device=device())
        *total, everywhere, steps, cuts, steps_squared, cuts_squared = all_reduce_sum(sent).tolist()
        ranks = world_size()
        if ranks * steps_squared != steps * steps or ranks * cuts_squared != cuts * cuts:
            raise TrainingError(
                f"the ranks disagree: rank {rank()} is at step {step.step + 1} with {len(step.batches)} micro-batches, "
                f"on average they are at step {steps / ranks + 1:g} with {cuts / ranks:g}; "
                "they must read the same data with the same version of mmit"
            )
        sums = dict(zip(cls.__dataclass_fields__, total[: len(local) - sources], strict=False))
        if (everywhere - readers.sequence * sums["digest"]) % _DIGESTS:
            raise TrainingError(
                f"ranks that share their rows (parallel.sequence: {readers.sequence}) read other samples in step "
                f"{step.step + 1}; see the skipped records in the log"
            )
        sums["digest"] %= _DIGESTS  # however many ranks the samples were dealt to
        return cls(**sums, skipped_of=tuple(total[len(local) - sources :]))


def _hash(sample_id: str) -> int:
    return int.from_bytes(hashlib.blake2b(sample_id.encode(), digest_size=6).digest(), "big")
