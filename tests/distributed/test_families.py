"""Every family of language models: packed equals separate, chat begins training, exports open, ZeRO-3 is exact."""

from __future__ import annotations

import io
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from family_factories import FAMILIES, WINDOW, Family, family_section, write_family
from models_support import batch_of, sample
from PIL import Image
from ranks import run_ranks
from transformers import LlavaForConditionalGeneration

from mmit.batch import IGNORE
from mmit.conversation import Conversation, ImageRef, Message
from mmit.encoding import encode_conversation
from mmit.errors import DataError
from mmit.images import normalize
from mmit.models import LoadedModel, build_model, load_model, save_model
from mmit.models.prompts import read_prompt

# fp32, logits of about 5: only the order of sums within attention may differ between a long and a short call
ROUNDING = 2e-5


@dataclass(frozen=True)
class Case:
    """A model of a family."""

    family: Family
    loaded: LoadedModel


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The parts of all families."""
    folder = tmp_path_factory.mktemp("families")
    for name in FAMILIES:
        write_family(name, folder)
    return folder


@pytest.fixture(scope="module", params=FAMILIES)
def case(request: pytest.FixtureRequest, parts: Path) -> Case:
    """Each family in turn."""
    section = family_section(request.param, parts)
    return Case(FAMILIES[request.param], build_model(section, dtype=torch.float32, seed=0))


@torch.no_grad()
def test_packed_samples_and_padded_rows_give_the_logits_of_the_sample_alone(case: Case) -> None:
    loaded, model = case.loaded, case.loaded.model
    assert (model.attention, not model.packing_fault) == (case.family.attention, case.family.packs)
    samples = [
        sample(loaded, text=range(40, 50), images=1, trained=6, seed=1),
        sample(loaded, text=[60], images=0, trained=0, seed=2),
        sample(loaded, text=range(70, 77), images=2, trained=4, seed=3),
    ]
    assert max(one.length for one in samples) > 2 * WINDOW
    alone = [model.logits(batch_of(loaded, [[one]]))[0] for one in samples]
    padded = model.logits(batch_of(loaded, [[one] for one in samples]))
    for row, expected in zip(padded, alone, strict=True):
        torch.testing.assert_close(row[: len(expected)], expected, rtol=0, atol=ROUNDING)
    together = batch_of(loaded, [samples])
    if not case.family.packs:
        with pytest.raises(DataError, match=r"rows hold several samples, but .*; pack one sample per row"):
            model(together)
        return
    torch.testing.assert_close(model.logits(together)[0], torch.cat(alone), rtol=0, atol=ROUNDING)
    losses = sum(float(model(batch_of(loaded, [[one]]))) for one in samples)
    assert float(model(together)) == pytest.approx(losses, abs=1e-3)  # ten terms of about 20


def test_the_prompt_of_chat_is_a_prefix_of_the_training_ids(case: Case) -> None:
    loaded = case.loaded
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (200, 30, 30)).save(file, "PNG")
    asked = Message(role="user", content=(ImageRef(0), "\nWhat colour is it?"))
    said = Message(role="assistant", content=("Red.",))
    trained = encode_conversation(
        Conversation(id="c", messages=(asked, said), images=(file.getvalue(),)),
        template=loaded.template,
        tokenizer=loaded.tokenizer,
        spec=loaded.spec,
        image_id=loaded.image_id,
    )
    prompt = read_prompt(loaded, Conversation(id="c", messages=(asked,), images=(file.getvalue(),)))
    assert trained.input_ids[: prompt.length].tolist() == prompt.input_ids.tolist()
    assert trained.labels[: prompt.length].tolist() == [
        *[IGNORE] * (prompt.length - 1),
        int(trained.input_ids[prompt.length]),  # the prompt's last token is the first to learn
    ]


@torch.no_grad()
def test_what_is_saved_opens_with_the_same_logits_and_answers(case: Case, tmp_path: Path) -> None:
    loaded = case.loaded
    save_model(loaded, None, tmp_path / "saved", made_from={})
    assert json.loads((tmp_path / "saved" / "mmit.json").read_text())["layout"] == case.family.layout
    one = sample(loaded, text=range(40, 52), images=1, trained=0, seed=1)
    batch = batch_of(loaded, [[one]])
    expected, answer = loaded.model.logits(batch), loaded.model.generate(one, max_new_tokens=8)
    again = load_model(tmp_path / "saved", dtype=torch.float32)
    assert torch.equal(again.model.logits(batch), expected)
    assert again.model.generate(one, max_new_tokens=8) == answer
    if case.family.layout == "own":
        return
    reader: Any = LlavaForConditionalGeneration
    theirs, report = reader.from_pretrained(tmp_path / "saved", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    inputs = {"input_ids": one.input_ids[None], "pixel_values": normalize(one.pixels, loaded.spec)}
    torch.testing.assert_close(theirs.eval()(**inputs).logits, expected, rtol=0, atol=ROUNDING)
    theirs.generation_config.eos_token_id = None
    mask = torch.ones_like(inputs["input_ids"])
    # ids that have a row in the table but no text are never an answer of mmit
    never = {"suppress_tokens": list(loaded.model.never())}
    made = theirs.generate(**inputs, **never, attention_mask=mask, max_new_tokens=8, do_sample=False, pad_token_id=0)
    assert made[0, one.length :].tolist() == answer


@pytest.fixture(scope="module")
def stepped(parts: Path) -> dict[str, Any]:
    """One step of every family, in plain torch and by two ranks under ZeRO-3."""
    script = Path(__file__).parent / "families_step.py"
    return run_ranks(script, str(parts))


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize("family", FAMILIES)
def test_a_step_under_zero_3_equals_the_plain_one(stepped: dict[str, Any], family: str) -> None:
    # only the order of fp32 sums may differ
    facts = stepped[family]
    assert facts["norm"] > 0.1
    assert facts["parameters"] < 1e-6  # of steps of up to 1e-2
    assert facts["loss"] < 1e-5  # of about 10
