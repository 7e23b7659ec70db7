"""``zero.stage: auto`` is decided by the plan that ``mmit plan`` prints, and kept by a run that goes on."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from family_factories import family_section, write_family
from model_factories import tiny_model_section, tiny_open_clip
from transformers import LlamaForCausalLM

from mmit.config import RunConfig, Stage, load_config
from mmit.errors import ConfigError
from mmit.models import VisionLanguageModel
from mmit.train import zero_choice
from mmit.train.planner import Machine, StagePlan, plan_of
from mmit.train.ways import Way, own_ways, ways
from mmit.train.zero_choice import FIXED_ON_CPU, decide, with_way

SMALL = {
    "reduce_bucket_size": 1000,
    "stage3_max_reuse_distance": 1000,
    "stage3_prefetch_bucket_size": 1000,
    "stage3_param_persistence_threshold": 1000,
}
"""DeepSpeed's own are many times the toy model."""


@pytest.fixture(scope="module")
def section(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tiny_model_section(tmp_path_factory.mktemp("chosen"))


def config_of(section: dict[str, Any], folder: Path, **stage: Any) -> RunConfig:
    filled = {
        "train": {"connector": 1e-3, "language_model": 1e-3},
        "data": {"mix": [{"shards": str(folder / "none")}]},
        "batch": {"length": 64, "tokens_per_step": 64 * 16},
        "zero": {"extra": {"zero_optimization": SMALL}},
        **stage,
    }
    content = {"name": "r", "model": section, "precision": "fp32", "output": str(folder), "stages": {"s": filled}}
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    return load_config(folder / "run.yaml")


def with_memory(plan: StagePlan, memory: int) -> StagePlan:
    return replace(plan, machine=replace(plan.machine, memory=memory))


def test_auto_takes_what_the_plan_recommends_first(section: dict[str, Any], tmp_path: Path) -> None:
    config = config_of(section, tmp_path)
    plan = plan_of(config, "s", Machine(ranks=4, memory=0, rate=0.0, fixed=FIXED_ON_CPU))
    needs = {choice.way: choice.bytes for choice in plan.choices}
    seen = set()
    for memory in sorted({need + more for need in needs.values() for more in (-1, 0)}):
        told = with_memory(plan, memory)
        plain = [way for way in needs if way.offload == "none" and not way.recompute]
        fitting = [way.zero_stage for way in plain if needs[way] <= memory]
        least = min(plain, key=lambda way: needs[way]).zero_stage
        assert told.auto.way.zero_stage == (min(fitting) if fitting else least)
        if told.best is not None and told.best.way in plain:
            assert told.best is told.auto
        seen.add(told.auto.way.zero_stage)
    assert {0, 3} <= seen
    for number in seen:  # and the rank that starts a run, with the memory that this way just needs, comes to the same
        memory = needs[Way(zero_stage=number)]
        found, why = decide(config, "s", dtype=torch.float32, memory=memory, ranks=4)
        assert found == Way(zero_stage=number), why
    assert decide(config, "s", dtype=torch.float32, memory=1, ranks=1)[0] == Way(zero_stage=0)


def test_a_run_that_goes_on_keeps_its_stage_unless_other_ranks_continue_it(
    section: dict[str, Any], tmp_path: Path
) -> None:
    config = config_of(section, tmp_path)
    newest = config.stage_folder("s") / "checkpoints" / "step-000002"
    newest.mkdir(parents=True)
    (newest / "COMPLETE").touch()
    (newest / "state.json").write_text(json.dumps({"version": 2, "world": 2, "zero_stage": 2}))

    def decided(ranks: int) -> int:
        return decide(config, "s", dtype=torch.float32, memory=2**40, ranks=ranks)[0].zero_stage

    assert (decided(2), decided(4), decided(1)) == (2, 0, 0)
    (newest / "state.json").write_text("{")
    assert decided(2) == 0


def test_no_more_is_recomputed_than_memory_asks_for(
    section: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = config_of(section, tmp_path, activation_checkpointing="auto", zero={"stage": 0})
    plan = plan_of(config, "s", Machine(ranks=1, memory=0, rate=0.0, fixed=FIXED_ON_CPU))
    needs = {choice.way.recompute: choice.bytes for choice in plan.choices if choice.way.zero_stage == 0}
    # two layers: every fourth and every second are both the first of the two
    assert needs[0] > needs[4] == needs[2] > needs[1]

    def recomputed(memory: int) -> int:
        return decide(config, "s", dtype=torch.float32, memory=memory, ranks=1)[0].recompute

    assert [recomputed(needs[0] - less) for less in (0, 1)] == [0, 4]
    assert [recomputed(needs[4] - less) for less in (0, 1)] == [4, 1]
    assert recomputed(1) == 1  # nothing fits: the least
    with caplog.at_level("INFO", logger="mmit"):
        for memory, chosen in ((needs[0], False), (needs[4], 4), (1, True)):
            monkeypatch.setattr(zero_choice, "_memory", lambda memory=memory: memory)
            stage = with_way(config, "s", dtype=torch.float32).stages["s"]
            assert (stage.activation_checkpointing, stage.zero.stage) == (chosen, 0)
    assert "stages.s.activation_checkpointing: auto is 4 (the first that fits" in caplog.text
    monkeypatch.setattr(LlamaForCausalLM, "supports_gradient_checkpointing", False)
    assert recomputed(1) == 0  # and what the model cannot do is not chosen


def stage_of(**changes: Any) -> Stage:
    filled = {
        "train": {"connector": 1e-3},
        "data": {"mix": [{"shards": "none"}]},
        "batch": {"length": 64, "tokens_per_step": 64},
        **changes,
    }
    return Stage.model_validate(filled)


def test_only_what_the_stage_allows_is_tried_and_less_partitioned_first() -> None:
    def numbers(ranks: int = 2, **changes: Any) -> list[int]:
        return [way.zero_stage for way in own_ways(stage_of(**changes), ranks=ranks)]

    four_bits: dict[str, Any] = {"train": {"lora": 1e-3}, "lora": {"quantize": "nf4"}}
    assert numbers() == [0, 1, 2, 3]
    assert numbers(ranks=1) == [0]
    assert numbers(zero={"offload_optimizer": "cpu"}) == [2, 3]
    assert numbers(zero={"offload_optimizer": "cpu"}, ranks=1) == [2]
    assert numbers(zero={"offload_parameters": "cpu"}, ranks=1) == [3]
    assert numbers(**four_bits) == numbers(compile=True) == [0, 1, 2]
    with pytest.raises(ConfigError, match="zero: what it offloads needs stage 3, which cannot hold"):
        numbers(**four_bits, zero={"offload_parameters": "cpu"})
    assert numbers(zero={"stage": 1}) == [1]
    both = own_ways(stage_of(activation_checkpointing="auto"), ranks=2)
    assert [(way.recompute, way.zero_stage) for way in both] == [(k, z) for k in (0, 4, 2, 1) for z in range(4)]
    listed = ways(stage_of(activation_checkpointing=3))
    assert listed.index(Way(zero_stage=3)) + 1 == listed.index(Way(zero_stage=0, recompute=3))
    assert listed.index(Way(zero_stage=3, recompute=3)) + 1 == listed.index(Way(zero_stage=0, recompute=1))
    # keys of zero.extra that only offloading knows rule the other ways out
    extra = {"zero_optimization": {"offload_optimizer": {"buffer_count": 5}}}
    only = ways(stage_of(zero={"offload_optimizer": "cpu", "extra": extra}))
    assert {way.offload for way in only} == {"optimizer", "all"}


@pytest.mark.parametrize("name", ["mistral", "gemma2", "stablelm", "bloom", "gpt_oss", "mamba"])
def test_a_plan_is_made_of_models_whose_masks_are_made_by_transformers(name: str, tmp_path: Path) -> None:
    write_family(name, tmp_path)
    model = family_section(name, tmp_path).model_dump(mode="json", exclude_unset=True)
    found, why = decide(config_of(model, tmp_path), "s", dtype=torch.float32, memory=2**40, ranks=2)
    assert found == Way(zero_stage=0)
    assert why.startswith("the first that fits")


def test_a_plan_is_made_of_a_tower_of_open_clip(section: dict[str, Any], tmp_path: Path) -> None:
    config = config_of({**section, "encoder": tiny_open_clip(tmp_path / "clip")}, tmp_path)
    assert decide(config, "s", dtype=torch.float32, memory=2**40, ranks=2)[1].startswith("the first that fits")


def test_a_model_that_needs_values_is_trained_unplanned_and_the_log_says_why(
    section: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def forward(model: Any, batch: Any) -> Any:
        return torch.ones(1, device="meta").item()

    monkeypatch.setattr(VisionLanguageModel, "forward", forward)
    found, why = decide(config_of(section, tmp_path), "s", dtype=torch.float32, memory=2**40, ranks=2)
    assert found == Way(zero_stage=2)
    assert "does not run on shapes alone" in why
    assert "stages.s.zero.stage" in why
