"""How much of each data set a stage draws: subsets that nest, caps, and whole numbers from weights.

All choices are made by hash ranks, so a random 1 % lies within the random 6 % of the same data set and seed, and none
depends on the tokenizer or on what else is in the mixture.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from mmit.config import SUBSET
from mmit.data.order import hashes, key
from mmit.errors import DataError


@dataclass(frozen=True, kw_only=True)
class Choice:
    """Which samples of a data set take part.

    subset: ``all``, or as in ``config.SUBSET``; ``first`` and ``last`` go by the order of the shards.
    per_task: at most so many of each task, 0 for all. limit: at most so many in all, 0 for all. Applied in this order,
    the last two at random.
    """

    subset: str = "all"
    per_task: int = 0
    limit: int = 0


def choose(name: str, count: int, choice: Choice, *, seed: int, tasks: np.ndarray | None = None) -> np.ndarray | None:
    """The numbers of the samples that take part, ascending, uint32; None for all ``count`` of them.

    tasks: the task of every sample as an integer, needed for ``per_task``. Raises DataError for a subset of more
    samples than there are.
    """
    if choice == Choice():
        return None
    rank = hashes(count, key(seed, "subset", name))
    chosen = _subset(name, count, choice.subset, rank)
    if choice.per_task:
        assert tasks is not None, "per_task needs the task of every sample"
        chosen = _per_task(chosen, tasks[chosen], rank[chosen], choice.per_task)
    if choice.limit and choice.limit < len(chosen):
        chosen = chosen[_lowest(rank[chosen], choice.limit)]
    return np.sort(chosen).astype(np.uint32)


def usable(tokens: np.ndarray, chosen: np.ndarray | None) -> np.ndarray | None:
    """Of the chosen samples those that are not left out (0 tokens), so that as many are drawn as are asked for.

    Raises DataError where none is left.
    """
    if chosen is None:
        return None if tokens.all() else np.flatnonzero(tokens).astype(np.uint32)
    return chosen[tokens[chosen] > 0]


def draws_per_epoch(count: int, *, epochs: float = 1.0, samples: int | None = None) -> int:
    """Samples that a source of ``count`` contributes to an epoch: ``samples``, or ``epochs`` of all (at least one)."""
    return samples if samples is not None else max(1, round(epochs * count))


def draws_by_weight(weights: Sequence[float], total: int) -> list[int]:
    """``total`` draws shared out by weight: whole numbers, of that sum (largest remainders, the first on a tie)."""
    exact = [Fraction(weight) for weight in weights]
    quotas = [total * weight / sum(exact) for weight in exact]
    draws = [math.floor(quota) for quota in quotas]
    by_remainder = sorted(range(len(quotas)), key=lambda n: (draws[n] - quotas[n], n))
    for number in by_remainder[: total - sum(draws)]:
        draws[number] += 1
    return draws


def draws_by_root(counts: Sequence[int], total: int) -> list[int]:
    """``total`` draws, from each source by the square root of its size (InstructBLIP, arXiv 2305.06500)."""
    return draws_by_weight([math.sqrt(count) for count in counts], total)


def _subset(name: str, count: int, subset: str, rank: np.ndarray) -> np.ndarray:
    if subset == "all":
        return np.arange(count)
    match = SUBSET.fullmatch(subset)
    assert match, f"'{subset}' is no subset; the schema checks it"
    end, size = match[1], match[2]
    wanted = max(1, int(Fraction(size[:-1]) * count / 100 + Fraction(1, 2))) if size.endswith("%") else int(size)
    if wanted > count:
        raise DataError(f"{name}: subset '{subset}' asks for {wanted} samples and there are {count}; lower it")
    if end == "first":
        return np.arange(wanted)
    if end == "last":
        return np.arange(count - wanted, count)
    return _lowest(rank, wanted)


def _lowest(rank: np.ndarray, wanted: int) -> np.ndarray:
    """The places of the ``wanted`` lowest ranks."""
    return np.argsort(rank, kind="stable")[:wanted]


def _per_task(chosen: np.ndarray, tasks: np.ndarray, rank: np.ndarray, most: int) -> np.ndarray:
    """Of each task the ``most`` samples of lowest rank."""
    order = np.lexsort((rank, tasks))
    tasks = tasks[order]
    new_task = np.concatenate([[True], tasks[1:] != tasks[:-1]])
    within = np.arange(len(tasks)) - np.flatnonzero(new_task)[np.cumsum(new_task) - 1]
    return chosen[order[within < most]]
