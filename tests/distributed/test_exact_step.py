"""A step's loss is the exact mean over all trained tokens of all ranks and micro-batches, recomputed or on features.

The ZeRO stages, offloading and precisions: test_deepspeed_ways.py.

The model cuts pictures into tiles, and one micro-batch of the four has the newline token between their rows.
"""

from pathlib import Path
from typing import Any

import pytest
from ranks import run_ranks
from runs import make_run

pytestmark = pytest.mark.slow

SETTINGS = [
    "zero-3 activation checkpointing",
    "zero-2 features",
    "zero-3 features",
]


@pytest.fixture(scope="module")
def result(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Two ranks, two micro-batches each, 5/1/2/7 trained tokens, one rank without any image."""
    folder = tmp_path_factory.mktemp("exact")
    return run_ranks(Path(__file__).parent / "exact_step.py", str(make_run(folder, records=6)))


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_step_equals_the_full_batch_step_in_plain_torch(result: Any, setting: str) -> None:
    # the step moves parameters by up to 1e-2; only the order of fp32 sums may differ (measured: 6e-8)
    assert result["moved"] > 5e-3
    assert result[setting]["parameters"] < 3e-7


@pytest.mark.parametrize("setting", SETTINGS)
def test_loss_and_gradient_norm_are_those_of_the_full_batch(result: Any, setting: str) -> None:
    # fp32 sums of about 15 terms near 7; measured 2e-7 and 1e-7
    assert result[setting]["loss"] < 2e-6
    assert result[setting]["norm"] < 2e-6


@pytest.mark.parametrize("made", ["parts", "directory", "filled"])
def test_under_zero_3_no_rank_holds_a_whole_parameter_and_all_are_those_of_a_plain_load(result: Any, made: str) -> None:
    born = result["born"][made]
    assert born["whole"] == 0
    assert 0.5 <= born["share"] < 0.501  # a parameter of odd length is padded
    assert born["differ"] == []


def test_values_that_are_not_finite_are_refused_by_every_rank(result: Any) -> None:
    assert result["born"]["refused"] == 2


ADAPTERS = ["lora zero-2", "lora zero-3", "dora zero-3", "nf4 zero-2"]


@pytest.mark.parametrize("case", ADAPTERS)
def test_a_step_of_adapters_and_a_connector_is_exact_saved_resumed_and_merged(result: Any, case: str) -> None:
    found = result["adapters"][case]
    assert found["moved"] > 5e-4
    assert found["off"] < 3e-7  # the order of fp32 sums, as above
    assert found["saved"] == found["resumed"] == 0.0
    assert found["merged"] == 0.0
    assert found["old rows"] == 0.0  # under weight decay too
    assert found["new row"] > 5e-4


@pytest.mark.parametrize("stage", ["zero-2", "zero-3"])
def test_a_step_that_trains_layers_of_three_encoders_side_by_side_is_exact(result: Any, stage: str) -> None:
    """CLIP and DINOv3 of transformers and EVA of timm, whose own parameters are whole in their own forward alone."""
    assert result["encoders"][stage] < 3e-7  # the order of fp32 sums, as above
    moved = [name for name in result["encoders"]["moved"] if name.startswith("vision_tower.")]
    layers = ("0.model.encoder.layers", "1.model.blocks", "2.model.model.layer")
    wanted = {f"vision_tower.towers.{where}.{number}." for where in layers for number in (1, 2)}
    assert {start for start in wanted for name in moved if name.startswith(start)} == wanted
    assert all(name.startswith(tuple(wanted)) for name in moved)


INSIGHT = ["zero-0", "zero-2 offload", "zero-2 bf16", "zero-3"]


@pytest.mark.parametrize("setting", INSIGHT)
def test_an_update_that_is_left_out_leaves_every_bit_and_the_next_one_is_as_if_it_had_not_been(
    result: Any, setting: str
) -> None:
    found = result["insight"][setting]
    assert found["left out"]  # master weights, moments and their count, and the weights that the model computes with
    assert found["norm"] > 0.1  # the gradient was there
    assert found["goes on"]  # and nothing of it is left


@pytest.mark.parametrize("setting", INSIGHT)
def test_update_ratios_are_those_of_the_whole_weights(result: Any, setting: str) -> None:
    found = result["insight"][setting]
    assert found["told"].keys() == found["by hand"].keys() == {"connector", "language_model"}
    # fp32 sums; in bf16 the weights that one can see are rounded, and a change with them
    tolerance = 0.05 if "bf16" in setting else 1e-5
    assert found["told"] == pytest.approx(found["by hand"], rel=tolerance)


@pytest.mark.parametrize("setting", INSIGHT)
def test_memory_by_part_counts_what_a_rank_holds(result: Any, setting: str) -> None:
    """Two ranks; four bytes a number, two in bf16; ZeRO-2 and 3 halve gradients, moments and master weights."""
    found = result["insight"][setting]
    size, share = (2 if "bf16" in setting else 4), (1 if setting == "zero-0" else 0.5)
    held, trained = found["held"], found["trained"]
    numbers = 2 if setting == "zero-0" else 3  # two moments, and master weights where they are apart
    # halves of what is flattened in one go, which need not end with a part of the model
    assert held["optimizer"] == pytest.approx(trained * 4 * numbers * share, rel=0.02)
    assert held["gradients"] == pytest.approx(trained * size * share, rel=0.02)
    whole = found["all"] * size
    assert held["parameters"] >= whole * (0.5 if setting == "zero-3" else 1)
