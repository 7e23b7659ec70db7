"""Throughput in operations: what a step amounts to (``mmit.models.flops``), and which share of the devices it reaches.

The share is MFU, model FLOPs utilisation (PaLM, arXiv 2204.02311, appendix B). It is told against what the devices
of the run reach in a matrix product here and now, all at once, and not against a data sheet.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn

from mmit.distributed import all_reduce_sum, barrier, logger
from mmit.models.flops import LanguageModelShape, shape_of, tower_flops
from mmit.train.engine import device

if TYPE_CHECKING:
    from mmit.models import VisionLanguageModel
    from mmit.train.counts import Counts

REPEATS = 5


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a step amounts to.

    tile: operations of the tower for one tile, forward and backward. peak: operations per second that all devices
    together reach.
    """

    shape: LanguageModelShape
    tile: int
    peak: float

    def flops(self, counts: Counts) -> int:
        """Operations of a step over all ranks."""
        language = self.shape.flops(tokens=counts.tokens, squares=counts.squares, labels=counts.trained_tokens)
        return language + self.tile * counts.images

    def mfu(self, counts: Counts, seconds: float) -> float:
        """The share of ``peak`` that a step of so many seconds reaches."""
        return self.flops(counts) / seconds / self.peak


def is_measured(asked: bool | str) -> bool:
    """Whether ``log.mfu`` asks for it here."""
    return device().type == "cuda" if asked == "auto" else bool(asked)


def work_of(model: VisionLanguageModel) -> Callable[[], Work] | None:
    """Counts what a tile costs, before the engine takes the model; None, with a line in the log, where that fails.

    The result is called when the model knows what trains; it measures the devices, and is collective.
    """
    tower = model.vision_tower
    try:
        forward = 0 if not any(True for _ in tower.parameters()) else tower_flops(tower, model.spec)
    except (NotImplementedError, RuntimeError) as error:
        first = " ".join(str(error).split())[:200]
        logger.warning("no MFU is told: the work of the vision tower cannot be counted without data (%s)", first)
        return None

    def measured() -> Work:
        weight = next(model.language_model.parameters())
        dtype = weight.dtype if weight.is_floating_point() else torch.bfloat16
        work = Work(shape=shape_of(model.language_model), tile=forward * (3 if _trains(tower) else 1), peak=peak(dtype))
        logger.info("the devices reach %.3g TFLOP/s in a matrix product of %s", work.peak / 1e12, dtype)
        return work

    return measured


def peak(dtype: torch.dtype) -> float:
    """Operations per second that the devices of all ranks reach together in a square matrix product; collective."""
    where = device()
    size = 8192 if where.type == "cuda" else 768
    generator = torch.Generator(device=where).manual_seed(0)  # a matrix of zeros would draw less power than a real one
    left = torch.randn(size, size, device=where, generator=generator).to(dtype)
    right = left.T.contiguous()
    barrier()
    seconds = min(_seconds(lambda: left @ right, where) for _ in range(REPEATS))
    own = torch.tensor([2 * size**3 / seconds], dtype=torch.float64, device=where)
    return float(all_reduce_sum(own))


def _seconds(action: Callable[[], object], where: torch.device) -> float:
    if where.type == "cuda":
        torch.cuda.synchronize(where)
    started = time.perf_counter()
    action()
    if where.type == "cuda":
        torch.cuda.synchronize(where)
    return time.perf_counter() - started


def _trains(module: nn.Module) -> bool:
    return any(parameter.requires_grad for parameter in module.parameters())
