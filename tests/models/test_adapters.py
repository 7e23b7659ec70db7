"""Adapters in a model: what they compute, what trains, and how they become part of the weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from adapter_factories import ALL_PARTS, LLM, adapted, logits, two_packed_samples
from models_support import gradients
from peft.tuners.lora import Linear as AdaptedLinear

from mmit.config import Lora, Stage
from mmit.errors import ConfigError
from mmit.models import LoadedModel, begin_adapter
from mmit.models.adapters import adapted_layers, merge_adapter

Build = Callable[..., LoadedModel]


def adapter_parameters(loaded: LoadedModel) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in loaded.model.named_parameters() if ".lora_" in name}


@pytest.mark.parametrize("dora", [False, True])
def test_a_fresh_adapter_changes_nothing_and_depends_on_the_seed_alone(build: Build, dora: bool) -> None:
    loaded = build("clip_llama")
    before = logits(loaded)
    lora = ALL_PARTS.model_copy(update={"dora": dora})
    begin_adapter(loaded.model, lora, None, seed=5)
    # DoRA divides by the length that it multiplies with: equal up to rounding
    torch.testing.assert_close(logits(loaded), before, rtol=0, atol=2e-6 if dora else 0.0)
    again, other = build("clip_llama"), build("clip_llama")
    torch.rand(7)
    begin_adapter(again.model, lora, None, seed=5)
    begin_adapter(other.model, lora, None, seed=6)
    first, second, third = (adapter_parameters(one) for one in (loaded, again, other))
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not any(torch.equal(first[name], third[name]) for name in first if "lora_A" in name)


def test_the_language_model_is_adapted_in_every_linear_layer_but_the_head(loaded: LoadedModel) -> None:
    begin_adapter(loaded.model, LLM, None, seed=0)
    layers = adapted_layers(loaded.model)
    assert len(layers) == 2 * 7  # q k v o, gate up down
    assert all(name.startswith("language_model.model.layers.") for name in layers)


@pytest.mark.parametrize(
    ("settings", "scale"),
    [({}, 6 / 4), ({"rslora": True}, 6 / 4**0.5), ({"dora": True}, 6 / 4)],
    ids=["lora", "rslora", "dora"],
)
def test_a_merged_weight_is_w_plus_scale_b_a(build: Build, settings: dict[str, Any], scale: float) -> None:
    loaded = adapted(build("clip_llama"), ALL_PARTS.model_copy(update=settings))
    before = logits(loaded)
    expected, by_peft = {}, {}
    for name, layer in adapted_layers(loaded.model).items():
        a, b = layer.get_parameter("lora_A.default.weight"), layer.get_parameter("lora_B.default.weight")
        weight = layer.get_parameter("base_layer.weight").detach().clone()
        merged = weight + scale * b @ a
        if "dora" in settings:
            length = layer.get_parameter("lora_magnitude_vector.default.weight")
            merged = length[:, None] * merged / merged.square().sum(dim=1, keepdim=True).sqrt()
        expected[name] = merged.detach()
        by_peft[name] = merged_by_peft(layer, weight)
    assert len(expected) == 2 * 7 + 2 + 3 * 6  # language model, connector, tower
    merge_adapter(loaded.model)
    assert not adapted_layers(loaded.model)
    for name, weight in expected.items():
        now = loaded.model.get_submodule(name).weight
        torch.testing.assert_close(now, weight, rtol=0, atol=1e-6)  # fp32 sums of four products
        torch.testing.assert_close(now, by_peft[name], rtol=0, atol=1e-6)
    torch.testing.assert_close(logits(loaded), before, rtol=0, atol=1e-5)


def merged_by_peft(layer: AdaptedLinear, weight: torch.Tensor) -> torch.Tensor:
    """The weight after peft's own merge, which is taken back."""
    with torch.no_grad():
        layer.merge()
        merged = layer.get_parameter("base_layer.weight").clone()
        layer.unmerge()
        layer.get_parameter("base_layer.weight").copy_(weight)
    return merged


def test_merging_in_bf16_rounds_once(build: Build) -> None:
    loaded = adapted(build("clip_llama"), LLM)
    loaded.model.to(torch.bfloat16)
    expected = {}
    for name, layer in adapted_layers(loaded.model).items():
        a, b = layer.get_parameter("lora_A.default.weight"), layer.get_parameter("lora_B.default.weight")
        exact = layer.get_parameter("base_layer.weight").double() + 1.5 * (b.double() @ a.double())
        expected[name] = exact.to(torch.bfloat16)
    before = logits(loaded)
    merge_adapter(loaded.model)
    for name, weight in expected.items():
        # fp32 and fp64 sums may fall on two sides of a rounding: in a few of a thousand places, by one last bit
        assert float(torch.ne(loaded.model.get_parameter(f"{name}.weight"), weight).float().mean()) < 5e-3
    # bf16 has 8 bits: each layer's output is rounded to 2**-9 of itself, with and without the adapter differently
    difference = (logits(loaded) - before).abs().max().item()
    assert difference < 2**-5 * float(before.abs().max())


def test_rules_reach_the_adapter_by_its_own_name_only(build: Build) -> None:
    loaded = build("clip_llama")
    names = {name for name, _ in loaded.model.named_parameters()}
    begin_adapter(loaded.model, ALL_PARTS, None, seed=0)
    rules = {"lora": 2e-4, "connector": 2e-5, r"language_model\.model\.layers\.0\.self_attn\.q_proj\.weight$": 1e-5}
    groups = {group.pattern: group for group in loaded.model.train_only(rules)}
    assert all(".lora_" in name for name in groups["lora"].names)
    assert len(groups["lora"].names) == 2 * (2 * 7 + 2 + 2 * 6)  # the tower's last layer is not read: it does not train
    assert set(groups["connector"].names) == {
        f"multi_modal_projector.linear_{layer}.base_layer.{kind}" for layer in (1, 2) for kind in ("weight", "bias")
    }
    [by_expression] = groups[next(rule for rule in rules if "q_proj" in rule)].names
    assert by_expression == "language_model.model.layers.0.self_attn.q_proj.base_layer.weight"
    assert by_expression.replace(".base_layer", "") in names
    only_down = loaded.model.train_only({"lora": 1e-4, "lora_B": 0.0})
    assert all(".lora_A." in name for name in only_down[0].names)


def test_biases_alone_are_trained_by_a_rule(build: Build) -> None:
    [group] = build("siglip_qwen2").model.train_only({r"language_model.*bias$": 1e-4})
    assert len(group.names) == 2 * 3  # Qwen2 has biases in q, k and v
    with pytest.raises(ConfigError, match=r"'language_model\.\*bias\$' matches no parameter"):
        build("clip_llama").model.train_only({r"language_model.*bias$": 1e-4})


def test_gradients_are_the_same_with_activations_recomputed(build: Build) -> None:
    found = []
    for recompute in (False, True):
        loaded = adapted(build("clip_llama"), LLM)
        loaded.model.train_only({"lora": 1e-4, "connector": 1e-5})
        if recompute:
            loaded.model.enable_activation_checkpointing()
        loaded.model.train()
        loaded.model(two_packed_samples(loaded)).backward()
        found.append(gradients(loaded.model))
    assert len(found[0]) == 2 * 14 + 4
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=0, atol=1e-6)


def test_packed_samples_stay_apart(build: Build) -> None:
    loaded = adapted(build("clip_llama"), LLM)
    batch = two_packed_samples(loaded)
    second = int((batch.position_ids[0] == 0).nonzero()[1])
    with torch.no_grad():
        before = loaded.model.logits(batch)[0, second:]
        batch.input_ids[0, second - 1] += 1
        assert torch.equal(loaded.model.logits(batch)[0, second:], before)


@pytest.mark.parametrize(
    ("kind", "targets", "message"),
    [
        ("clip_llama", ("q_prj",), r"lora.targets: 'q_prj' matches no linear layer"),
        ("clip_llama", ("q_proj", "lm_head"), r"'lm_head' matches the head, which has no adapter"),
        ("open_clip_llama", ("vision_tower",), "stored under other names than it has in memory"),
    ],
)
def test_targets_that_cannot_be_adapted_are_refused(
    build: Build, kind: str, targets: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        begin_adapter(build(kind).model, Lora(targets=targets), None, seed=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"lora": {}, "train": {"connector": 1e-4}}, "lora: needs a learning rate above 0"),
        ({"lora": {}, "train": {"lora": 0.0, "connector": 1e-4}}, "lora: needs a learning rate above 0"),
        ({"train": {"lora": 1e-4}}, "the rule 'lora' needs the section 'lora'"),
        ({"lora": {"targets": ["("]}, "train": {"lora": 1e-4}}, "is no regular expression"),
    ],
)
def test_a_stage_with_half_a_lora_is_refused(change: dict[str, Any], message: str) -> None:
    stage = {"data": {"mix": [{"shards": "x"}]}, "batch": {"length": 128, "tokens_per_step": 512}}
    with pytest.raises(ValueError, match=message):
        Stage.model_validate(stage | change)
