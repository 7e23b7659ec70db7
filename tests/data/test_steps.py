"""Rows to steps and to ranks: nothing lost, kinds kept apart or together, nobody waits."""

from collections import Counter
from itertools import chain
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mmit.data.order import key
from mmit.data.steps import NO_ROW, TILE_TOKENS, arrange, deal, row_cost
from mmit.errors import DataError


def steps_of(cost: list[int], text: list[bool], **more: Any) -> list[list[int]]:
    settings: dict[str, Any] = {"batches": "mixed", "text_share": 0.0, "rows_per_step": 4, "stream": key(0), **more}
    found = arrange(np.array(cost, dtype=np.int64), np.array(text, dtype=bool), **settings)
    assert found.shape[1] == settings["rows_per_step"]
    return [[row for row in step if row != NO_ROW] for step in found.tolist()]


def test_a_tile_costs_as_much_as_its_tokens_say() -> None:
    assert row_cost(np.array([100, 0]), np.array([3, 0])).tolist() == [100 + 3 * TILE_TOKENS, 0]


ROWS = st.lists(st.tuples(st.integers(1, 99), st.booleans()), min_size=1, max_size=150)


@settings(max_examples=60, deadline=None)
@given(rows=ROWS, width=st.integers(1, 9), batches=st.sampled_from(["mixed", "pure"]))
def test_every_row_stands_in_one_step_the_costliest_first(
    rows: list[tuple[int, bool]], width: int, batches: str
) -> None:
    cost, text = [r[0] for r in rows], [r[1] for r in rows]
    found = steps_of(cost, text, rows_per_step=width, batches=batches)
    assert sorted(chain(*found)) == list(range(len(rows)))
    for step in found:
        assert step
        assert [cost[row] for row in step] == sorted((cost[row] for row in step), reverse=True)
        assert batches == "mixed" or len({text[row] for row in step}) == 1
    if batches == "pure":  # no more than one step of each kind is not full
        assert sum(len(step) < width for step in found) <= 2


def test_pure_steps_of_both_kinds_are_spread_evenly() -> None:
    text = [False] * 120 + [True] * 40
    kinds = [text[step[0]] for step in steps_of([5] * 160, text, batches="pure")]
    assert len(kinds) == 40
    assert all(sum(kinds[k : k + 8]) in (1, 2, 3) for k in range(0, 40, 8))  # a quarter of 8 is 2


def test_paired_steps_hold_the_share_of_the_mixture_and_repeat_nothing() -> None:
    text = [False] * 70 + [True] * 30
    found = steps_of([5] * 100, text, rows_per_step=10, batches="paired")
    assert sorted(chain(*found)) == list(range(100))
    assert [sum(text[row] for row in step) for step in found] == [3] * 10


def test_paired_steps_of_a_stated_share_begin_the_shorter_kind_anew() -> None:
    text = [False] * 20 + [True] * 4
    found = steps_of(list(range(1, 25)), text, rows_per_step=4, batches="paired", text_share=0.5)
    assert [sum(text[row] for row in step) for step in found] == [2] * 10
    seen = Counter(chain(*found))
    assert {seen[row] for row in range(20)} == {1}
    assert {seen[row] for row in range(20, 24)} == {5}  # 10 steps x 2 places / 4 rows


def test_paired_without_enough_of_one_kind_is_an_error() -> None:
    with pytest.raises(DataError, match="there are 8 rows with images and 0 of text alone"):
        steps_of([5] * 8, [False] * 8, batches="paired")
    with pytest.raises(DataError, match="39 rows with images and 1 of text alone do not fill 10 steps"):
        steps_of([5] * 40, [False] * 39 + [True], batches="paired")


@settings(max_examples=60)
@given(
    cost=st.lists(st.lists(st.integers(1, 99), min_size=6, max_size=6), min_size=1, max_size=5),
    world=st.integers(1, 9),
)
def test_all_ranks_together_take_each_row_once(cost: list[list[int]], world: int) -> None:
    costs = np.sort(np.array(cost), axis=1)[:, ::-1]
    dealt = deal(costs, world)
    assert dealt.shape == (len(cost), -(-6 // world), world)
    for step in dealt:
        assert sorted(step[step != NO_ROW].tolist()) == list(range(6))
        counts = (step != NO_ROW).sum(axis=0)
        assert counts.max() - counts.min() <= 1


def test_the_least_loaded_rank_takes_the_costliest_row_of_a_round() -> None:
    # 9 8 | 7 3 | 2 1: rank 0 has 9, so rank 1 takes 7 (15 to 12), then rank 0 takes 2
    assert deal(np.array([[9, 8, 7, 3, 2, 1]]), 2).tolist() == [[[0, 1], [3, 2], [4, 5]]]
