"""Which ZeRO stage ``auto`` means: numbers that can be checked by hand."""

from __future__ import annotations

import pytest

from mmit.train.zero_choice import Load, choose

GB = 10**9


@pytest.mark.parametrize(
    ("weights", "trained", "ranks", "most", "number"),
    [
        (15, 0.021, 8, 3, 0),  # a connector of 21 M beside a frozen 7B: 0.3 GB of states, nothing to share out
        (2, 0.2, 8, 3, 0),  # 2.8 GB are less than a twentieth of 80
        (15, 7, 8, 3, 2),  # 98 GB of states are 12 on each of eight
        (15, 7, 2, 3, 3),  # and 49 on each of two: with the weights more than half of 80
        (27, 13, 8, 3, 3),  # 27 + 182 / 8 = 50
        (140, 0.1, 8, 3, 3),  # frozen weights that no rank can hold
        (140, 0.1, 8, 2, 2),  # four bits cannot be partitioned
    ],
)
def test_the_lowest_stage_that_leaves_half_of_the_memory_is_taken(
    weights: float, trained: float, ranks: int, most: int, number: int
) -> None:
    # bf16: 14 bytes of gradient and optimizer state for a trained parameter, 80 GB on each rank
    load = Load(weights=int(weights * GB), states=int(trained * 14 * GB), memory=80 * GB)
    assert choose(load, ranks=ranks, most=most)[0] == number
