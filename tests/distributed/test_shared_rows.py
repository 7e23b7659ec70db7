"""Rows that two ranks share (parallel.sequence), or whose layers are recomputed, are trained as the rows of one rank.

Tests of single steps: deepspeed_ways.
"""

from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from runs import make_run

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("shared")
    return run_ranks(Path(__file__).parent / "shared_rows.py", str(make_run(folder, records=60)))


@pytest.mark.parametrize("key_heads", [4, 2, 1])
def test_attention_over_the_parts_of_a_row_is_that_of_the_row(result: Any, key_heads: int) -> None:
    assert (
        result["attention"][str(key_heads)] < 3e-6
    )  # sums of fp32 numbers near 1; one head of keys is lent to both ranks (measured: 1e-6)


def test_a_stage_on_shared_rows_tells_the_same_losses_and_counts_every_row_once(result: Any) -> None:
    alone, shared = result["alone"]["steps"], result["shared"]["steps"]
    assert len(alone) == len(shared) == 4
    for one, other in zip(alone, shared, strict=True):
        for key, value in one.items():
            # losses near 6 and norms near 5, whose sums are made in another order; the rest are counts
            assert other[key] == (pytest.approx(value, abs=2e-5) if key in NUMBERS else value), key


NUMBERS = ("loss", "grad_norm", "loss_by_source")


def test_the_held_out_loss_on_shared_rows_is_that_of_whole_rows(result: Any) -> None:
    (loss, tokens), *_ = result["alone"]["held_out"]
    assert result["shared"]["held_out"][0] == [pytest.approx(loss, abs=2e-5), tokens]


def test_a_stage_on_shared_rows_goes_on_from_its_checkpoint_with_the_same_bits(result: Any) -> None:
    assert result["continued"] == result["shared"]


def test_a_stage_short_of_memory_recomputes_its_layers_says_why_and_trains_the_same(result: Any) -> None:
    alone, short = result["alone"], result["short"]
    assert short["every"] == [4]  # the first of two layers: what the other keeps has gone when that one runs again
    [said] = [line for line in short["said"] if line.startswith("stages.instruct.activation_checkpointing: auto is")]
    assert "auto is 4 (none fits, and it needs least: 9.31e-10 GiB: about " in said  # a byte
    # a layer that runs again makes the same numbers
    assert (short["steps"], short["held_out"]) == (alone["steps"], alone["held_out"])


def test_ranks_that_cannot_be_dealt_to_rows_are_refused(result: Any) -> None:
    assert result["refused"] == (
        "stages.instruct.parallel.sequence: 3 does not divide the 2 ranks; set it to 1, or start a multiple of 3 ranks "
        "(--ranks, launch.cpu_ranks)"
    )
