"""Models that cut pictures into tiles: from a run file, the newline token, training, chat."""

from __future__ import annotations

import io
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from model_factories import HIDDEN, tiny_model_section
from models_support import batch_of, gradients
from msgspec import structs
from PIL import Image
from safetensors.torch import load_file, save_file

from mmit.batch import Encoded
from mmit.chat import Chat
from mmit.config import ComposedModel
from mmit.conversation import Conversation, ImageRef, Message
from mmit.encoding import encode_conversation
from mmit.errors import CheckpointError, ConfigError, DataError
from mmit.models import LoadedModel, build_model, load_model, load_weights, save_model
from mmit.models.outline import read_outline
from mmit.models.prompts import read_prompt

Build = Callable[..., LoadedModel]


@pytest.fixture(scope="module")
def section(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return tiny_model_section(tmp_path_factory.mktemp("tiled"))


@pytest.fixture(scope="module")
def make(section: dict[str, Any]) -> Build:
    def build(*, seed: int = 3, connector: dict[str, Any] | None = None, **tiling: Any) -> LoadedModel:
        changed = {**section, "tiling": tiling or {"type": "anyres"}}
        if connector:
            changed["connector"] = connector
        return build_model(ComposedModel.model_validate(changed), dtype=torch.float32, seed=seed)

    return build


def png(width: int, height: int, colour: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "PNG")
    return file.getvalue()


def talk(*images: bytes, answer: str = "Two circles.") -> Conversation:
    shown = tuple(ImageRef(number) for number in range(len(images)))
    messages = (
        Message(role="user", content=(*shown, "How many?")),
        Message(role="assistant", content=(answer,)),
    )
    return Conversation(id="t", messages=messages, images=images)


def encoded(loaded: LoadedModel, *images: bytes) -> Encoded:
    return encode_conversation(
        talk(*images),
        template=loaded.template,
        tokenizer=loaded.tokenizer,
        spec=loaded.spec,
        image_id=loaded.image_id,
        style=loaded.style,
    )


def test_the_newline_token_begins_as_in_llava_and_depends_on_the_seed_alone(make: Build) -> None:
    one, again, other = (make(seed=seed).model.image_newline for seed in (1, 1, 2))
    assert one is not None
    assert again is not None
    assert other is not None
    assert torch.equal(one, again)
    assert not torch.equal(one, other)
    assert 0.7 < float(one.detach().std()) * HIDDEN**0.5 < 1.3  # a normal of standard deviation 1 / sqrt(D), 32 draws
    assert make(type="dynamic").model.image_newline is None


def test_the_newline_token_trains_with_the_connector_and_has_a_gradient_in_every_batch(make: Build) -> None:
    loaded = make()
    (group,) = loaded.model.train_only({"connector": 1e-3})
    assert "image_newline" in group.names
    norms = {}
    for name, sample in {"tiles": encoded(loaded, png(60, 30)), "text": encoded(loaded)}.items():
        loaded.model(batch_of(loaded, [[sample]])).backward()
        norms[name] = {key: float(grad.norm()) for key, grad in gradients(loaded.model).items()}
    assert norms["tiles"].keys() == norms["text"].keys() == set(group.names)
    assert norms["tiles"]["image_newline"] > 1e-3
    assert set(norms["text"].values()) == {0.0}
    loaded.model.train_only({"language_model": 1e-3, "image_newline": 1e-2})  # by its own name
    assert loaded.model.image_newline is not None
    assert loaded.model.image_newline.requires_grad


@pytest.mark.parametrize(
    "tiling",
    [
        {"type": "anyres"},
        {"type": "anyres", "unpad": False},
        {"type": "anyres", "pinpoints": [[28, 56], [84, 28]], "shrink_to": 1, "several": "whole"},
        {"type": "dynamic", "max_tiles": 4},
    ],
)
def test_packed_samples_have_the_loss_of_samples_alone(make: Build, tiling: dict[str, Any]) -> None:
    """Two pictures in one sample, a high one, text alone, a wide one, in one row."""
    loaded = make(**tiling)
    samples = [
        encoded(loaded, png(60, 60), png(20, 90, "blue")),
        encoded(loaded),
        encoded(loaded, png(30, 90)),
        encoded(loaded, png(95, 30)),
    ]
    assert max(plan.tiles for sample in samples for plan in sample.plans) > 2
    with torch.no_grad():
        alone = sum(float(loaded.model(batch_of(loaded, [[sample]]))) for sample in samples)
        assert float(loaded.model(batch_of(loaded, [samples]))) == pytest.approx(alone, abs=1e-4)
        # and the tiles count: other pixels in the last tile of the first picture, another loss
        tile = samples[0].plans[0].tiles - 1
        changed = samples[0].pixels.clone()
        changed[tile] = 255 - changed[tile]
        other = float(loaded.model(batch_of(loaded, [[replace(samples[0], pixels=changed)], samples[1:]])))
    assert abs(other - alone) > 1e-4


def test_a_plan_of_another_model_is_refused(make: Build) -> None:
    loaded = make()
    sample = encoded(loaded, png(60, 30))
    with pytest.raises(DataError, match=r"image placeholders and 3 tiles x 4 tokens, but the plans of 1 images say"):
        loaded.model(batch_of(loaded, [[replace(sample, plans=(loaded.spec.plan(60, 60),))]]))


def test_a_picture_of_another_size_than_its_record_states_is_refused(make: Build) -> None:
    loaded = make()
    lying = structs.replace(talk(png(60, 30)), sizes=((30, 60),))
    with pytest.raises(
        DataError, match=r"record 't', image 0: its size is 60 x 30, not the one that the record states"
    ):
        encode_conversation(
            lying, template=loaded.template, tokenizer=loaded.tokenizer, spec=loaded.spec, image_id=loaded.image_id
        )


def test_an_outline_counts_the_tokens_of_the_model(make: Build, section: dict[str, Any]) -> None:
    loaded = make()
    tiled = ComposedModel.model_validate({**section, "tiling": {"type": "anyres"}})
    assert read_outline(tiled).spec == loaded.spec
    image_tokens = (encoded(loaded, png(100, 30)).input_ids == loaded.image_id).sum()
    assert loaded.spec.plan(100, 30).tokens == int(image_tokens) == 4 + 2 * (6 + 1)


def test_a_model_of_tiles_survives_its_directory_and_fills_another(make: Build, tmp_path: Path) -> None:
    for tiling, name in (({"type": "anyres"}, "llava_next"), ({"type": "dynamic", "max_tiles": 3}, "own")):
        loaded = make(**tiling)
        directory = tmp_path / name
        save_model(loaded, None, directory, made_from={})
        opened = load_model(directory, dtype=torch.float32)
        assert opened.spec == loaded.spec
        state = opened.model.state_dict()
        assert all(torch.equal(state[key], value) for key, value in loaded.model.state_dict().items())
        fresh = make(seed=9, **tiling)
        load_weights(fresh.model, directory)
        assert all(torch.equal(fresh.model.state_dict()[key], value) for key, value in state.items())


def test_a_tiled_model_starts_from_one_of_single_tiles_and_keeps_its_newline_token(
    make: Build, section: dict[str, Any], tmp_path: Path
) -> None:
    single = build_model(ComposedModel.model_validate(section), dtype=torch.float32, seed=8)
    save_model(single, None, tmp_path / "single", made_from={})
    tiled, fresh = make(seed=3), make(seed=3)
    load_weights(tiled.model, tmp_path / "single")
    state, drawn = tiled.model.state_dict(), fresh.model.state_dict()
    assert all(torch.equal(state[key], value) for key, value in single.model.state_dict().items())
    assert torch.equal(state["image_newline"], drawn["image_newline"])
    # a tiled model without the token is damaged, and a single tile has no use for one
    save_model(tiled, None, tmp_path / "tiled", made_from={})
    weights = load_file(tmp_path / "tiled/model.safetensors")
    with pytest.raises(CheckpointError, match="1 unexpected: image_newline"):
        load_weights(single.model, tmp_path / "tiled")
    save_file({k: v for k, v in weights.items() if k != "image_newline"}, tmp_path / "tiled/model.safetensors")
    with pytest.raises(CheckpointError, match="1 missing: image_newline"):
        load_weights(tiled.model, tmp_path / "tiled")


def test_a_connector_without_a_grid_is_refused_unless_tiles_stay_apart(make: Build) -> None:
    resampler = {"type": "perceiver_resampler", "tokens": 4, "depth": 1, "heads": 2, "head_width": 8}
    with pytest.raises(ConfigError, match=r"model.tiling.unpad: the image tokens of PerceiverResampler do not lie as"):
        make(connector=resampler)
    loaded = make(connector=resampler, type="anyres", unpad=False)
    assert loaded.spec.plan(60, 60).tokens == 5 * 4


def test_a_pooling_connector_keeps_its_grid(make: Build) -> None:
    loaded = make(connector={"type": "average_pool", "tokens": 1})
    plan = loaded.spec.plan(60, 60)
    assert plan.tokens == 1 + 2 * (2 + 1)  # the whole, and two rows of two tokens and a newline
    assert torch.isfinite(loaded.model(batch_of(loaded, [[encoded(loaded, png(60, 60))]])))


def test_chat_takes_several_pictures_and_its_prompt_is_a_prefix_of_training(make: Build) -> None:
    loaded = make()
    pictures = (png(60, 30), png(30, 90, "blue"))
    trained = encoded(loaded, *pictures)
    asked = structs.replace(talk(*pictures), messages=talk(*pictures).messages[:1])
    prompt = read_prompt(loaded, asked)
    assert trained.input_ids.tolist()[: prompt.length] == prompt.input_ids.tolist()
    assert prompt.plans == trained.plans
    answer = loaded.model.generate(replace(prompt, pixels=trained.pixels), max_new_tokens=6)
    text = loaded.tokenizer.decode(answer, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    assert Chat(loaded).ask("How many?", pictures, max_new_tokens=6) == text.strip()
