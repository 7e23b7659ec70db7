"""Tiled models against LlavaNext and LlavaOnevision of transformers: ids, pixels, logits, loss and gradients."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from adapter_factories import LLM, adapted
from model_factories import tiny_model_section
from PIL import Image
from transformers import (
    AutoProcessor,
    LlavaNextForConditionalGeneration,
    LlavaNextImageProcessorPil,
    LlavaOnevisionForConditionalGeneration,
    LlavaOnevisionImageProcessorPil,
)

from mmit.batch import IGNORE, Batch, Encoded, collate
from mmit.config import ComposedModel
from mmit.conversation import Conversation, ImageRef, Message
from mmit.encoding import encode_conversation
from mmit.images import normalize
from mmit.models import LoadedModel, build_model, load_model, save_model

NEXT = {"type": "anyres", "pinpoints": "llava_next"}
# a field of two tiles' tokens is the most before it is shrunk, so that both happen here
ONEVISION = {"type": "anyres", "pinpoints": "onevision", "shrink_to": 2, "several": "whole"}

KINDS: dict[str, Any] = {
    "next": ("clip_llama", NEXT, LlavaNextForConditionalGeneration, LlavaNextImageProcessorPil),
    "onevision": ("siglip_qwen2", ONEVISION, LlavaOnevisionForConditionalGeneration, LlavaOnevisionImageProcessorPil),
}

# (width, height) of the pictures of each sample: wide, high, tiny, a strip, two in one, none
SAMPLES = ([(100, 40)], [(30, 90)], [(9, 7)], [(3, 300)], [(64, 64), (90, 50)], [])


class Case:
    """Ours, theirs opened from the directory that ours was saved to, their processor, and that directory."""

    def __init__(self, folder: Path, name: str) -> None:
        kind, tiling, reader, pil = KINDS[name]
        section = tiny_model_section(folder / "parts", kind) | {"tiling": tiling}
        section["encoder"] |= {"exact_resize": True, "resize": "pad"}
        self.name = name
        self.ours: LoadedModel = build_model(ComposedModel.model_validate(section), dtype=torch.float32, seed=5)
        self.directory = folder / "saved"
        save_model(self.ours, None, self.directory, made_from={"test": True})
        self.theirs, report = reader.from_pretrained(self.directory, output_loading_info=True)
        self.theirs.eval()
        assert not report["missing_keys"]
        assert not report["unexpected_keys"]
        self.processor: Any = AutoProcessor.from_pretrained(self.directory)
        self.processor.image_processor = pil.from_pretrained(self.directory)  # bit for bit as LLaVA's

    def inputs(self, sizes: list[tuple[int, int]]) -> dict[str, torch.Tensor]:
        """What their processor makes of the sample."""
        text = self.ours.template.render(conversation(sizes)).text
        pictures = [picture(size) for size in sizes]
        return self.processor(images=[pictures] if pictures else None, text=[text], return_tensors="pt")

    def encoded(self, sizes: list[tuple[int, int]]) -> Encoded:
        return encode_conversation(
            conversation(sizes),
            template=self.ours.template,
            tokenizer=self.ours.tokenizer,
            spec=self.ours.spec,
            image_id=self.ours.image_id,
        )

    def batch(self, rows: list[list[Encoded]]) -> Batch:
        return collate(rows, pad_id=self.ours.pad_id, image_size=self.ours.spec.canvas)


def picture(size: tuple[int, int]) -> Image.Image:
    grey = np.random.default_rng(sum(size)).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Image.fromarray(grey)


def conversation(sizes: list[tuple[int, int]]) -> Conversation:
    """Pictures with words between them, a question and an answer."""
    images = []
    for size in sizes:
        file = io.BytesIO()
        picture(size).save(file, "PNG")
        images.append(file.getvalue())
    shown = [part for number in range(len(sizes)) for part in (ImageRef(number), " and ")]
    messages = (
        Message(role="user", content=("Look at ", *shown, "tell me.")),
        Message(role="assistant", content=("A red circle.",)),
    )
    return Conversation(id="s", messages=messages, images=tuple(images))


@pytest.fixture(scope="module", params=list(KINDS))
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(tmp_path_factory.mktemp(request.param), request.param)


def test_ids_and_pixels_are_those_of_their_processor(case: Case) -> None:
    for sizes in SAMPLES:
        mine, other = case.encoded(sizes), case.inputs(sizes)
        assert mine.input_ids.tolist() == other["input_ids"][0].tolist()
        if sizes:
            tiles = [part[: plan.tiles] for part, plan in zip(other["pixel_values"], mine.plans, strict=True)]
            # theirs are normalised in another order of operations, in fp32
            torch.testing.assert_close(
                normalize(mine.pixels, case.ours.spec), torch.cat(tiles).float(), rtol=0, atol=2e-6
            )


def test_some_pictures_are_cut_some_fields_are_shrunk_and_several_are_as_the_kind_has_it(case: Case) -> None:
    plans = {str(sizes): case.encoded(sizes).plans for sizes in SAMPLES}
    several = [plan.tiles for plan in plans["[(64, 64), (90, 50)]"]]
    wide = plans["[(100, 40)]"][0]
    assert wide.mosaic is not None
    if case.name == "next":
        assert several == [5, 5]
        assert (wide.tiles, wide.mosaic.shape) == (4, (2, 6))
    else:
        assert several == [1, 1]
        assert wide.mosaic.shape < (wide.mosaic.height, wide.mosaic.width)


@torch.no_grad()
def test_logits_of_packed_samples_are_those_of_transformers_one_by_one(case: Case) -> None:
    encoded = [case.encoded(sizes) for sizes in SAMPLES]
    packed = case.ours.model.logits(case.batch([encoded]))[0]
    start = 0
    for sizes, sample in zip(SAMPLES, encoded, strict=True):
        other = case.theirs(**case.inputs(sizes)).logits[0]
        # fp32, the same operations; the pixels differ by 2e-6
        torch.testing.assert_close(packed[start : start + sample.length], other, rtol=0, atol=1e-5)
        start += sample.length
    in_rows = case.batch([[sample] for sample in encoded])
    sums = [float(case.ours.model(batch)) for batch in (case.batch([encoded]), in_rows)]
    assert sums[0] == pytest.approx(sums[1], abs=1e-4)  # a sum of 60 terms of about 6


def test_loss_and_gradients_are_those_of_transformers(case: Case) -> None:
    sizes = SAMPLES[1]
    sample = case.encoded(sizes)
    model = case.ours.model
    model.train_only({"connector": 1.0})
    mine = model(case.batch([[sample]])) / sample.trained_tokens
    mine.backward()
    labels = torch.full_like(sample.labels, IGNORE)
    labels[1:] = sample.labels[:-1]  # theirs are not shifted yet
    case.theirs.zero_grad()
    other = case.theirs(**case.inputs(sizes), labels=labels[None]).loss
    other.backward()
    assert float(mine.detach()) == pytest.approx(float(other.detach()), abs=2e-6)
    assert model.image_newline is not None
    torch.testing.assert_close(model.image_newline.grad, case.theirs.model.image_newline.grad, rtol=1e-4, atol=1e-6)
    for name, parameter in model.multi_modal_projector.named_parameters():
        expected = case.theirs.model.multi_modal_projector.get_parameter(name).grad
        torch.testing.assert_close(parameter.grad, expected, rtol=1e-4, atol=1e-6)
    model.zero_grad(set_to_none=True)


def test_the_greedy_answer_is_that_of_transformers(case: Case) -> None:
    sizes = SAMPLES[0]
    prompt = case.encoded(sizes)
    case.theirs.generation_config.eos_token_id = None
    made = case.theirs.generate(**case.inputs(sizes), max_new_tokens=8, do_sample=False, pad_token_id=case.ours.pad_id)
    assert case.ours.model.generate(prompt, max_new_tokens=8) == made[0, prompt.length :].tolist()


def test_what_transformers_saved_again_is_read_with_the_same_grids_and_logits(case: Case, tmp_path: Path) -> None:
    """Version 5's own names, its joined processor file, and no mmit.json: pinpoints come from (height, width)."""
    case.theirs.save_pretrained(tmp_path)
    case.processor.save_pretrained(tmp_path)
    assert not (tmp_path / "mmit.json").exists()
    again = load_model(tmp_path, dtype=torch.float32)
    assert again.spec.tiling == case.ours.spec.tiling
    names = {name for name, _ in again.model.named_parameters()}
    assert "image_newline" in names
    batch = case.batch([[case.encoded(SAMPLES[0])]])
    with torch.no_grad():
        torch.testing.assert_close(again.model.logits(batch), case.ours.model.logits(batch), rtol=0, atol=1e-6)


def test_what_a_config_leaves_out_is_transformers_default_for_its_class(case: Case, tmp_path: Path) -> None:
    """LLaVA-NeXT reads the layer before the last, OneVision the last."""
    shutil.copytree(case.directory, tmp_path / "model")
    (tmp_path / "model/mmit.json").unlink()
    file = tmp_path / "model/config.json"
    left_out = ("vision_feature_layer", "vision_feature_select_strategy", "vision_aspect_ratio")
    config = {name: value for name, value in json.loads(file.read_text()).items() if name not in left_out}
    file.write_text(json.dumps(config))
    opened = load_model(tmp_path / "model", dtype=torch.float32)
    reader: Any = type(case.theirs)
    theirs = reader.from_pretrained(tmp_path / "model").eval()
    sizes = SAMPLES[2]  # few tokens: never shrunk
    with torch.no_grad():
        mine = opened.model.logits(case.batch([[case.encoded(sizes)]]))
        torch.testing.assert_close(mine[0], theirs(**case.inputs(sizes)).logits[0], rtol=0, atol=1e-5)


def test_the_directory_says_height_first_where_the_model_says_width_first(case: Case) -> None:
    tiling: Any = case.ours.spec.tiling
    for file in ("config.json", "preprocessor_config.json"):
        pairs = json.loads((case.directory / file).read_text())["image_grid_pinpoints"]
        assert [(width, height) for height, width in pairs] == list(tiling.pinpoints)
    again = load_model(case.directory, dtype=torch.float32)
    assert again.spec == case.ours.spec
    newline, before = again.model.image_newline, case.ours.model.image_newline
    assert newline is not None
    assert before is not None
    assert torch.equal(newline, before)


def test_an_adapter_is_opened_with_its_tiled_model(case: Case, tmp_path: Path) -> None:
    loaded = adapted(load_model(case.directory, dtype=torch.float32), LLM)
    save_model(loaded, None, tmp_path / "adapted", made_from={})
    theirs = KINDS[case.name][2].from_pretrained(tmp_path / "adapted").eval()
    inputs = case.inputs(SAMPLES[0])
    with torch.no_grad():
        got = loaded.model.logits(case.batch([[case.encoded(SAMPLES[0])]]))
        without = case.theirs(**inputs).logits
        torch.testing.assert_close(got, theirs(**inputs).logits, rtol=0, atol=2e-5)  # their attention, in fp32
    assert float((got - without).abs().max()) > 0.1
