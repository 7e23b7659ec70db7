"""Rows of whole samples, steps of equal cost."""

from itertools import pairwise

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from mmit.data.order import key
from mmit.data.packing import best_fit
from mmit.data.steps import balanced_steps


def rows_of(
    tokens: list[int], *, length: int, images: list[int] | None = None, tiles_per_row: int = 99
) -> list[list[int]]:
    order, starts = best_fit(
        np.array(tokens),
        np.array(images or [0] * len(tokens)),
        length=length,
        tiles_per_row=tiles_per_row,
    )
    return [order[a:b].tolist() for a, b in pairwise(starts.tolist())]


def test_the_oldest_opens_a_row_and_the_longest_that_fits_follows() -> None:
    # 5 leaves 5: 3 is the longest that fits, then 2; 7 leaves 3: nothing of 6, 4 fits; 6 takes 4
    assert rows_of([5, 7, 3, 6, 2, 4], length=10) == [[0, 5], [1, 2], [3, 4]]
    assert rows_of([10, 10, 1], length=10) == [[0], [1], [2]]
    assert rows_of([3, 3, 3, 3], length=10) == [[0, 1, 2], [3]]
    assert rows_of([], length=10) == []


def test_a_row_holds_no_more_images_than_it_may() -> None:
    # by tokens all four would share a row; 1 and 2 carry two images each
    assert rows_of([4, 3, 2, 1], images=[1, 2, 2, 0], length=10, tiles_per_row=3) == [[0, 1, 3], [2]]


@settings(max_examples=60)
@given(
    samples=st.lists(st.tuples(st.integers(1, 100), st.integers(0, 4)), max_size=400),
    look_ahead=st.sampled_from([1, 4, 256]),
)
def test_every_sample_lies_in_one_row_and_no_row_overflows(samples: list[tuple[int, int]], look_ahead: int) -> None:
    tokens, images = np.array(samples, dtype=np.int64).reshape(-1, 2).T
    order, starts = best_fit(tokens, images, length=100, tiles_per_row=4, look_ahead=look_ahead)
    assert sorted(order.tolist()) == list(range(len(samples)))
    for a, b in pairwise(starts.tolist()):
        assert b > a
        assert tokens[order[a:b]].sum() <= 100
        assert images[order[a:b]].sum() <= 4
    # nothing waits: a row opens with the oldest sample that is left
    firsts = order[starts[:-1]].tolist()
    assert firsts == sorted(firsts)


@settings(max_examples=60)
@given(cost=st.lists(st.integers(1, 50), max_size=300), rows=st.integers(1, 9))
def test_balanced_steps_are_a_permutation_that_stays_near(cost: list[int], rows: int) -> None:
    order = balanced_steps(np.array(cost, dtype=np.int64), rows_per_step=rows, stream=key(1))
    assert sorted(order.tolist()) == list(range(len(cost)))
    window = 16 * rows
    assert all(abs(place // window - row // window) == 0 for place, row in enumerate(order.tolist()))
    for step in range(0, len(cost), rows):
        within = [cost[row] for row in order[step : step + rows]]
        assert within == sorted(within, reverse=True)


def test_rows_of_a_step_cost_about_the_same() -> None:
    cost = (np.arange(16 * 8) * 37) % 1000
    order = balanced_steps(cost, rows_per_step=8, stream=key(1))
    spread = [np.ptp(cost[order[k : k + 8]]) for k in range(0, 128, 8)]
    assert max(spread) < 1000 / 16 * 1.5  # a sixteenth of the range, where a random step spans most of it
