"""Samples packed into a row must not see each other. The leak that transformers' defaults give is shown beside it."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import (
    AttentionInterface,
    BloomConfig,
    BloomForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from mmit.errors import ConfigError
from mmit.models import attention
from mmit.models.attention import FLASH, PACKED, attention_arguments, boundaries
from mmit.models.attention_choice import choose_attention, packing_fault, set_attention, sliding_window

SIZES: dict[str, Any] = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "initializer_range": 0.3,
}
LENGTHS = (9, 1, 6)
# fp32: only the order of sums within attention may differ between a long and a short call
ROUNDING = 1e-5


def llama() -> PreTrainedModel:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES)).eval()


def qwen2() -> PreTrainedModel:
    torch.manual_seed(0)
    return Qwen2ForCausalLM(Qwen2Config(**SIZES)).eval()


def mistral() -> PreTrainedModel:
    """Looks back on four tokens, fewer than the longest sample has."""
    torch.manual_seed(0)
    return MistralForCausalLM(MistralConfig(**SIZES, sliding_window=4)).eval()


def gemma2() -> PreTrainedModel:
    """Soft-capped scores: no attention of ours."""
    torch.manual_seed(0)
    return Gemma2ForCausalLM(Gemma2Config(**SIZES, sliding_window=4)).eval()


FAMILIES = {"llama": llama, "qwen2": qwen2, "mistral": mistral, "gemma2": gemma2}


def samples() -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(0, 64, (length,), generator=generator) for length in LENGTHS]


def packed_row(pieces: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Ids and positions of one row; repeated below with the samples in another order as a second row."""
    return torch.cat(pieces), torch.cat([torch.arange(len(piece)) for piece in pieces])


@torch.no_grad()
def logits_alone(model: PreTrainedModel, pieces: list[Tensor]) -> list[Tensor]:
    return [model(input_ids=piece[None], use_cache=False).logits[0] for piece in pieces]


def worst(packed: Tensor, alone: list[Tensor]) -> float:
    parts = packed.split([len(piece) for piece in alone])
    return max(float((part - one).abs().max()) for part, one in zip(parts, alone, strict=True))


@pytest.fixture(params=["blocks of queries", "torch's kernels"])
def either_way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """``mmit_packed`` as fp32 on CPUs has it, and as everything else has it."""
    monkeypatch.setattr(attention, "serves", lambda *_: request.param == "blocks of queries")


@pytest.mark.usefixtures("either_way")
@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_packed_rows_equal_separate_runs(family: str) -> None:
    model = FAMILIES[family]()
    pieces = samples()
    alone = logits_alone(model, pieces)
    implementation = choose_attention(model)
    assert implementation == ("eager" if family == "gemma2" else PACKED)
    model.set_attn_implementation(implementation)
    rows = [packed_row(pieces), packed_row(pieces[::-1])]
    ids, positions = (torch.stack(column) for column in zip(*rows, strict=True))
    told = attention_arguments(positions, implementation=implementation, window=sliding_window(model))
    logits = model(input_ids=ids, position_ids=positions, use_cache=False, **told).logits
    assert worst(logits[0], alone) < ROUNDING
    assert worst(logits[1], alone[::-1]) < ROUNDING


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@torch.no_grad()
def test_transformers_defaults_let_packed_samples_see_each_other(implementation: str) -> None:
    model = llama()
    model.set_attn_implementation(implementation)
    pieces = samples()
    alone = logits_alone(model, pieces)
    ids, positions = (part[None] for part in packed_row(pieces))
    right = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0]
    default_cache = model(input_ids=ids, position_ids=positions).logits[0]
    ones = torch.ones_like(ids)
    mask_of_ones = model(input_ids=ids, position_ids=positions, attention_mask=ones, use_cache=False).logits[0]
    assert worst(right, alone) < ROUNDING
    assert worst(default_cache, alone) > 0.1  # not rounding: ten thousand times the tolerance
    assert worst(mask_of_ones, alone) > 0.1


@pytest.mark.usefixtures("either_way")
def test_gradients_of_a_packed_row_are_the_sum_of_the_separate_ones() -> None:
    model = qwen2().train()
    pieces = samples()
    for piece in pieces:
        model(input_ids=piece[None], use_cache=False).logits.logsumexp(-1).sum().backward()
    separate = {name: parameter.grad.clone() for name, parameter in model.named_parameters()}
    model.set_attn_implementation(PACKED)
    ids, positions = (part[None] for part in packed_row(pieces))
    for recompute in (False, True):
        model.zero_grad()
        if recompute:
            model.activation_checkpointing_enable({"use_reentrant": False})
        told = attention_arguments(positions, implementation=PACKED, window=None)
        logits = model(input_ids=ids, position_ids=positions, use_cache=False, **told).logits
        logits.logsumexp(-1).sum().backward()
        for name, parameter in model.named_parameters():
            scale = float(separate[name].abs().max())
            assert float((parameter.grad - separate[name]).abs().max()) < 1e-5 * max(1.0, scale), name


def test_boundaries_name_every_sample_of_every_row() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]])
    assert boundaries(positions)[0, 0].tolist() == [[0, 0, 3, 0], [0, 3, 5, 0], [1, 0, 1, 0], [1, 1, 5, 0]]


@torch.no_grad()
def test_flash_attention_gets_the_cumulative_lengths_of_all_samples_of_all_rows() -> None:
    positions = torch.tensor([[0, 1, 2, 0, 1], [0, 0, 1, 2, 3]])
    told = attention_arguments(positions, implementation=FLASH, window=None)
    assert told["cu_seq_lens_q"].tolist() == told["cu_seq_lens_k"].tolist() == [0, 3, 5, 6, 10]
    assert told["cu_seq_lens_q"].dtype == torch.int32  # flash-attn takes no other
    assert (told["max_length_q"], told["max_length_k"], told["attention_mask"]) == (4, 4, None)
    # through a model: with a stand-in that reads these words as flash-attn does, rows equal separate runs
    AttentionInterface.register("stand_in", varlen_stand_in)
    model = llama()
    pieces = samples()
    alone = logits_alone(model, pieces)
    model.set_attn_implementation("stand_in")
    rows = [packed_row(pieces), packed_row(pieces[::-1])]
    ids, positions = (torch.stack(column) for column in zip(*rows, strict=True))
    told = attention_arguments(positions, implementation=FLASH, window=None)
    logits = model(input_ids=ids, position_ids=positions, use_cache=False, **told).logits
    assert worst(logits[0], alone) < ROUNDING
    assert worst(logits[1], alone[::-1]) < ROUNDING


def varlen_stand_in(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **told: Any
) -> tuple[Tensor, None]:
    """Attention over a flat row of samples, as flash_attn_varlen_func: (B, H, T, d) to (B, T, H, d)."""
    assert mask is None
    flat = [part.transpose(1, 2).flatten(0, 1) for part in (query, key, value)]  # (B * T, H, d)
    ends = told["cu_seq_lens_q"].tolist()
    made = []
    for start, end in pairwise(ends):
        q, k, v = (part[None, start:end].transpose(1, 2) for part in flat)
        one = functional.scaled_dot_product_attention(q, k, v, is_causal=True, scale=told["scaling"], enable_gqa=True)
        made.append(one[0].transpose(0, 1))
    return torch.cat(made).unflatten(0, (query.shape[0], query.shape[2])), None


def bloom() -> PreTrainedModel:
    torch.manual_seed(0)
    return BloomForCausalLM(BloomConfig(vocab_size=64, hidden_size=32, n_layer=2, n_head=4)).eval()


def mamba() -> PreTrainedModel:
    torch.manual_seed(0)
    return MambaForCausalLM(MambaConfig(vocab_size=64, hidden_size=32, num_hidden_layers=2, state_size=8)).eval()


@pytest.mark.parametrize(
    ("make", "fault"),
    [
        (bloom, "BloomForCausalLM does not keep the samples of a packed row apart"),
        (mamba, "MambaForCausalLM has layers of type linear_attention, which carry a state"),
    ],
)
def test_a_model_that_mixes_samples_says_why_they_may_not_share_a_row(
    make: Callable[[], PreTrainedModel], fault: str
) -> None:
    model = make()
    assert fault in packing_fault(model, implementation=choose_attention(model))


def test_a_model_that_sees_what_follows_is_refused() -> None:
    model = llama()
    model.set_attn_implementation("sdpa")
    assert packing_fault(model, implementation="sdpa") == ""
    model.config.is_causal = False
    with pytest.raises(ConfigError, match="sees what stands behind a token"):
        packing_fault(model, implementation="sdpa")


@pytest.mark.parametrize(
    ("make", "asked", "reason"),
    [
        (llama, FLASH, "it runs on GPUs only and the model is on cpu"),
        (llama, "flex_attention", "it runs on GPUs only"),
        (gemma2, "sdpa", "Gemma2ForCausalLM caps its scores, which it would leave out"),
        (gemma2, PACKED, "Gemma2ForCausalLM caps its scores"),
        (bloom, PACKED, "BloomForCausalLM does not go through transformers' attention interface"),
        (bloom, "sdpa", "BloomForCausalLM keeps 'eager'"),
    ],
)
def test_an_attention_that_cannot_run_is_refused(make: Callable[[], PreTrainedModel], asked: str, reason: str) -> None:
    with pytest.raises(ConfigError, match=f"attention: {asked} does not serve here: .*{reason}.*; set it to auto"):
        set_attention(make(), asked)
