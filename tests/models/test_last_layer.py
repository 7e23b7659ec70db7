"""What a loss does not depend on is left out: the last layer's matrices elsewhere, tokens behind the last label.

And what several samples begin with runs once.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from models_support import batch_of, gradients, sample
from torch import nn
from torch.nn import functional
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    LlamaConfig,
    MixtralConfig,
    Phi3Config,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen3Config,
)

from mmit.batch import IGNORE, Batch, Encoded, HostIds
from mmit.models import LoadedModel, VisionLanguageModel, attention
from mmit.models.connectors import MlpProjector
from mmit.models.needed import all_tokens, needed_tokens
from mmit.models.shared_prefix import longest_shared, share_prefix

Build = Callable[..., LoadedModel]
SIZES: dict[str, Any] = {
    "vocab_size": 600,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "pad_token_id": 0,
}
FAMILIES: dict[str, tuple[PreTrainedConfig, set[str]]] = {
    "llama": (LlamaConfig(**SIZES), {"self_attn.q_proj", "self_attn.o_proj", "mlp"}),
    "qwen3": (Qwen3Config(**SIZES, head_dim=8), {"self_attn.q_proj", "self_attn.o_proj", "mlp"}),
    # queries, keys and values come out of one matrix, and keys are wanted everywhere
    "phi3": (Phi3Config(**SIZES), {"self_attn.o_proj", "mlp"}),
    "gpt_neox": (GPTNeoXConfig(**SIZES), {"attention.dense", "mlp"}),
    "mixtral": (MixtralConfig(**SIZES, num_local_experts=2), set()),
}


def with_language_model(parts: LoadedModel, config: PreTrainedConfig) -> LoadedModel:
    torch.manual_seed(0)
    maker: Any = AutoModelForCausalLM
    language_model: PreTrainedModel = maker.from_config(config)
    model = VisionLanguageModel(
        vision_tower=parts.model.vision_tower,
        connector=MlpProjector(width_in=24, width_out=32, depth=2),
        language_model=language_model,
        spec=parts.model.spec,
        image_id=parts.image_id,
    )
    model.train_only({"connector": 1.0, "language_model": 1.0})
    return replace(parts, model=model.train())


def some_rows(loaded: LoadedModel, *, seed: int = 0) -> Batch:
    """Two rows of unequal length: with pictures, without, with tokens behind the last label, and without a label."""
    first = sample(loaded, text=range(40, 50), images=1, trained=4, seed=seed + 1)
    cut = replace(first, labels=first.labels.index_fill(0, torch.arange(first.length - 4, first.length), IGNORE))
    second = sample(loaded, text=range(60, 65), images=0, trained=2, seed=seed + 2)
    untrained = sample(loaded, text=range(90, 95), images=1, trained=0, seed=seed + 4)
    return batch_of(loaded, [[first, second, cut], [untrained, second]])


def plain_gradients(loaded: LoadedModel, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    loss = functional.cross_entropy(
        loaded.model.logits(batch).flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    loss.backward()
    return float(loss.detach()), gradients(loaded.model)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_last_layer_runs_where_a_label_is_and_loss_and_gradients_are_the_plain_ones(
    build: Build, family: str
) -> None:
    config, expected = FAMILIES[family]
    loaded = with_language_model(build(), config)
    names = {id(module): name for name, module in loaded.model.language_model.named_modules()}
    found = {names[id(module)].partition(".1.")[2] for module in loaded.model.last_layer.modules}
    assert found == expected
    batch = some_rows(loaded)
    plain_loss, plain = plain_gradients(loaded, batch)
    rows = positions_seen(loaded.model.last_layer.modules)
    loss = loaded.model(batch)
    loss.backward()
    assert set(rows) <= {int((batch.labels != IGNORE).sum())}
    assert float(loss.detach()) == pytest.approx(plain_loss, abs=1e-4)  # a sum of 8 terms of about 6
    mine = gradients(loaded.model)
    assert mine.keys() == plain.keys()
    for name, gradient in plain.items():
        # fp32, the same products in sums of another order
        torch.testing.assert_close(mine[name], gradient, rtol=1e-4, atol=2e-5, msg=name)


def positions_seen(modules: tuple[nn.Module, ...]) -> list[int]:
    """Filled, at each call, with the number of positions that a matrix inside multiplies."""
    seen: list[int] = []
    for linear in (inner for module in modules for inner in module.modules() if isinstance(inner, nn.Linear)):
        inside = "forward"
        plain = linear.forward

        def noting(states: torch.Tensor, plain: Callable[[torch.Tensor], torch.Tensor] = plain) -> torch.Tensor:
            seen.append(states.shape[0] * states.shape[1])
            return plain(states)

        linear.__dict__[inside] = noting
    return seen


def test_a_layer_that_is_computed_again_takes_the_places_of_its_own_forward(build: Build) -> None:
    """Two micro-batches forward, then both backward, with activation checkpointing."""
    loaded = with_language_model(build(), FAMILIES["llama"][0])
    one, two = some_rows(loaded), batch_of(loaded, [[sample(loaded, text=range(70, 83), images=2, trained=6)]])
    _, first = plain_gradients(loaded, one)
    _, second = plain_gradients(loaded, two)
    loaded.model.enable_activation_checkpointing()
    losses = [loaded.model(one), loaded.model(two)]
    for loss in losses:
        loss.backward()
    for name, gradient in gradients(loaded.model).items():
        torch.testing.assert_close(gradient, first[name] + second[name], rtol=1e-4, atol=4e-5, msg=name)


def test_every_second_layer_is_computed_again_and_no_gradient_changes(build: Build) -> None:
    loaded = with_language_model(build(), FAMILIES["llama"][0])
    batch = some_rows(loaded)
    loaded.model(batch).backward()
    kept = gradients(loaded.model)
    loaded.model.enable_activation_checkpointing(every=2)
    runs: list[int] = []
    for number, layer in enumerate(loaded.model.language_model.get_submodule("model.layers").children()):
        layer.get_submodule("mlp").register_forward_pre_hook(lambda *_, number=number: runs.append(number))
    loaded.model(batch).backward()
    assert runs == [0, 1, 0]
    assert all(torch.equal(kept[name], gradient) for name, gradient in gradients(loaded.model).items())


def test_no_token_runs_behind_the_last_label_of_its_sample() -> None:
    x = IGNORE
    positions = torch.tensor([[0, 1, 2, 3, 0, 1, 2], [0, 1, 0, 1, 2, 0, 1]])
    labels = torch.tensor([[x, 5, x, x, x, x, x], [7, x, x, 8, 9, x, x]])
    found = needed_tokens(HostIds(input_ids=labels, position_ids=positions, labels=labels))
    assert found.tokens is not None
    assert found.tokens.tolist() == [0, 1, 7, 9, 10, 11]
    assert found.position_ids.tolist() == [[0, 1, 0, 0, 1, 2]]
    assert found.labels.tolist() == [5, 7, 8, 9]
    assert found.labelled.tolist() == [1, 2, 4, 5]
    whole = all_tokens(HostIds(input_ids=labels, position_ids=positions, labels=labels))
    assert whole.labelled.tolist() == [1, 7, 10, 11]
    none = torch.full_like(labels, x)
    assert needed_tokens(HostIds(input_ids=labels, position_ids=positions, labels=none)).position_ids.tolist() == [[0]]


def test_the_prefix_is_shared_whose_copies_are_most_tokens() -> None:
    # three tokens of two lists are 3 to save, two tokens of three lists 4, and one of two 1
    assert longest_shared([[1, 2, 3], [9], [1, 2], [1, 2, 3, 4], [9, 8]]) == (2, (0, 2, 3))
    assert longest_shared([[], [1], [2]]) == (0, ())


def test_a_shared_prefix_stands_in_front_and_every_token_and_label_keeps_its_sample() -> None:
    x, image = IGNORE, 99
    ids = torch.tensor([[7, 5, 5, 1, 2, 3, image, 1, 2, 3, 4, 1, 2, 6]])
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2]])
    labels = torch.tensor([[x, x, 5, x, x, x, 8, x, x, 4, 9, x, x, 9]])
    host = HostIds(input_ids=ids, position_ids=positions, labels=labels)
    found = share_prefix(needed_tokens(host), host, image_id=image)
    # of 1 2 3 the second 3 has a label of its own
    assert found.tokens is not None
    assert found.tokens.tolist() == [3, 4, 0, 1, 2, 5, 6, 9, 10, 13]
    assert found.position_ids.tolist() == [[0, 1, 0, 1, 2, 2, 3, 2, 3, 2]]
    assert found.samples is not None
    assert found.samples[0, 0].tolist() == [[0, 2, 5, 0], [0, 5, 7, 2], [0, 7, 9, 2], [0, 9, 10, 2]]
    assert found.labels.tolist() == [5, 8, 4, 9, 9]
    assert ids.view(-1)[found.tokens[found.labelled]].tolist() == [5, image, 3, 4, 6]
    every = HostIds(input_ids=ids, position_ids=positions, labels=ids)
    assert share_prefix(needed_tokens(every), every, image_id=image).samples is None


@pytest.mark.parametrize("blocks", [True, False])
@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "mixtral"])
def test_a_prefix_of_several_samples_runs_once_and_loss_and_gradients_are_the_plain_ones(
    build: Build, monkeypatch: pytest.MonkeyPatch, family: str, *, blocks: bool
) -> None:
    monkeypatch.setattr(attention, "serves", lambda *_: blocks)
    loaded = with_language_model(build(), FAMILIES[family][0])
    system = torch.arange(200, 206)

    def told(encoded: Encoded) -> Encoded:
        unlabelled = torch.full_like(system, IGNORE)
        ids, labels = torch.cat([system, encoded.input_ids]), torch.cat([unlabelled, encoded.labels])
        return replace(encoded, input_ids=ids, labels=labels)

    one, two = (told(sample(loaded, text=range(40, 50), images=count, trained=4, seed=count)) for count in (1, 0))
    other = sample(loaded, text=range(60, 65), images=1, trained=2, seed=3)
    batch = batch_of(loaded, [[other, one, two], [told(other)]])
    plain_loss, plain = plain_gradients(loaded, batch)
    lengths: list[int] = []
    layer = loaded.model.language_model.base_model.get_submodule("layers.0")
    layer.register_forward_pre_hook(lambda _, inputs: lengths.append(inputs[0].shape[1]))
    loss = loaded.model(batch)
    loss.backward()
    needed = len(needed_tokens(batch.ids).position_ids[0])
    assert lengths == [needed if family == "mixtral" else needed - 2 * len(system)]
    assert float(loss.detach()) == pytest.approx(plain_loss, abs=1e-4)  # a sum of 12 terms of about 6
    for name, gradient in gradients(loaded.model).items():
        # fp32, the same products in sums of another order
        torch.testing.assert_close(gradient, plain[name], rtol=1e-4, atol=2e-5, msg=name)


@pytest.mark.parametrize("images", [0, 2])
def test_a_step_asks_its_device_for_nothing(build: Build, images: int) -> None:
    """The meta device has no values: whatever waited for one would raise."""
    loaded = build()
    model = loaded.model.train()
    model.train_only({"connector": 1.0, "language_model": 1.0})
    row = [
        sample(loaded, text=range(40, 50), images=images, trained=4),
        sample(loaded, text=[9, 8], images=0, trained=1),
    ]
    batch = batch_of(loaded, [row, row[:1]])
    model.to("meta")
    model(batch.to("meta")).backward()
    assert gradients(model).keys() == {name for name, p in model.named_parameters() if p.requires_grad}
