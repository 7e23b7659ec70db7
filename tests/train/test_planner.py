"""mmit plan: memory counted on shapes is that of the tensors of a real run, and what fits is what it says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from model_factories import tiny_model_section
from typer.testing import CliRunner

from mmit.cli import app
from mmit.config import ComposedModel, RunConfig, load_config
from mmit.errors import ConfigError
from mmit.models import LoadedModel, begin_adapter, build_model
from mmit.models.activations import ActivationPeak, RowLoad, activation_peak, likely_last_layer, worst_batch
from mmit.models.live_tensors import LiveTensors
from mmit.models.placement import SHAPES, placed
from mmit.train.plan_advice import advice
from mmit.train.planner import FIXED, HOLES, Machine, plan_of
from mmit.train.ways import Way
from mmit.train.zero_memory import GRADIENTS, OPTIMIZER, WEIGHTS, RankMemory, Weights, rank_memory

ROW = RowLoad(tokens=96, trained=24, tiles=3, samples=3)
RULES = {"connector": 1e-3, "language_model": 1e-3}


@pytest.fixture(scope="module")
def section(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tiny_model_section(tmp_path_factory.mktemp("planned"))


def config_of(section: dict[str, Any], folder: Path, **stage: Any) -> RunConfig:
    filled = {
        "train": RULES,
        "data": {"mix": [{"shards": str(folder / "none")}]},
        "batch": {"length": 96, "tokens_per_step": 96 * 16},
        **stage,
    }
    file = folder / "run.yaml"
    file.write_text(yaml.safe_dump({"name": "r", "model": section, "precision": "fp32", "stages": {"s": filled}}))
    return load_config(file)


def made(section: dict[str, Any], rules: dict[str, float], *, recompute: bool, lora: Any = None) -> LoadedModel:
    loaded = build_model(ComposedModel.model_validate(section), dtype=torch.float32, seed=0)
    if lora is not None:
        begin_adapter(loaded.model, lora, None, seed=0)
    if not loaded.model.placement.holds:
        loaded.model.last_layer = likely_last_layer(loaded.model.language_model)
    loaded.model.train_only(rules)
    if recompute:
        loaded.model.enable_activation_checkpointing()
    return loaded


@pytest.mark.parametrize(
    ("rules", "recompute"),
    [(RULES, False), (RULES, True), ({"connector": 1e-3}, False), ({"vision_tower": 1e-4}, False)],
)
def test_activations_on_shapes_are_those_of_real_tensors(
    section: dict[str, Any], rules: dict[str, float], *, recompute: bool
) -> None:
    with placed(SHAPES):
        shapes = made(section, rules, recompute=recompute)
        predicted = activation_peak(shapes.model, worst_batch(shapes, ROW, rows=2))
    loaded = made(section, rules, recompute=recompute)
    batch = worst_batch(loaded, ROW, rows=2)
    batch = replace(batch, pixels=torch.zeros(batch.pixels.shape, dtype=torch.uint8))
    live = LiveTensors()
    live.ignore((*loaded.model.parameters(), *loaded.model.buffers()))
    loaded.model.train()
    with live:
        torch.autograd.backward(loaded.model(batch))
    # the same operations make the same tensors; a few scalars and integers are made on the CPU only
    assert predicted.kept == pytest.approx(live.peak, rel=0.01)
    if recompute:  # else the worst moment comes before the first gradient
        assert predicted.released < predicted.kept


def test_each_stage_partitions_what_its_paper_says() -> None:
    """16 bytes per trained weight in bf16: 2 of weight, 2 of gradient, 12 of master weight and moments (1910.02054)."""
    weights = Weights(
        trained={"language_model": 2000}, frozen={}, groups=(1000,), element=2, largest=10, small=0, widest=0
    )
    nothing = ActivationPeak(by_part={}, curve=((0, 0),))
    small = {"reduce_bucket_size": 0, "stage3_max_reuse_distance": 0, "stage3_prefetch_bucket_size": 0}

    def memory(stage: int) -> RankMemory:
        return rank_memory(weights, {"stage": stage, **small}, nothing, ranks=4, micro_batches=4)

    assert {part: memory(1).parts[part] for part in (WEIGHTS, GRADIENTS, OPTIMIZER)} == {
        WEIGHTS: 2000,
        GRADIENTS: 2500,  # those of this rank are copied before the others go
        OPTIMIZER: 3000,
    }
    assert memory(2).parts[GRADIENTS] <= 1000
    assert memory(2).parts[OPTIMIZER] == 3000
    assert memory(3).parts[WEIGHTS] == memory(3).parts[GRADIENTS] == 500
    assert memory(3).bytes < memory(2).bytes < memory(1).bytes


def test_what_fits_is_the_largest_that_does(section: dict[str, Any], tmp_path: Path) -> None:
    small = {"extra": {"zero_optimization": {"reduce_bucket_size": 1000}}}  # else 2 GB, which outweigh any row
    config = config_of(section, tmp_path, zero=small)
    memory = FIXED + 2**26
    plan = plan_of(config, "s", Machine(ranks=2, memory=memory, rate=0.0))
    assert plan.best is plan.choices[0]  # everything fits: nothing is partitioned
    by_way = {choice.way: choice for choice in plan.choices}
    plain, again = (by_way[Way(zero_stage=2, recompute=recompute)] for recompute in (False, True))
    assert again.tokens > plain.tokens > 96
    # as many rows as fit, simulated and not drawn from a line
    rows = {"length": 96, "tokens_per_step": 96 * 64, "rows_per_micro_batch": 32}
    longer = config_of(section, tmp_path, batch=rows, zero=small)
    whole = plan_of(longer, "s", Machine(ranks=2, memory=0, rate=0.0))
    bigger = next(choice for choice in whole.choices if choice.way == plain.way)
    growth = (bigger.memory.bytes - plain.memory.bytes) / (31 * 96)
    predicted = (memory - FIXED) / (1 + HOLES) - plain.memory.bytes
    assert plain.tokens - 96 == pytest.approx(predicted / growth, rel=0.05)


def test_features_and_four_bits_take_less(section: dict[str, Any], tmp_path: Path) -> None:
    here = Machine(ranks=1, memory=0, rate=0.0)
    lora = {"train": {"lora": 1e-3}, "lora": {"rank": 2}}
    packed = {**lora, "lora": {"rank": 2, "quantize": "nf4"}}
    features = {"data": {"mix": [{"shards": "none"}], "features": str(tmp_path)}, "train": {"connector": 1e-3}}
    plain, four_bits, read = (
        plan_of(config_of(section, tmp_path, **stage), "s", here) for stage in (lora, packed, features)
    )
    trained = sum(four_bits.weights.trained.values())
    assert trained == sum(plain.weights.trained.values()) == 4 * plain.weights.elements
    # the 14 matrices of two layers, 32 x 32 and 32 x 64: 4.5 bits in place of 32
    matrices = 2 * (4 * 32 * 32 + 3 * 32 * 64)
    saved = plain.weights.frozen["language_model"] - four_bits.weights.frozen["language_model"]
    assert saved == matrices * 4 - matrices * 9 // 16
    assert {choice.way.zero_stage for choice in four_bits.choices} == {0, 1, 2}  # they cannot be partitioned
    assert read.weights.frozen["vision_tower"] == 0 < plain.weights.frozen["vision_tower"]


def test_the_command_tells_ways_and_overrides(section: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(section, tmp_path)
    words = ["plan", str(config.file), "--gpus", "2", "--memory", "4", "--rate", "100"]
    told = CliRunner().invoke(app, words)
    assert told.exit_code == 0, told.output
    assert f"  mmit train {config.file} stages.s.zero.stage=0\n" in told.output
    assert "no data yet" in told.output
    assert max(len(line) for line in told.output.splitlines() if str(config.file) not in line) <= 100
    assert "optimizer" in told.output
    assert "…" not in told.output, "a pipe gets every column whole"
    with pytest.raises(ConfigError, match="--memory inf: is no size of a device"):
        CliRunner().invoke(app, ["plan", str(config.file), "--memory", "inf"], catch_exceptions=False)
    found = json.loads(CliRunner().invoke(app, [*words, "--json"]).stdout)
    assert [way["zero_stage"] for way in found[0]["ways"]][:4] == [0, 1, 2, 3]
    # what is told can be said to the command again
    for choice in plan_of(config, "s", Machine(ranks=2, memory=0, rate=0.0)).choices:
        again = load_config(tmp_path / "run.yaml", choice.way.overrides("s", config.stages["s"])).stages["s"]
        assert again == choice.way.apply(config.stages["s"])


def test_overrides_that_shorten_rows_are_valid_together(section: dict[str, Any], tmp_path: Path) -> None:
    batch = {"length": 96, "tokens_per_step": 96 * 30, "rows_per_micro_batch": 5}
    small = {"extra": {"zero_optimization": {"reduce_bucket_size": 1000, "stage3_max_reuse_distance": 1000}}}
    config = config_of(section, tmp_path, batch=batch, zero=small)
    plan = plan_of(config, "s", Machine(ranks=2, memory=FIXED + 2**30, rate=0.0))
    found = []
    for tokens in (480, 479, 96, 95, 40, 8, 7, 0):  # 8: a tile and as many tokens of text
        tight = replace(plan, machine=replace(plan.machine, memory=1))
        choices = tuple(replace(choice, tokens=tokens) for choice in plan.choices)
        told = advice(replace(tight, choices=choices))
        if told.choice is None:
            assert f"not even rows of {2 * plan.tile_tokens} tokens" in told.sentence
            found.append((0, 0, 0))
            continue
        wanted = load_config(tmp_path / "run.yaml", list(told.overrides)).stages["s"].batch
        found.append((wanted.length, wanted.tokens_per_step, wanted.rows_per_micro_batch))
        assert wanted.length * wanted.rows_per_micro_batch <= tokens
    assert found[:5] == [
        (96, 2880, 5),
        (96, 2880, 3),  # 4 rows would fit, and do not divide 30
        (96, 2880, 1),
        (64, 2880, 1),
        (32, 2880, 1),
    ]
    assert plan.tile_tokens == 4
    assert found[5:] == [(8, 2880, 1), (0, 0, 0), (0, 0, 0)]
