"""What the demo's parts learn from, and the optimizer they learn with."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from mmit.demo.language import LanguageSettings, _texts, make_tokenizer
from mmit.demo.muon import Muon, orthogonalize, set_lr
from mmit.demo.world import World


@pytest.mark.parametrize("shape", [(32, 32), (96, 24), (24, 96)])
def test_an_orthogonalized_matrix_has_singular_values_near_one(shape: tuple[int, int]) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalize(matrix))
    # the iteration is made to be fast, not exact: its author gives 0.7 to 1.2 for all but the smallest values
    assert values.max() < 1.25
    assert values.median() > 0.65


def test_a_muon_step_moves_along_the_orthogonalized_gradient() -> None:
    weight = nn.Parameter(torch.zeros(8, 2))
    weight.grad = torch.randn(8, 2, generator=torch.Generator().manual_seed(1))
    expected = orthogonalize(weight.grad * 1.95)  # the gradient, and 0.95 of a momentum that is the gradient
    Muon([weight], lr=0.1).step()
    torch.testing.assert_close(weight.detach(), -0.1 * 2.0 * expected)  # 2 = root of 8 rows / 2 columns


def test_learning_rates_rise_for_a_twentieth_and_fall_as_a_cosine() -> None:
    weight = nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([weight], lr=4.0)
    found = []
    for progress in (0.025, 0.5, 1.0):
        set_lr([optimizer], progress)
        found.append(optimizer.param_groups[0]["lr"])
    assert found == pytest.approx([4.0 * 0.5 * 0.5 * (1 + math.cos(0.025 * math.pi)), 2.0, 0.0])


def test_answers_weigh_more_than_the_rest_of_a_text(tmp_path) -> None:
    world, settings = World(), LanguageSettings(answer_weight=8.0)
    tokenizer = make_tokenizer(world, settings, tmp_path)
    texts = _texts(world, tokenizer, settings)
    dialogues = 0
    for _ in range(40):
        ids, weights = next(texts)
        answers = str(tokenizer.decode(ids[weights == 8.0])).split("<|im_end|>")
        whole = str(tokenizer.decode(ids))
        assert set(weights.tolist()) <= {1.0, 8.0}
        assert whole.count("assistant\n") == len(answers) - 1
        vocabulary = {*world.colours, *world.shapes, *world.sizes, *world.counts, *world.places, *world.backgrounds}
        assert {answer.strip() for answer in answers} <= vocabulary | {""}
        dialogues += len(answers) > 1
    assert 15 < dialogues < 40


def test_every_word_of_an_answer_is_one_token(tmp_path) -> None:
    world = World()
    tokenizer = make_tokenizer(world, LanguageSettings(), tmp_path)
    for word in (*world.colours, *world.shapes, *world.sizes, *world.counts, *world.places, *world.backgrounds):
        assert len(tokenizer.encode(word)) == 1, word
    assert tokenizer.encode("<|im_end|>") == [tokenizer.eos_token_id]
    assert len(tokenizer) <= LanguageSettings().vocabulary
    assert np.unique(tokenizer.encode("what colour do you see?")).size == 6
