"""Which samples take part, and how many are drawn: whole numbers that can be checked by hand."""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from data_factories import llava_record, write_source
from hypothesis import given
from hypothesis import strategies as st

from mmit.data.convert import Conversion, convert
from mmit.data.facts import read_facts
from mmit.data.mixture import Choice, choose, draws_by_root, draws_by_weight, draws_per_epoch, usable
from mmit.data.shard_set import open_source
from mmit.errors import DataError


def chosen(count: int, *, tasks: np.ndarray | None = None, **choice: Any) -> list[int]:
    found = choose("set", count, Choice(**choice), seed=0, tasks=tasks)
    return list(range(count)) if found is None else found.tolist()


def test_draws_are_whole_numbers() -> None:
    assert [draws_per_epoch(10, epochs=e) for e in (1.0, 0.5, 2.5, 0.01)] == [10, 5, 25, 1]
    assert draws_per_epoch(10, samples=37) == 37


def test_weights_share_out_a_total_by_largest_remainders() -> None:
    # of 10: 5.0, 3.33, 1.67 -> 5, 3, 1 and the one left goes to the largest remainder, .67
    assert draws_by_weight([3, 2, 1], 10) == [5, 3, 2]
    assert draws_by_weight([1, 1, 1], 10) == [4, 3, 3]  # a tie: the first
    assert draws_by_weight([0.1, 0.2, 0.7], 1000) == [100, 200, 700]


@given(weights=st.lists(st.floats(0.01, 100), min_size=1, max_size=9), total=st.integers(1, 10**7))
def test_draws_by_weight_add_up_and_are_off_by_less_than_one(weights: list[float], total: int) -> None:
    draws = draws_by_weight(weights, total)
    assert sum(draws) == total
    for weight, drawn in zip(weights, draws, strict=True):
        assert abs(drawn - total * weight / sum(weights)) < 1 + 1e-6


def test_square_roots_share_out_a_total() -> None:
    assert draws_by_root([100, 10_000, 900], 140) == [10, 100, 30]  # roots 10, 100, 30


def test_first_and_last_go_by_the_order_of_the_shards() -> None:
    assert chosen(10, subset="first 3") == [0, 1, 2]
    assert chosen(10, subset="last 20%") == [8, 9]
    assert chosen(1000, subset="first 0.1%") == [0]
    assert chosen(3, subset="first 1%") == [0]  # at least one
    assert chosen(10) == list(range(10))


def test_a_random_subset_lies_within_every_larger_one() -> None:
    one, six, quarter = (set(chosen(5000, subset=f"random {share}%")) for share in (1, 6, 25))
    assert one < six < quarter
    assert (len(one), len(six), len(quarter)) == (50, 300, 1250)
    assert set(chosen(5000, limit=50)) == one
    other = choose("set", 5000, Choice(subset="random 1%"), seed=1)
    assert other is not None
    assert set(other.tolist()) != one


def test_a_cap_by_task_takes_all_of_small_tasks_and_nests() -> None:
    tasks = np.array([0, 1, 1, 2, 1, 2, -1, 1, 2, 2])
    found = chosen(10, per_task=2, tasks=tasks)
    assert Counter(tasks[found].tolist()) == {0: 1, 1: 2, 2: 2, -1: 1}
    assert set(found) < set(chosen(10, per_task=3, tasks=tasks))
    assert set(chosen(10, per_task=2, limit=3, tasks=tasks)) < set(found)
    assert set(chosen(10, per_task=1, subset="first 5", tasks=tasks)) <= {0, 1, 2, 3, 4}


def test_a_subset_larger_than_the_set_is_an_error() -> None:
    with pytest.raises(DataError, match=r"set: subset 'first 11' asks for 11 samples and there are 10"):
        chosen(10, subset="first 11")
    assert len(chosen(10, limit=11)) == 10


def test_what_is_left_out_is_not_drawn() -> None:
    tokens = np.array([3, 0, 5, 0])
    assert usable(np.array([3, 1]), None) is None
    for chosen_before, left in ((None, [0, 2]), (np.array([1, 2], dtype=np.uint32), [2])):
        found = usable(tokens, chosen_before)
        assert found is not None
        assert found.tolist() == left


def test_a_cap_by_task_counts_the_tasks_that_a_published_set_names(tmp_path: Path) -> None:
    """Vision-Flan's form: five records of one task, two of another, one of a third; at most two of each."""
    records = [llava_record(n) | {"task_name": "VQA-E" if n < 5 else "OCR" if n < 7 else "QA"} for n in range(8)]
    convert(
        Conversion(
            reader="llava_json", source=write_source(tmp_path / "raw", records), target=tmp_path / "set", name="set"
        ),
        processes=1,
        progress=False,
    )
    shards = open_source(tmp_path / "set")
    facts = read_facts(shards, progress=False)
    found = choose("set", len(shards), Choice(per_task=2), seed=0, tasks=facts.task)
    assert found is not None
    assert Counter(shards.read_text(n).meta["task"] for n in found.tolist()) == {"VQA-E": 2, "OCR": 2, "QA": 1}
