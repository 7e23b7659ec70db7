"""The numbers of a new run, for few and for many samples."""

import pytest

from mmit.train.defaults import Lengths, choose, held_out

# a picture of 576 tokens and a short dialogue; LLaVA 1.5's context
LENGTHS = Lengths(mean=640.0, longest=1000, context=4096)


@pytest.mark.parametrize(
    ("samples", "apart"), [(3, 0), (4, 0), (5, 1), (30, 6), (100, 10), (1000, 50), (100_000, 1000), (10**7, 1000)]
)
def test_a_twentieth_is_held_out_at_least_ten_and_at_most_a_thousand_or_a_fifth(samples: int, apart: int) -> None:
    assert held_out(samples) == apart


@pytest.mark.parametrize(
    ("samples", "epochs", "samples_per_step", "length", "steps", "rank", "warmup"),
    [
        (90, 10, 8, 1024, 120, 16, 0.1),
        (950, 5, 16, 1024, 300, 16, 0.03),
        (99_000, 2, 96, 4096, 2064, 128, 0.03),  # 6 samples in each of 16 rows
    ],
)
def test_100_and_1000_and_100000_samples_get_what_suits_them(
    samples: int, epochs: int, samples_per_step: int, length: int, steps: int, rank: int, warmup: float
) -> None:
    found = choose(samples, LENGTHS)
    assert (found.epochs, found.length, found.rank, found.warmup_fraction) == (epochs, length, rank, warmup)
    assert found.rows_per_step * int(length / LENGTHS.mean) == samples_per_step
    assert found.steps == steps
    assert 9 <= found.steps / found.measure_every <= 11


@pytest.mark.parametrize("samples", [1, 2, 3, 8, 24])
def test_the_smallest_sets_make_steps_enough_to_learn(samples: int) -> None:
    found = choose(samples, LENGTHS)
    assert 10 <= found.steps <= 60
    assert found.measure_every <= max(1, found.steps // 8)


@pytest.mark.parametrize("samples", [10, 1000, 10_000, 665_000])
@pytest.mark.parametrize("mean", [30, 640, 3000])
def test_rows_hold_the_longest_sample_and_a_step_never_more_than_128(samples: int, mean: int) -> None:
    lengths = Lengths(mean=mean, longest=2 * mean, context=0)
    found = choose(samples, lengths)
    assert found.length >= 2 * mean
    assert found.rows_per_step * found.length / mean < 2 * 128 + found.length / mean
    assert found.rows_per_step.bit_count() == 1  # shared evenly by 2, 4 or 8 ranks


def test_a_row_is_no_longer_than_the_model_takes() -> None:
    assert choose(90, Lengths(mean=640.0, longest=5000, context=4096)).length == 4096
