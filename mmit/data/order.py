"""Orders that never change: arithmetic on 64-bit integers, so no version of NumPy or torch can shift them."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np

WINDOW = 8
"""Shards of a set behind a URL that are read at a time: a cache of twice as many fetches each about once an epoch."""
CHUNK = 1 << 20

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_1 = np.uint64(0xBF58476D1CE4E5B9)
_MIX_2 = np.uint64(0x94D049BB133111EB)


def splitmix64(values: np.ndarray) -> np.ndarray:
    """A well-mixed 64-bit number for each uint64 (Steele, Lea, Flood 2014, the finalizer of SplittableRandom)."""
    with np.errstate(over="ignore"):
        mixed = values + _GOLDEN
        mixed = (mixed ^ (mixed >> np.uint64(30))) * _MIX_1
        mixed = (mixed ^ (mixed >> np.uint64(27))) * _MIX_2
        return mixed ^ (mixed >> np.uint64(31))


def key(*parts: int | str) -> np.uint64:
    """A 64-bit number from what a stream of numbers is for, such as ``key(seed, "order", source, epoch)``."""
    text = "/".join(str(part) for part in parts)
    return np.uint64(int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little"))


def hashes(count: int, stream: np.uint64) -> np.ndarray:
    """``count`` random-looking uint64 of a stream; the first n do not depend on ``count``."""
    found = np.empty(count, dtype=np.uint64)
    for first in range(0, count, CHUNK):  # no temporary as large as the result
        numbers = np.arange(first, min(count, first + CHUNK), dtype=np.uint64)
        found[first : first + CHUNK] = splitmix64(numbers ^ stream)
    return found


def permutation(count: int, stream: np.uint64) -> np.ndarray:
    """The numbers 0 .. count - 1 in the order of a stream, uint32.

    Hash and number share one integer, which is sorted in place: half the memory of an argsort, and the same for ever.
    """
    assert count < 1 << 32, "more than 4 billion samples"
    mask = np.uint64((1 << count.bit_length()) - 1)
    values = hashes(count, stream)
    values &= ~mask
    for first in range(0, count, CHUNK):
        values[first : first + CHUNK] |= np.arange(first, min(count, first + CHUNK), dtype=np.uint64)
    values.sort()
    values &= mask
    return values.astype(np.uint32)


def windowed(blocks: Sequence[int], stream: np.uint64, *, window: int) -> np.ndarray:
    """The numbers 0 .. sum(blocks) - 1, int64: blocks in a stream's order, mixed within ``window`` of them.

    A reader that keeps ``window`` blocks reads each of them about once.
    """
    starts = np.cumsum([0, *blocks])
    order = permutation(len(blocks), stream)
    mix = hashes(int(starts[-1]), key("mix", int(stream)))
    parts = [
        np.concatenate([np.arange(starts[block], starts[block + 1]) for block in order[first : first + window]])
        for first in range(0, len(order), window)
    ]
    return np.concatenate([part[np.argsort(mix[part], kind="stable")] for part in parts or [np.zeros(0, np.int64)]])


def draws_of_epoch(
    count: int, draws: int, epoch: int, *, seed: int, source: int, blocks: Sequence[int] = ()
) -> np.ndarray:
    """Which of ``count`` samples a source contributes in one epoch, in order: (draws,) uint32.

    The draws of successive epochs walk through one permutation after another, so over any number of epochs no sample
    is seen twice more often than another.
    blocks: where given, samples are mixed within WINDOW of them only, as ``windowed`` does.
    """
    first = epoch * draws
    parts = []
    taken = 0
    while taken < draws:
        turn, at = divmod(first + taken, count)
        stream = key(seed, "order", source, turn)
        whole = windowed(blocks, stream, window=WINDOW).astype(np.uint32) if blocks else permutation(count, stream)
        part = whole[at : at + draws - taken]
        parts.append(part)
        taken += len(part)
    return np.concatenate(parts) if parts else np.zeros(0, dtype=np.uint32)


def interleaved(draws: Sequence[int], epoch: int, *, seed: int) -> np.ndarray:
    """Which source each draw of an epoch comes from, every source spread evenly: (sum of draws,) uint16.

    Draw k of d stands at (k + u) / d with u from 0 to 1, so the share of a source in any stretch is right within a
    sample or two.
    """
    if len(draws) == 1:
        return np.zeros(draws[0], dtype=np.uint16)
    times, sources = [], []
    for source, count in enumerate(draws):
        jitter = (hashes(count, key(seed, "mix", source, epoch)) >> np.uint64(11)).astype(np.float64) * 2.0**-53
        times.append((np.arange(count) + jitter) / max(count, 1))
        sources.append(np.full(count, source, dtype=np.uint16))
    return np.concatenate(sources)[np.argsort(np.concatenate(times), kind="stable")]
