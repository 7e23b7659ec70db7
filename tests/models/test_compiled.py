"""Layers that torch compiles compute what they computed before, with the same code for rows of any lengths."""

from __future__ import annotations

from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import pytest
import torch
from models_support import batch_of, gradients, sample
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from mmit.batch import Batch
from mmit.errors import ConfigError
from mmit.models import LoadedModel
from mmit.models.attention import PACKED, packed_attention
from mmit.models.compiled import compile_layers, why_not_compiled

Build = Callable[..., LoadedModel]


@pytest.fixture
def compiler(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Generator[None]:
    """torch's compiler, with its files in a folder of the test, in this process alone, and nothing left behind."""
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    from torch._inductor import config

    with config.patch(compile_threads=1):
        yield
    torch.compiler.reset()
    AttentionInterface.register(PACKED, packed_attention)


def rows(loaded: LoadedModel) -> list[Batch]:
    """Two packed samples with a picture; one sample; three in two rows; a row without labels: one token runs."""
    first = sample(loaded, text=range(40, 50), images=1, trained=4, seed=1)
    second = sample(loaded, text=range(60, 75), images=0, trained=6, seed=2)
    untrained = sample(loaded, text=range(90, 95), images=0, trained=0, seed=3)
    contents = [[[first, second]], [[second]], [[first, second], [first]], [[untrained]]]
    return [batch_of(loaded, content) for content in contents]


# torch's compiler asks every tensor for its gradient, also those that keep none
@pytest.mark.long
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_layers_give_the_plain_loss_and_gradients_and_are_compiled_once_for_all_lengths(
    build: Build, compiler: None
) -> None:
    from torch._dynamo.utils import counters

    loaded = build("clip_llama")
    model = loaded.model
    model.train_only({"connector": 1.0, "language_model": 1.0})
    model.train()
    names = [name for name, _ in model.named_parameters()]
    batches = rows(loaded)

    def results() -> list[tuple[float, dict[str, torch.Tensor]]]:
        found = []
        for batch in batches:
            loss = model(batch)
            loss.backward()
            found.append((float(loss.detach()), gradients(model)))
        return found

    plain = results()
    compile_layers(model.language_model, attention=model.attention)
    assert [name for name, _ in model.named_parameters()] == names
    counters.clear()
    model(batches[0]).backward()
    gradients(model)
    graphs = counters["stats"]["unique_graphs"]
    # before its attention: the norm, then queries, keys and values; behind it: the output, then norm and feed-forward
    assert graphs == 4
    compiled = results()
    model.enable_activation_checkpointing()
    recomputed = results()
    assert counters["stats"]["unique_graphs"] == graphs
    for found in (compiled, recomputed):
        for (loss, gradient), (plain_loss, plain_gradient) in zip(found, plain, strict=True):
            assert loss == pytest.approx(plain_loss, abs=1e-4)  # a sum of up to 14 terms of about 6
            assert gradient.keys() == plain_gradient.keys()
            for name, expected in plain_gradient.items():
                # fp32, the same sums in another order
                torch.testing.assert_close(gradient[name], expected, rtol=1e-4, atol=2e-5, msg=name)


def test_what_is_not_compiled_is_refused_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: dict[str, Any] = {"vocab_size": 60, "hidden_size": 8, "intermediate_size": 8, "num_attention_heads": 2}
    llama = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2, num_key_value_heads=2))
    experts = MixtralForCausalLM(MixtralConfig(**sizes, num_hidden_layers=2, num_local_experts=2))
    assert why_not_compiled(llama, attention=PACKED) == ""
    assert "mixture of experts" in why_not_compiled(experts, attention=PACKED)
    assert "'flash_attention_2' are not compiled" in why_not_compiled(llama, attention="flash_attention_2")
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(ConfigError, match=r"compile: .*no-such-compiler, which is not installed; set it to false"):
        compile_layers(llama, attention=PACKED)
    llama.get_submodule("model.layers.0.mlp").add_module("drop", torch.nn.Dropout(0.1))
    assert "dropout" in why_not_compiled(llama, attention=PACKED)
