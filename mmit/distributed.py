"""Who am I among the ranks: the launcher's environment, a few collectives, logging on rank 0.

Needs no initialised process group: alone, rank is 0, world is 1, and a collective gives its input back.
"""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from mmit.errors import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

logger = logging.getLogger("mmit")
T = TypeVar("T")


def _from_launcher(name: str, default: int) -> int:
    value = os.environ.get(name)
    if value is None:
        return default
    if not value.isdigit():
        raise ConfigError(
            f"the environment variable {name}={value!r} is not a number; launch with `mmit train` or `deepspeed`"
        )
    return int(value)


def rank() -> int:
    """Number of this process among all, 0-based."""
    return _from_launcher("RANK", 0)


def local_rank() -> int:
    """Number of this process on its host, 0-based."""
    return _from_launcher("LOCAL_RANK", 0)


def world_size() -> int:
    """Number of processes of the run."""
    return _from_launcher("WORLD_SIZE", 1)


@dataclass(frozen=True)
class Readers:
    """Who reads rows: every ``sequence`` consecutive ranks read the same ones, as one reader."""

    sequence: int = 1

    @property
    def count(self) -> int:
        """Readers of the run."""
        return world_size() // self.sequence

    @property
    def number(self) -> int:
        """That of this rank, 0-based."""
        return rank() // self.sequence

    @property
    def speaks(self) -> bool:
        """Whether this rank tells what its reader read, so that it is counted once."""
        return rank() % self.sequence == 0


def is_launched() -> bool:
    """True where a launcher (``mmit train``, ``deepspeed``, ``torchrun``) started this process as a rank."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def barrier() -> None:
    """Wait until every rank is here."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.barrier()


def all_reduce_sum(values: Tensor) -> Tensor:
    """The sum of ``values`` over all ranks, in place where there are several."""
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(values)
    return values


def gathered(value: T) -> list[T]:
    """What every rank gives, by rank; collective. For small things: it is pickled among the ranks."""
    import torch.distributed as dist

    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    said: list[T] = [value] * dist.get_world_size()
    dist.all_gather_object(said, value)
    return said


def ranks_that_differ(value: str) -> dict[int, str]:
    """What the other ranks say where it is not what rank 0 says: rank -> its value; collective."""
    said = gathered(value)
    return {number: other for number, other in enumerate(said) if other != said[0]}


def is_lost_connection(error: RuntimeError) -> bool:
    """True for what torch raises in a collective where another process of it is gone."""
    import torch.distributed as dist

    text = str(error)
    broken = "closed by peer" in text or "reset by peer" in text or "Broken pipe" in text
    return isinstance(error, dist.DistNetworkError) or ("gloo" in text and broken)


class _RankZero(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return rank() == 0 or record.levelno >= logging.ERROR


def set_up_logging(level: int = logging.INFO) -> None:
    """Send mmit's log to standard error: rank 0 all of it, the other ranks errors only."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    handler.addFilter(_RankZero())
    logger.handlers = [handler]
    logger.setLevel(level)
    logger.propagate = False
