"""Fill rows with whole samples.

Best fit with a look-ahead: among the next 256 samples of the order, the oldest opens a row and the longest that still
fits goes in next, so that nothing waits long and little is left empty (look-ahead 64 reaches 99 % of what packing the
whole epoch offline would; 256 costs no more). The order is cut into segments that are packed each for itself, all of
them at the same time, one sample of each per turn: 10 million samples take seconds.
"""

from __future__ import annotations

import numpy as np

LOOK_AHEAD = 256
SEGMENT = 8192
SEGMENTS_AT_ONCE = 256

_NOBODY = np.iinfo(np.uint16).max
"""The age of an empty place in a pool: younger than any sample of a segment."""


def best_fit(
    tokens: np.ndarray, tiles: np.ndarray, *, length: int, tiles_per_row: int, look_ahead: int = LOOK_AHEAD
) -> tuple[np.ndarray, np.ndarray]:
    """Pack samples, given in their order, into rows of at most ``length`` tokens and ``tiles_per_row`` tiles.

    Returns (order, starts): ``order[starts[r]:starts[r + 1]]`` are the samples of row r, uint32, each sample once;
    starts is int64. Every sample must have a token and fit into a row of its own.
    """
    count = len(tokens)
    assert count < 1 << 32, "more than 4 billion samples"
    assert not count or tokens.min() > 0, "a sample without a token"
    assert not count or (tokens.max() <= length and tiles.max() <= tiles_per_row), "a sample is larger than a row"
    order = np.empty(count, dtype=np.uint32)
    opens = np.zeros(count, dtype=bool)
    for first in range(0, count, SEGMENT * SEGMENTS_AT_ONCE):
        part = slice(first, first + SEGMENT * SEGMENTS_AT_ONCE)
        within, order_opens = _pack(tokens[part], tiles[part], length, tiles_per_row, look_ahead)
        order[part] = within
        order[part] += np.uint32(first)
        opens[part] = order_opens
    return order, np.append(np.flatnonzero(opens), count)


def _pack(
    tokens: np.ndarray, tiles: np.ndarray, length: int, tiles_per_row: int, look_ahead: int
) -> tuple[np.ndarray, np.ndarray]:
    """The samples of some segments in the order of their rows, and which of them open a row."""
    count = len(tokens)
    turns = min(SEGMENT, count)
    segments = -(-count // turns)
    counts_tiles = int(tiles.sum(dtype=np.int64)) > tiles_per_row
    coming = _columns(tokens, turns, look_ahead, length)  # (turns + look_ahead, S)
    coming_tiles = _columns(tiles, turns, look_ahead, tiles_per_row)
    # a pool is a row of (S, look_ahead); 0 tokens: an empty place
    pool, pool_tiles = (np.ascontiguousarray(column[:look_ahead].T) for column in (coming, coming_tiles))
    ages = np.arange(look_ahead, dtype=np.uint16)
    age = np.where(pool > 0, ages, _NOBODY)
    room = np.zeros(segments, dtype=pool.dtype)
    places = np.zeros(segments, dtype=pool_tiles.dtype)
    every = np.arange(segments)
    order = np.empty((turns, segments), dtype=np.uint16)
    opens = np.zeros((turns, segments), dtype=bool)
    fits, fitting = np.empty(pool.shape, dtype=bool), np.empty_like(pool)
    for turn in range(turns):
        np.less_equal(pool, room[:, None], out=fits)
        if counts_tiles:
            fits &= pool_tiles <= places[:, None]
        np.multiply(pool, fits, out=fitting)
        slot = fitting.argmax(axis=1)
        full = np.flatnonzero(fitting[every, slot] == 0)
        if len(full):
            slot[full] = age[full].argmin(axis=1)
            room[full], places[full], opens[turn, full] = length, tiles_per_row, True
        order[turn] = age[every, slot]
        room -= pool[every, slot]
        places -= pool_tiles[every, slot]
        pool[every, slot] = coming[turn + look_ahead]
        pool_tiles[every, slot] = coming_tiles[turn + look_ahead]
        age[every, slot] = np.where(coming[turn + look_ahead] > 0, np.uint16(turn + look_ahead), _NOBODY)
    within = order.T.astype(np.uint32) + np.arange(0, segments * turns, turns, dtype=np.uint32)[:, None]
    return within.reshape(-1)[:count], opens.T.reshape(-1)[:count]


def _columns(values: np.ndarray, turns: int, look_ahead: int, largest: int) -> np.ndarray:
    """Segments as columns, with zeros below: (turns + look_ahead, S), in the smallest type that holds ``largest``."""
    segments = -(-len(values) // turns)
    flat = np.zeros(segments * turns, dtype=np.uint16 if largest <= np.iinfo(np.uint16).max else np.uint32)
    flat[: len(values)] = values
    found = np.zeros((turns + look_ahead, segments), dtype=flat.dtype)
    found[:turns] = flat.reshape(segments, turns).T
    return found
