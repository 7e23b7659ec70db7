"""Answers: with a cache as without, in a batch as one by one, streamed as returned."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from models_support import batch_of, sample
from transformers import GenerationConfig

from mmit.models import LoadedModel

Build = Callable[..., LoadedModel]


@torch.no_grad()
def test_the_cache_changes_nothing(loaded: LoadedModel) -> None:
    """The next id from the whole sequence each time, against the key-value cache."""
    one = sample(loaded, text=range(40, 50), images=1, trained=0)
    answer = loaded.model.generate(one, max_new_tokens=10)
    ids = one.input_ids
    for expected in answer:
        embeddings = loaded.model.embed(batch_of(loaded, [[replace(one, input_ids=ids, labels=ids)]]))
        logits = loaded.model.language_model(inputs_embeds=embeddings, use_cache=False).logits
        assert int(logits[0, -1].argmax()) == expected
        ids = torch.cat([ids, torch.tensor([expected])])
    assert len(answer) == 10


def test_a_batch_gives_the_answers_that_prompts_get_alone(loaded: LoadedModel) -> None:
    prompts = [
        sample(loaded, text=range(40, 40 + length), images=images, trained=0, seed=images)
        for length, images in ((10, 1), (3, 0), (21, 2))
    ]
    alone = [loaded.model.generate(prompt, max_new_tokens=8) for prompt in prompts]
    assert loaded.model.generate_batch(prompts, max_new_tokens=8) == alone
    stop = alone[0][3]
    ended = [ids[: ids.index(stop)] if stop in ids else ids for ids in alone]
    assert loaded.model.generate_batch(prompts, max_new_tokens=8, stop_ids=[stop]) == ended
    assert len(ended[0]) <= 3


def test_a_stop_id_ends_the_answer_and_is_not_part_of_it(build: Build) -> None:
    loaded = build()
    one = sample(loaded, text=range(40, 50), images=1, trained=0)
    whole = loaded.model.generate(one, max_new_tokens=8)
    stop = whole[4]
    seen: list[int] = []
    short = loaded.model.generate(one, max_new_tokens=8, stop_ids=[stop], on_token=seen.append)
    assert short == whole[: whole.index(stop)]
    assert seen == short


def test_sampling_follows_the_seed_and_top_p_near_zero_is_greedy(build: Build) -> None:
    loaded = build()
    one = sample(loaded, text=range(40, 50), images=1, trained=0)

    def answer(*, temperature: float, top_p: float, seed: int) -> list[int]:
        torch.manual_seed(seed)
        return loaded.model.generate(one, max_new_tokens=8, temperature=temperature, top_p=top_p)

    assert answer(temperature=2.0, top_p=1.0, seed=1) == answer(temperature=2.0, top_p=1.0, seed=1)
    assert answer(temperature=2.0, top_p=1.0, seed=1) != answer(temperature=2.0, top_p=1.0, seed=2)
    greedy = loaded.model.generate(one, max_new_tokens=8)
    assert answer(temperature=2.0, top_p=1e-6, seed=1) == greedy


def test_settings_that_come_with_a_language_model_do_not_change_greedy(build: Build) -> None:
    """Qwen's directories carry a repetition penalty: kept, it would change every answer."""
    config = build().model.language_model.generation_config
    assert config.to_diff_dict().keys() <= GenerationConfig().to_diff_dict().keys()


def test_generation_switches_nothing_for_training(build: Build) -> None:
    loaded = build()
    model = loaded.model.train()
    model.train_only({"connector": 1.0})
    one = sample(loaded, text=range(40, 50), images=1, trained=0)
    model.eval()
    model.generate(one, max_new_tokens=2)
    assert model.language_model.config._attn_implementation == model.attention
    assert all(parameter.grad is None for parameter in model.parameters())


@pytest.mark.parametrize("images", [0, 1])
def test_prompts_with_and_without_images_are_answered(build: Build, images: int) -> None:
    loaded = build("siglip_qwen2")
    one = sample(loaded, text=range(40, 50), images=images, trained=0)
    assert len(loaded.model.generate(one, max_new_tokens=3)) == 3
