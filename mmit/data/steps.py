"""Rows to steps, and the rows of a step to ranks, so that nobody waits: all decided in the plan, without a message.

A row costs its tokens and TILE_TOKENS for each of its tiles. Within windows of 16 steps rows are sorted by cost and
cut into steps, and the steps are shuffled, so that no size drifts over time. Within a step the costliest rows are dealt
first, one to each rank, and of every round the rank with the least load takes the costliest row.
"""

from __future__ import annotations

from typing import Literal

import numpy as np

from mmit.data.order import hashes, interleaved, key
from mmit.errors import DataError

STEPS_PER_WINDOW = 16

TILE_TOKENS = 32
"""What a tile costs in the encoder, in tokens of the language model: 6 N_tower P / 6 N_model where both train.

For CLIP-L at 336 pixels (0.3 G parameters, 577 patches) that is 25 beside a model of 7 G parameters, 115 beside one of
1.5 G, and a third of it where the tower is frozen. Rows of like length hold like numbers of tiles: little hangs on it.
"""

Batches = Literal["mixed", "pure", "paired"]
"""mixed: rows as they come; pure: a step holds rows of samples with images, or of text alone; paired: both, evenly."""

NO_ROW = -1


def row_cost(tokens: np.ndarray, tiles: np.ndarray) -> np.ndarray:
    """What rows cost, in tokens of the language model: int64."""
    return tokens.astype(np.int64) + TILE_TOKENS * tiles.astype(np.int64)


def arrange(
    cost: np.ndarray,
    text_only: np.ndarray,
    *,
    batches: Batches,
    text_share: float,
    rows_per_step: int,
    stream: np.uint64,
) -> np.ndarray:
    """The rows of every step, the costliest first: (steps, rows_per_step) int64, NO_ROW where a step has fewer.

    text_share: of ``paired``, the share of a step's rows that are text alone; the kind that ends first begins anew.
    0 takes the share that the rows have. Raises DataError where ``paired`` lacks a kind.
    """
    if batches == "mixed":
        return _cut(balanced_steps(cost, rows_per_step=rows_per_step, stream=stream), rows_per_step)
    kinds = [np.flatnonzero(~text_only), np.flatnonzero(text_only)]
    if batches == "pure":
        streams = [key("kind", kind, int(stream)) for kind in range(2)]
        steps = [
            _cut(rows[balanced_steps(cost[rows], rows_per_step=rows_per_step, stream=own)], rows_per_step)
            for rows, own in zip(kinds, streams, strict=True)
        ]
        kind_of = interleaved([len(own) for own in steps], 0, seed=int(stream))
        found = np.empty((len(kind_of), rows_per_step), dtype=np.int64)
        for kind, own in enumerate(steps):
            found[kind_of == kind] = own
        return found
    if not (len(kinds[0]) and len(kinds[1])) or rows_per_step == 1:
        raise DataError(
            f"batches: paired needs both kinds in every step: there are {len(kinds[0])} rows with images and "
            f"{len(kinds[1])} of text alone, for steps of {rows_per_step} rows; take mixed or pure"
        )
    found = _paired(cost, kinds, text_share, rows_per_step, stream)
    by_cost = np.argsort(np.where(found == NO_ROW, 1, -cost[found]), axis=1, kind="stable")
    return np.take_along_axis(found, by_cost, axis=1)


def balanced_steps(cost: np.ndarray, *, rows_per_step: int, stream: np.uint64) -> np.ndarray:
    """The order of rows in which each ``rows_per_step`` of them, a step, cost about the same: int64.

    Only the last step may have fewer rows.
    """
    count = len(cost)
    window = rows_per_step * STEPS_PER_WINDOW
    whole = count // window
    block = np.arange(whole * window).reshape(whole, window)
    by_cost = np.take_along_axis(
        block, np.argsort(-cost[: whole * window].reshape(whole, window), axis=1, kind="stable"), 1
    )
    steps = by_cost.reshape(whole, STEPS_PER_WINDOW, rows_per_step)
    draws = hashes((whole + 1) * STEPS_PER_WINDOW, stream)
    shuffle = np.argsort(draws[: whole * STEPS_PER_WINDOW].reshape(whole, STEPS_PER_WINDOW), axis=1, kind="stable")
    first = np.take_along_axis(steps, shuffle[:, :, None], axis=1).reshape(-1)

    rest = np.arange(whole * window, count)
    rest = rest[np.argsort(-cost[rest], kind="stable")]
    full = len(rest) // rows_per_step
    shuffle = np.argsort(draws[whole * STEPS_PER_WINDOW :][:full], kind="stable")
    last = rest[: full * rows_per_step].reshape(full, rows_per_step)[shuffle].reshape(-1)
    return np.concatenate([first, last, rest[full * rows_per_step :]])


def deal(cost: np.ndarray, world: int) -> np.ndarray:
    """Which row each of ``world`` ranks takes in each round: (steps, rounds, world) int64, NO_ROW for none.

    cost: (steps, rows), the costliest first, 0 for a row that is not there. A pure function, so that every rank knows
    what all ranks do. In each round the ranks take rows that follow each other in cost, the least loaded rank first:
    micro-batches meet micro-batches of their own size.
    """
    steps, rows = cost.shape
    rounds = -(-rows // world)
    load = np.zeros((steps, world), dtype=np.int64)
    found = np.full((steps, rounds, world), NO_ROW, dtype=np.int64)
    for number in range(rounds):
        part = np.arange(number * world, min(rows, (number + 1) * world))
        ranks = np.argsort(load, axis=1, kind="stable")[:, : len(part)]
        np.put_along_axis(found[:, number], ranks, np.broadcast_to(part, ranks.shape), axis=1)
        np.put_along_axis(load, ranks, np.take_along_axis(load, ranks, axis=1) + cost[:, part], axis=1)
    return found


def _cut(order: np.ndarray, rows_per_step: int) -> np.ndarray:
    steps = -(-len(order) // rows_per_step)
    found = np.full(steps * rows_per_step, NO_ROW, dtype=np.int64)
    found[: len(order)] = order
    return found.reshape(steps, rows_per_step)


def _paired(
    cost: np.ndarray, kinds: list[np.ndarray], text_share: float, rows_per_step: int, stream: np.uint64
) -> np.ndarray:
    """Steps of both kinds: with images first, then text alone."""
    counts = [len(rows) for rows in kinds]
    if text_share:
        text = min(max(round(text_share * rows_per_step), 1), rows_per_step - 1)
        widths = [rows_per_step - text, text]
        steps = max(-(-count // width) for count, width in zip(counts, widths, strict=True))
    else:
        widths = [max(1, rows_per_step * count // sum(counts)) for count in counts]
        steps = -(-sum(counts) // rows_per_step)
    orders = [
        rows[balanced_steps(cost[rows], rows_per_step=width, stream=key("kind", kind, int(stream)))]
        for kind, (rows, width) in enumerate(zip(kinds, widths, strict=True))
    ]
    ends = np.minimum(np.arange(steps + 1) * rows_per_step, sum(counts))
    text_ends = ends * counts[1] // sum(counts)
    found = np.full((steps, rows_per_step), NO_ROW, dtype=np.int64)
    for step in range(steps):
        if text_share:
            parts = [
                _again(order, step * width, (step + 1) * width, steps=steps)
                for order, width in zip(orders, widths, strict=True)
            ]
        else:
            one, two = step, step + 1
            parts = [
                orders[0][ends[one] - text_ends[one] : ends[two] - text_ends[two]],
                orders[1][text_ends[one] : text_ends[two]],
            ]
        if step < steps - 1 and not all(len(part) for part in parts):
            raise DataError(
                f"batches: paired needs both kinds in every step: {counts[0]} rows with images and {counts[1]} of text "
                f"alone do not fill {steps} steps; draw more of one, set text_share, or take mixed or pure"
            )
        both = np.concatenate(parts)
        found[step, : len(both)] = both
    return found


def _again(order: np.ndarray, first: int, last: int, *, steps: int) -> np.ndarray:
    """Rows first .. last - 1 of a kind: the one that ends before the other begins anew, the longer one just ends."""
    numbers = np.arange(first, last)
    is_longer = -(-len(order) // (last - first)) == steps
    return order[numbers[numbers < len(order)]] if is_longer else order[numbers % len(order)]
