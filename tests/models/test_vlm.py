"""The model as a whole: placeholders, the loss, ranks without images, activation checkpointing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from models_support import batch_of, gradients, sample
from torch.nn import functional
from transformers import CohereConfig, CohereForCausalLM, Gemma2Config, Gemma2ForCausalLM, PreTrainedModel

from mmit.batch import IGNORE, collate
from mmit.errors import DataError
from mmit.models import LoadedModel, VisionLanguageModel
from mmit.models.connectors import MlpProjector
from mmit.models.encoders import VisionEncoder
from mmit.models.vlm import tower_features

Build = Callable[..., LoadedModel]


def two_rows(loaded: LoadedModel):
    """Two rows of two samples each, with images, without, and with none of its tokens trained."""
    first = sample(loaded, text=range(40, 50), images=1, trained=4, seed=1)
    second = sample(loaded, text=range(60, 65), images=0, trained=2, seed=2)
    third = sample(loaded, text=range(70, 83), images=2, trained=6, seed=3)
    untrained = sample(loaded, text=range(90, 95), images=0, trained=0, seed=4)
    return batch_of(loaded, [[first, second], [third, untrained]])


def test_the_loss_is_the_sum_over_all_labels_of_the_cross_entropy_of_all_logits(loaded: LoadedModel) -> None:
    batch = two_rows(loaded)
    with torch.no_grad():
        loss = loaded.model(batch)
        logits = loaded.model.logits(batch)
    expected = functional.cross_entropy(
        logits.flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    assert loss.dtype == torch.float32
    assert loss.shape == ()
    assert float(loss) == pytest.approx(float(expected), abs=1e-4)  # a sum of 12 terms of about 6


def test_all_parameters_get_the_gradients_of_the_plain_loss(loaded: LoadedModel) -> None:
    batch = two_rows(loaded)
    model = loaded.model.train()
    model.train_only({"connector": 1.0, "language_model": 1.0, "vision_tower": 1.0})
    model(batch).backward()
    mine = gradients(model)
    functional.cross_entropy(
        model.logits(batch).flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE, reduction="sum"
    ).backward()
    expected = gradients(model)
    assert mine.keys() == expected.keys()
    assert mine.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    for name, gradient in expected.items():
        torch.testing.assert_close(mine[name], gradient, rtol=1e-4, atol=2e-5, msg=name)


def test_a_batch_without_a_label_has_loss_zero_and_gradients_zero_everywhere(build: Build) -> None:
    loaded = build()
    model = loaded.model.train()
    model.train_only({"connector": 1.0, "language_model": 1.0})
    loss = model(batch_of(loaded, [[sample(loaded, text=range(40, 50), images=1, trained=0)]]))
    loss.backward()
    assert float(loss.detach()) == 0.0
    found = gradients(model)
    assert found.keys() == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert all(float(gradient.abs().max()) == 0.0 for gradient in found.values())


def test_a_batch_without_images_gives_every_trained_part_a_gradient_and_changes_none(build: Build) -> None:
    """The zero tile: what it adds is exactly nothing, but tower and connector take part on every rank."""
    loaded = build()
    model = loaded.model.train()
    model.train_only({"connector": 1.0, "language_model": 1.0, "vision_tower": 1.0})
    with_image = sample(loaded, text=range(40, 50), images=1, trained=4)
    text_only = sample(loaded, text=range(60, 70), images=0, trained=3)
    model(batch_of(loaded, [[with_image]])).backward()
    model(batch_of(loaded, [[text_only]])).backward()  # adds to the gradients of the first
    both = gradients(model)
    model(batch_of(loaded, [[with_image]])).backward()
    image_part = gradients(model)
    model(batch_of(loaded, [[text_only]])).backward()
    text_part = gradients(model)
    for name, gradient in image_part.items():
        if not name.startswith("language_model."):
            assert torch.equal(both[name], gradient), name
            assert float(text_part[name].abs().max()) == 0.0
    assert text_part.keys() == image_part.keys()
    plain = model.language_model(input_ids=text_only.input_ids[None], use_cache=False).logits[0]
    expected = functional.cross_entropy(plain, text_only.labels, ignore_index=IGNORE, reduction="sum")
    assert float(model(batch_of(loaded, [[text_only]])).detach()) == pytest.approx(float(expected.detach()), abs=1e-5)


def test_tower_and_connector_run_once_in_every_forward(build: Build) -> None:
    loaded = build()
    calls: list[int] = []
    loaded.model.vision_tower.register_forward_hook(lambda *_: calls.append(1))
    loaded.model.multi_modal_projector.register_forward_hook(lambda *_: calls.append(2))
    head = loaded.model.language_model.get_output_embeddings()
    head.register_forward_hook(lambda *_: calls.append(3))
    for images, trained in ((2, 3), (0, 3), (0, 0)):
        loaded.model(batch_of(loaded, [[sample(loaded, text=range(40, 50), images=images, trained=trained)]]))
    assert calls == [1, 2, 3] * 3


@pytest.mark.parametrize(("images", "kept"), [(2, 1), (1, 0)])
def test_a_wrong_number_of_placeholders_is_an_error_with_both_numbers(build: Build, images: int, kept: int) -> None:
    loaded = build()
    batch = batch_of(loaded, [[sample(loaded, text=range(40, 50), images=images, trained=4)]])
    with pytest.raises(DataError, match=f"{4 * images} image placeholders and {kept} tiles x 4 tokens"):
        loaded.model(replace(batch, pixels=batch.pixels[:kept]))


def test_a_frozen_tower_keeps_no_activations_and_stays_in_eval_mode(build: Build) -> None:
    model = build().model
    model.train_only({"connector": 1.0})
    model.train()
    assert not model.vision_tower.training
    assert model.language_model.training
    seen: list[bool] = []
    model.vision_tower.register_forward_hook(lambda _module, _inputs, output: seen.append(output.requires_grad))
    patches = model.patches(torch.zeros((1, 3, *model.spec.size), dtype=torch.uint8))
    assert seen == [False]
    assert model.multi_modal_projector(patches).requires_grad


def test_activation_checkpointing_changes_no_gradient(build: Build) -> None:
    loaded = build()
    model = loaded.model.train()
    model.train_only({"connector": 1.0, "language_model": 1.0})
    batch = two_rows(loaded)
    model(batch).backward()
    kept = gradients(model)
    model.enable_activation_checkpointing()
    model(batch).backward()
    recomputed = gradients(model)
    assert all(torch.equal(kept[name], recomputed[name]) for name in kept)


def test_another_attention_gives_the_same_loss(build: Build) -> None:
    loaded = build()
    batch = two_rows(loaded)
    with torch.no_grad():
        packed = float(loaded.model(batch))
        for asked in ("eager", "sdpa"):
            loaded.model.use_attention(asked)
            assert loaded.model.attention == asked
            assert float(loaded.model(batch)) == pytest.approx(packed, abs=1e-4)  # a sum of 12 terms of about 6


def gemma2() -> PreTrainedModel:
    config = Gemma2Config(
        vocab_size=600,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        final_logit_softcapping=1.0,
    )
    return Gemma2ForCausalLM(config)


def cohere() -> PreTrainedModel:
    config = CohereConfig(
        vocab_size=600, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4
    )
    return CohereForCausalLM(config)


@pytest.mark.parametrize("make", [gemma2, cohere])
def test_soft_capped_and_scaled_logits_go_through_the_models_own_forward(
    build: Build, make: Callable[[], PreTrainedModel]
) -> None:
    parts = build()
    assert parts.model.head_is_plain
    torch.manual_seed(0)
    model = VisionLanguageModel(
        vision_tower=parts.model.vision_tower,
        connector=MlpProjector(width_in=24, width_out=32, depth=2),
        language_model=make(),
        spec=parts.model.spec,
        image_id=parts.image_id,
    )
    assert not model.head_is_plain
    loaded = replace(parts, model=model)
    batch = two_rows(loaded)
    model.train_only({"connector": 1.0, "language_model": 1.0})
    loss = model(batch)
    expected = functional.cross_entropy(
        model.logits(batch).flatten(0, 1), batch.labels.flatten(), ignore_index=IGNORE, reduction="sum"
    )
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), abs=1e-4)
    loss.backward()
    assert gradients(model).keys() == {name for name, p in model.named_parameters() if p.requires_grad}


def test_features_in_the_place_of_pixels_give_the_loss_of_the_pixels(loaded: LoadedModel) -> None:
    batch = two_rows(loaded)
    with torch.no_grad():
        features = tower_features(loaded.model.vision_tower, batch.pixels, loaded.model.spec)
        seen = loaded.model(batch)
        taken = loaded.model(replace(batch, pixels=batch.pixels[:0], features=features))
    assert batch.tiles == replace(batch, pixels=batch.pixels[:0], features=features).tiles == 3
    assert torch.equal(seen, taken)


def test_a_batch_of_features_without_an_image_still_runs_the_connector(loaded: LoadedModel) -> None:
    text = sample(loaded, text=range(60, 65), images=0, trained=2, seed=2)
    tower = loaded.model.vision_tower
    assert isinstance(tower, VisionEncoder)
    size = (tower.patches, tower.width)
    batch = collate([[text]], pad_id=loaded.pad_id, image_size=loaded.model.spec.canvas, feature_size=size)
    assert batch.features is not None
    assert batch.features.shape == (0, *size)
    model = loaded.model.train()
    model.train_only({"connector": 1.0})
    model(batch).backward()
    assert all(bool((gradient == 0).all()) for gradient in gradients(model).values())
    assert all(parameter.grad is None for parameter in model.vision_tower.parameters())
