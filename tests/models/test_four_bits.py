"""Language models in four bits: what is rounded, what trains, and what is saved."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_factories import LLM, logits, two_packed_samples
from torch import nn

from mmit.config import Stage
from mmit.errors import MissingExtra
from mmit.models import LoadedModel, begin_adapter, load_model, load_weights, save_model
from mmit.models.four_bits import FourBitLinear, pack

Build = Callable[..., LoadedModel]
QLORA = LLM.model_copy(update={"quantize": "nf4"})
# QLoRA, appendix E: the 16 values of NF4
NF4 = (-1.0, -0.69619280, -0.52507305, -0.39491749, -0.28444138, -0.18477343, -0.09105004, 0.0)
NF4 += (0.07958030, 0.16093020, 0.24611230, 0.33791524, 0.44070983, 0.56261700, 0.72295684, 1.0)


def nearest(weight: torch.Tensor) -> torch.Tensor:
    """Every 64 weights as the nearest of 16 values times the largest of them."""
    blocks = weight.float().reshape(-1, 64)
    largest = blocks.abs().amax(dim=1, keepdim=True)
    values = torch.tensor(NF4)
    index = (blocks[:, :, None] / largest[:, :, None] - values).abs().argmin(dim=2)
    return (values[index] * largest).to(weight.dtype).view_as(weight)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_weight_becomes_the_nearest_of_16_values_and_then_stays(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    linear = nn.Linear(96, 32)
    linear.weight.data = torch.randn((32, 96), generator=generator)
    linear = linear.to(dtype)
    packed = FourBitLinear(linear)
    # products of fp32 numbers, one of them printed with 8 digits; in bf16 rounded once more
    torch.testing.assert_close(
        packed.weight, nearest(linear.weight.detach()), rtol=2**-8 if dtype == torch.bfloat16 else 0, atol=1e-6
    )
    held = sum(buffer.numel() * buffer.element_size() for buffer in (packed.codes, packed.sizes))
    assert held * 8 == 32 * 96 * 4.5
    rounded = nn.Linear(96, 32, dtype=dtype)
    rounded.weight.data = packed.weight
    again = FourBitLinear(rounded)
    assert torch.equal(again.codes, packed.codes)
    assert torch.equal(again.weight, packed.weight)
    cast = packed.to(torch.bfloat16)  # as DeepSpeed casts the whole model
    assert torch.equal(cast.weight, again.weight)


def test_outputs_and_gradients_are_those_of_the_rounded_weight() -> None:
    linear = nn.Linear(64, 8)
    packed = FourBitLinear(linear)
    rounded = nn.Linear(64, 8)
    rounded.load_state_dict({"weight": packed.weight, "bias": linear.bias})
    inputs = torch.randn((5, 64), generator=torch.Generator().manual_seed(1))
    found = []
    for layer in (packed, rounded):
        given = inputs.clone().requires_grad_()
        layer(given).square().sum().backward()
        found.append((given.grad, layer.bias.grad))
    for ours, expected in zip(*found, strict=True):
        torch.testing.assert_close(ours, expected, rtol=0, atol=1e-5)  # fp32 sums in two orders


def test_the_language_model_is_packed_but_for_its_head_and_adapter(build: Build) -> None:
    model = build("siglip_qwen2").model
    begin_adapter(model, QLORA, None, seed=0)
    packed = [name for name, module in model.named_modules() if isinstance(module, FourBitLinear)]
    assert len(packed) == 2 * 7
    assert all(name.startswith("language_model.model.layers.") and name.endswith("base_layer") for name in packed)
    biases = [group.names for group in model.train_only({"lora": 1e-4, r"language_model.*q_proj\.bias$": 1e-4})][1]
    assert len(biases) == 2


def test_a_model_in_four_bits_learns_and_is_saved_with_its_logits(build: Build, tmp_path: Path) -> None:
    loaded = build("clip_llama")
    plain = logits(loaded)
    begin_adapter(loaded.model, QLORA, None, seed=0)
    assert float((logits(loaded) - plain).abs().max()) > 0.05  # four bits are felt
    groups = loaded.model.train_only({"lora": 1e-2, "connector": 1e-3})
    assert {group.pattern for group in groups} == {"lora", "connector"}
    optimizer = torch.optim.AdamW([p for p in loaded.model.parameters() if p.requires_grad], lr=1e-2)
    batch, losses = two_packed_samples(loaded), []
    for _ in range(8):
        loss = loaded.model(batch)
        losses.append(float(loss.detach()))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.5 * losses[0]
    expected = logits(loaded)
    save_model(loaded, loaded.model.state_dict(), tmp_path / "model", made_from={})
    for adapter in ("keep", "merge"):
        opened = load_model(tmp_path / "model", dtype=torch.float32, adapter=adapter)
        # the products of a weight in four bits and of the same weight unpacked: fp32 sums
        torch.testing.assert_close(logits(opened), expected, rtol=0, atol=1e-5)
    again = build("clip_llama", seed=9)
    load_weights(again.model, tmp_path / "model", adapter="drop")
    begin_adapter(again.model, QLORA, tmp_path / "model", seed=1)
    assert torch.equal(logits(again), expected)


def test_dora_starts_from_the_rounded_weights(build: Build) -> None:
    without, loaded = build("clip_llama"), build("clip_llama")
    pack(without.model.language_model)
    begin_adapter(loaded.model, QLORA.model_copy(update={"dora": True}), None, seed=0)
    torch.testing.assert_close(logits(loaded), logits(without), rtol=0, atol=1e-5)


def test_what_cannot_be_in_four_bits_is_refused(build: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    stage: dict[str, Any] = {"data": {"mix": [{"shards": "x"}]}, "batch": {"length": 128, "tokens_per_step": 512}}
    stage |= {"lora": {"quantize": "nf4"}, "train": {"lora": 1e-4}}
    Stage.model_validate(stage)
    with pytest.raises(ValueError, match=r"nf4 cannot be partitioned by zero\.stage 3; take 0, 1 or 2"):
        Stage.model_validate(stage | {"zero": {"stage": 3}})
    with pytest.raises(ValueError, match="cannot be trained by the rule 'language_model'"):
        Stage.model_validate(stage | {"train": {"lora": 1e-4, "language_model": 1e-5}})
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    with pytest.raises(MissingExtra, match=r"lora\.quantize: nf4 needs the package 'bitsandbytes'.*mmit\[qlora\]"):
        begin_adapter(build("clip_llama").model, QLORA, None, seed=0)
