"""Fill rows with whole samples, and steps with rows of equal cost.

Best fit with a look-ahead: among the next samples of the order, the oldest opens a row and the longest that still fits
goes in next, so that nothing waits long and little is left empty (figures: look-ahead 64 reaches 99 % of what packing
the whole epoch offline would; 256 costs no more).
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort

import numpy as np

from mmit.data.order import hashes

LOOK_AHEAD = 256
STEPS_PER_WINDOW = 16

_LOW = (1 << 32) - 1


def best_fit(
    tokens: np.ndarray, images: np.ndarray, *, length: int, images_per_row: int, look_ahead: int = LOOK_AHEAD
) -> tuple[np.ndarray, np.ndarray]:
    """Pack samples, given in their order, into rows of at most ``length`` tokens and ``images_per_row`` images.

    Returns (order, starts): ``order[starts[r]:starts[r + 1]]`` are the samples of row r, int64, each sample once.
    Every sample must fit into a row of its own.
    """
    count = len(tokens)
    assert count < _LOW, "more than 4 billion samples"
    assert not count or (tokens.max() <= length and images.max() <= images_per_row), "a sample is larger than a row"
    # longest first, then oldest first: (tokens, -position) in one integer, so that one sorted list of integers is all
    keys = ((tokens.astype(np.int64) << 32) | (_LOW - np.arange(count, dtype=np.int64))).tolist()
    pictures = images.tolist() if int(images.sum()) > images_per_row else None
    taken = bytearray(count)
    order: list[int] = []
    starts = [0]
    pool: list[int] = []
    oldest = following = 0
    while len(order) < count:
        while following < count and len(pool) < look_ahead:
            insort(pool, keys[following])
            following += 1
        while taken[oldest]:
            oldest += 1
        at = bisect_left(pool, keys[oldest])
        room, places = length, images_per_row
        while at >= 0:
            key = pool.pop(at)
            sample = _LOW - (key & _LOW)
            taken[sample] = 1
            order.append(sample)
            room -= key >> 32
            at = bisect_right(pool, (room << 32) | _LOW) - 1
            if pictures is not None:
                places -= pictures[sample]
                while at >= 0 and pictures[_LOW - (pool[at] & _LOW)] > places:
                    at -= 1
        starts.append(len(order))
    return np.array(order, dtype=np.int64), np.array(starts, dtype=np.int64)


def balanced_steps(cost: np.ndarray, *, rows_per_step: int, stream: np.uint64) -> np.ndarray:
    """The order of rows in which each ``rows_per_step`` of them, a step, cost about the same: int64.

    Within windows of 16 steps the rows are sorted by cost and cut into steps, and the steps are shuffled, so that no
    size drifts over time. Only the last step may have fewer rows.
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
