"""Exact match by type, the majority answer, and answers of a tiny model."""

from pathlib import Path

import pytest
import torch
from model_factories import tiny_model_section
from PIL import Image

from mmit.config import ComposedModel
from mmit.conversation import Conversation, ImageRef, Message
from mmit.errors import DataError
from mmit.evaluate.accuracy import Asked, ask_all, by_type, majority
from mmit.evaluate.losses import answer_loss
from mmit.models import build_model
from mmit.models.loaded import LoadedModel
from mmit.turns import question_of


def asked(kind: str, expected: str, answer: str) -> Asked:
    return Asked(id="", type=kind, question="", expected=expected, answer=answer)


@pytest.mark.parametrize(
    ("answer", "right"), [("red", True), (" Red. ", True), ("red  .", True), ("dark red", False), ("", False)]
)
def test_case_space_and_one_full_stop_do_not_count(answer: str, right: bool) -> None:
    assert asked("colour", "red", answer).is_right is right


def test_every_question_counts_once_in_the_overall_share() -> None:
    found = [asked("colour", "red", "red"), asked("colour", "red", "blue"), asked("shape", "star", "star")]
    assert by_type(found) == {"colour": 0.5, "shape": 1.0, "overall": 2 / 3}


def test_the_majority_is_counted_on_tuning_data_and_scored_on_held_out_data() -> None:
    tuned = [("colour", "red"), ("colour", "red"), ("colour", "blue"), ("size", "small")]
    held_out = [("colour", "blue"), ("colour", "red"), ("size", "large")]
    assert majority(tuned, held_out) == {"colour": 0.5, "size": 0.0, "overall": 1 / 3}


def conversation(name: str, question: str, picture: bytes) -> Conversation:
    turns = (
        Message(role="user", content=(ImageRef(0), question)),
        Message(role="assistant", content=("a tree",)),
        Message(role="user", content=("And now?",)),
        Message(role="assistant", content=("a bus",)),
    )
    return Conversation(id=name, messages=turns, images=(picture,), sizes=((20, 20),), meta={"type": "thing"})


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> LoadedModel:
    section = ComposedModel.model_validate(tiny_model_section(tmp_path_factory.mktemp("parts")))
    return build_model(section, dtype=torch.float32, seed=0)


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> list[Conversation]:
    folder: Path = tmp_path_factory.mktemp("pictures")
    for number, colour in enumerate(("red", "blue", "white")):
        Image.new("RGB", (20, 20), colour).save(folder / f"{number}.png")
    questions = ("What?", "What is in the picture?", "Red?")
    return [conversation(str(n), q, (folder / f"{n}.png").read_bytes()) for n, q in enumerate(questions)]


def test_only_the_first_question_is_asked(samples: list[Conversation]) -> None:
    shown, answer = question_of(samples[0])
    assert (len(shown.messages), answer) == (1, "a tree")


def test_a_sample_without_an_answer_cannot_be_scored() -> None:
    only = Conversation(id="r7", messages=(Message(role="user", content=("Hi",)),))
    with pytest.raises(DataError, match="r7"):
        question_of(only)


def test_answers_do_not_depend_on_the_batch(loaded: LoadedModel, samples: list[Conversation]) -> None:
    together = ask_all(loaded, samples, max_new_tokens=5)
    alone = [one for sample in samples for one in ask_all(loaded, [sample], max_new_tokens=5)]
    assert together == alone
    assert [(one.id, one.type, one.question, one.expected) for one in together] == [
        ("0", "thing", "What?", "a tree"),
        ("1", "thing", "What is in the picture?", "a tree"),
        ("2", "thing", "Red?", "a tree"),
    ]


def test_the_loss_of_answers_changes_with_the_picture_and_not_with_the_batch(
    loaded: LoadedModel, samples: list[Conversation]
) -> None:
    true, other = (answer_loss(loaded, samples, kind) for kind in ("true", "other"))
    assert abs(true - other) > 1e-4
    # fp32 sums in another order
    assert answer_loss(loaded, samples, "true", batch_size=1) == pytest.approx(true, abs=1e-5)
