"""The model against LlavaForConditionalGeneration of transformers with the same weights, for each kind of tower."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from model_factories import tiny_model_section
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration

from mmit.batch import IGNORE, Batch, Encoded, collate
from mmit.config import ComposedModel
from mmit.images import normalize
from mmit.models import LoadedModel, build_model, save_model

KINDS = ("clip_llama", "siglip_qwen2", "open_clip_llama")

Case = tuple[LoadedModel, Any, Path]


@pytest.fixture(scope="module", params=KINDS)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    """Ours, theirs opened from the directory that ours was saved to, and that directory."""
    folder = tmp_path_factory.mktemp(request.param)
    section = ComposedModel.model_validate(tiny_model_section(folder / "parts", request.param))
    ours = build_model(section, dtype=torch.float32, seed=5)
    save_model(ours, None, folder / "saved", made_from={"test": True})
    reader: Any = LlavaForConditionalGeneration
    theirs, report = reader.from_pretrained(folder / "saved", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    return ours, theirs.eval(), folder / "saved"


def a_sample(loaded: LoadedModel, *, seed: int = 1) -> Encoded:
    """Text, two images, text of which the last six tokens are trained."""
    image = [loaded.image_id] * loaded.model.spec.tokens_per_tile
    ids = torch.tensor([40, 41, *image, 42, *image, *range(50, 64)])
    labels = torch.full_like(ids, IGNORE)
    labels[-7:-1] = ids[-6:]
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.randint(0, 256, (2, 3, *loaded.model.spec.size), generator=generator, dtype=torch.uint8)
    return Encoded(id="s", input_ids=ids, labels=labels, pixels=pixels)


def a_batch(loaded: LoadedModel) -> Batch:
    return collate([[a_sample(loaded)]], pad_id=loaded.pad_id, image_size=loaded.model.spec.size)


# fp32, the same operations; open_clip joins q, k and v into one matrix product and transformers does not
LOGITS_MAY_DIFFER = 5e-6


@torch.no_grad()
def test_logits_are_those_of_transformers_and_depend_on_the_images(case: Case) -> None:
    ours, theirs, _ = case
    batch = a_batch(ours)
    mine = ours.model.logits(batch)
    other = theirs(input_ids=batch.input_ids, pixel_values=normalize(batch.pixels, ours.model.spec)).logits
    torch.testing.assert_close(mine, other, rtol=0, atol=LOGITS_MAY_DIFFER)
    turned = theirs(input_ids=batch.input_ids, pixel_values=normalize(batch.pixels.flip(0), ours.model.spec)).logits
    assert float((turned - other).abs().max()) > 1e-2


def test_loss_and_gradients_are_those_of_transformers(case: Case) -> None:
    ours, theirs, _ = case
    batch = a_batch(ours)
    ours.model.train_only({"connector": 1.0, "language_model": 1.0})
    mine = ours.model(batch) / batch.trained_tokens
    mine.backward()
    # their labels are not shifted yet
    labels = torch.full_like(batch.labels, IGNORE)
    labels[:, 1:] = batch.labels[:, :-1]
    theirs.zero_grad()
    pixels = normalize(batch.pixels, ours.model.spec)
    other = theirs(input_ids=batch.input_ids, pixel_values=pixels, labels=labels).loss
    other.backward()
    assert abs(float((mine - other).detach())) < 2e-6  # a loss of about 6 in fp32: 5e-7 per rounding
    connector, projector = ours.model.multi_modal_projector, theirs.model.multi_modal_projector
    for name, parameter in connector.named_parameters():
        expected = projector.get_parameter(name).grad
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)
    table = ours.model.language_model.get_input_embeddings().weight.grad
    torch.testing.assert_close(table, theirs.get_input_embeddings().weight.grad, rtol=1e-4, atol=1e-6)
    ours.model.zero_grad(set_to_none=True)


def test_the_greedy_answer_is_that_of_transformers(case: Case) -> None:
    ours, theirs, _ = case
    one = a_sample(ours)
    mine = ours.model.generate(one, max_new_tokens=12)
    pixels = normalize(one.pixels, ours.model.spec)
    theirs.generation_config.eos_token_id = None
    made = theirs.generate(
        input_ids=one.input_ids[None],
        pixel_values=pixels,
        attention_mask=torch.ones_like(one.input_ids[None]),
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=ours.pad_id,
    )
    assert mine == made[0, len(one.input_ids) :].tolist()
    assert len(mine) == 12


def test_the_processor_of_the_saved_directory_makes_the_same_input(case: Case) -> None:
    ours, theirs, directory = case
    processor = AutoProcessor.from_pretrained(directory)
    grey = np.random.default_rng(0).integers(0, 256, (50, 80, 3), dtype=np.uint8)
    picture = Image.fromarray(grey)
    inputs = processor(images=picture, text="What? <image> Say.", return_tensors="pt")
    assert int((inputs["input_ids"] == ours.image_id).sum()) == ours.model.spec.tokens_per_tile
    file = directory.parent / "picture.png"
    picture.save(file)
    pixels = ours.model.spec.prepare(file.read_bytes())
    difference = normalize(pixels, ours.model.spec) - inputs["pixel_values"]
    # two ways of bicubic: at most two grey levels of 255, and a standard deviation of 0.26 at least
    assert float(difference.abs().max()) < 2.5 / 255 / 0.26
    theirs.generate(**inputs, max_new_tokens=2, do_sample=False)


def test_a_batch_of_two_rows_and_a_row_of_two_samples_have_the_same_loss(case: Case) -> None:
    ours, _, _ = case
    one, two = a_sample(ours), a_sample(ours, seed=2)
    size = ours.model.spec.size
    with torch.no_grad():
        packed = float(ours.model(collate([[one, two]], pad_id=ours.pad_id, image_size=size)))
        padded = float(ours.model(collate([[one], [two]], pad_id=ours.pad_id, image_size=size)))
        alone = sum(float(ours.model(collate([[s]], pad_id=ours.pad_id, image_size=size))) for s in (one, two))
    assert packed == pytest.approx(alone, abs=1e-4)  # a sum of 12 terms of about 6
    assert padded == pytest.approx(alone, abs=1e-4)
