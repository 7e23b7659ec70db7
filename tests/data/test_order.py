"""Orders are arithmetic: the same numbers for ever, whatever NumPy does."""

from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mmit.data.order import draws_of_epoch, hashes, interleaved, key, permutation, splitmix64


def test_splitmix64_gives_the_published_numbers() -> None:
    # the generator seeded with 1234567, as in the test vectors of Rosetta Code's "Pseudo-random numbers/Splitmix64"
    golden = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + k * golden) % 2**64 for k in range(5)], dtype=np.uint64)
    assert splitmix64(states).tolist() == [
        6457827717110365317,
        3203168211198807973,
        9817491932198370423,
        4593380528125082431,
        16408922859458223821,
    ]


def test_an_order_is_the_same_for_ever() -> None:
    assert permutation(10, key(0, "order", 0, 0)).tolist() == FROZEN
    assert hashes(3, key(1)).tolist() == hashes(7, key(1)).tolist()[:3]


FROZEN = [3, 0, 5, 9, 1, 7, 6, 2, 8, 4]


@given(count=st.integers(1, 40), draws=st.integers(1, 90), epochs=st.integers(1, 6), seed=st.integers(0, 9))
def test_no_sample_is_drawn_twice_more_often_than_another(count: int, draws: int, epochs: int, seed: int) -> None:
    seen = Counter(
        sample for e in range(epochs) for sample in draws_of_epoch(count, draws, e, seed=seed, source=0).tolist()
    )
    times = [seen[sample] for sample in range(count)]
    assert sum(times) == draws * epochs
    assert max(times) - min(times) <= 1


@pytest.mark.parametrize("draws", [[700, 200, 100], [1, 999]])
def test_sources_are_interleaved_evenly(draws: list[int]) -> None:
    order = interleaved(draws, 3, seed=0)
    assert Counter(order.tolist()) == dict(enumerate(draws))
    for start in range(0, 801, 50):
        window = order[start : start + 200]
        for source, count in enumerate(draws):
            assert abs(int((window == source).sum()) - count / 5) <= 2
