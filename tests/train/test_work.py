"""The operations of a step are those that torch counts, and MFU is their share of what the devices reach."""

from pathlib import Path
from typing import Any

import pytest
import torch
from model_factories import tiny_llm_dir
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM

from mmit.config import ComposedModel
from mmit.models.flops import LanguageModelShape, language_model_shape, shape_of
from mmit.train.counts import Counts
from mmit.train.work import Work, peak


def counts(*, tokens: int, squares: int, labels: int, tiles: int) -> Counts:
    return Counts(
        trained_tokens=labels,
        tokens=tokens,
        images=tiles,
        squares=squares,
        samples=1,
        skipped=0,
        digest=0,
        stops=0,
        skipped_of=(),
    )


def test_a_step_is_what_torch_counts_in_forward_and_backward(tmp_path: Path) -> None:
    """A row of 64 tokens, all of them labelled; torch counts attention that looks both ways, twice ours."""
    model = AutoModelForCausalLM.from_pretrained(tiny_llm_dir(tmp_path / "llama", "llama"), attn_implementation="eager")
    ids = torch.arange(64).view(1, -1)
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids).logits.sum().backward()
    shape = shape_of(model)
    ours = shape.flops(tokens=64, squares=64**2, labels=64)
    attention = 6 * shape.layers * shape.attention_width * 64**2
    # the inputs of the first layer need no gradient
    assert ours + attention == pytest.approx(counter.get_total_flops(), rel=0.02)


def test_a_shape_is_the_same_with_and_without_weights(tmp_path: Path) -> None:
    path = tiny_llm_dir(tmp_path / "llama", "llama")
    section = {"encoder": {"type": "transformers", "path": "p"}, "connector": {"type": "mlp"}}
    whole = ComposedModel.model_validate({**section, "language_model": {"path": str(path), "template": "vicuna"}})
    model = AutoModelForCausalLM.from_pretrained(path)
    assert shape_of(model) == language_model_shape(whole, {"language_model": 1e-3})
    model.requires_grad_(False)
    assert shape_of(model) == language_model_shape(whole, {"connector": 1e-3})


def test_of_experts_those_count_that_a_token_is_sent_to() -> None:
    """Two of four: three matrices of 16 x 24 each."""
    sizes: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "vocab_size": 50}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 2, "head_dim": 8}
    config = MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2)
    shape = shape_of(MixtralForCausalLM(config))
    assert shape.parameters == 4 * 16 * 16 + 4 * 16 + 2 * 3 * 16 * 24  # attention, router, experts


def test_mfu_is_operations_over_seconds_over_what_the_devices_reach() -> None:
    shape = LanguageModelShape(parameters=100, layers=1, attention_width=10, head=50, trains=True)
    work = Work(shape=shape, tile=1000, peak=50_000.0)
    step = counts(tokens=20, squares=200, labels=5, tiles=3)
    assert work.flops(step) == 6 * 100 * 20 + 6 * 10 * 200 + 6 * 50 * 5 + 3 * 1000 == 28_500
    assert work.mfu(step, 2.0) == pytest.approx(0.285)


def test_measuring_the_devices_takes_no_random_number() -> None:
    torch.manual_seed(1)
    wanted = torch.rand(3)
    torch.manual_seed(1)
    assert peak(torch.float32) > 1e8
    assert torch.equal(torch.rand(3), wanted)
