"""Published forms of conversations become content parts."""

import base64
from typing import Any

import pytest
from data_factories import picture

from mmit.conversation import ImageRef
from mmit.data import forms
from mmit.data.faults import SampleError

IMAGE = ImageRef(0)


def llava(question: str, answer: str = "Red.", **more: Any) -> forms.Record:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return forms.llava({"id": "1", "conversations": turns, **more})


@pytest.mark.parametrize(
    "question",
    [
        "<image>\nWhat is it?",
        "What is it?\n<image>",  # LLaVA-Pretrain, ShareGPT4V and ScienceQA put it behind the question
        "What is it?",  # LAMM writes no placeholder
        "<image>What is it?",
    ],
)
def test_the_one_picture_of_a_turn_stands_in_front_wherever_its_placeholder_was(question: str) -> None:
    record = llava(question, image="a.jpg")
    assert record.messages[0].content == (IMAGE, "What is it?")
    assert record.images == ("a.jpg",)


def test_several_placeholders_keep_their_places_and_their_line_breaks() -> None:
    record = llava("First: <image>\nSecond: <image>\nWhich is red?", image=["a.jpg", "b.jpg"])
    assert record.messages[0].content == (
        "First: ",
        ImageRef(0),
        "\nSecond: ",
        ImageRef(1),
        "\nWhich is red?",
    )
    assert record.images == ("a.jpg", "b.jpg")


def test_placeholders_in_several_turns_are_numbered_in_reading_order() -> None:
    turns = ["<image>\nOne?", "Yes.", "And <image>?", "No."]
    record = forms.llava(
        {
            "image": ["a.jpg", "b.jpg"],
            "conversations": [
                {"from": "human" if n % 2 == 0 else "gpt", "value": turn} for n, turn in enumerate(turns)
            ],
        }
    )
    assert [turn.content for turn in record.messages][::2] == [(ImageRef(0), "One?"), (ImageRef(1), "And ?")]


@pytest.mark.parametrize(
    ("record", "reason"),
    [
        ({"image": "a.jpg", "q": "<image> and <image>"}, "more <image> placeholders than the record has images"),
        ({"q": "<image>\nWhat?"}, "more <image> placeholders than the record has images (0)"),
        ({"image": ["a", "b", "c"], "q": "<image> and <image>"}, "2 <image> placeholders for 3 images"),
        ({"image": "http://x.org/a.jpg", "q": "What?"}, "is a remote image"),
        ({"image": 7, "q": "What?"}, "neither a path nor a data URL"),
        ({"video": "a.mp4", "q": "What?"}, "only images are read"),
        ({"q": ""}, "turn 1 (user) is empty"),
        ({"q": "What?", "a": " "}, "turn 2 (assistant) is empty"),
        ({"q": "What?", "a": "\ud83d"}, "half of a surrogate pair"),
    ],
)
def test_what_cannot_be_understood_is_refused_with_its_reason(record: dict, reason: str) -> None:
    rest = {key: value for key, value in record.items() if key not in ("q", "a")}
    with pytest.raises(SampleError) as error:
        llava(record["q"], record.get("a", "Red."), **rest)
    assert reason in str(error.value)


@pytest.mark.parametrize(
    ("roles", "reason"),
    [
        (["human", "human", "gpt"], "turns 1 and 2 are both the user's"),
        (["human", "gpt", "system"], "it may only stand first"),
        (["gpt", "human"], "no question with an answer"),
        (["human"], "no question with an answer"),
        (["human", "oracle"], "unknown role 'oracle'"),
        ([], "no question with an answer"),
    ],
)
def test_turns_that_teach_nothing_are_refused(roles: list[str], reason: str) -> None:
    with pytest.raises(SampleError, match=reason):
        forms.llava({"conversations": [{"from": role, "value": "x"} for role in roles]})


def test_answers_before_the_first_question_are_left_to_the_template() -> None:
    record = forms.llava({"conversations": [{"from": role, "value": "x"} for role in ("gpt", "human", "gpt")]})
    assert [turn.role for turn in record.messages] == ["assistant", "user", "assistant"]


def test_ids_and_plain_values_stay_in_meta() -> None:
    assert llava("Q?", task_name="vqa", boxes=[1, 2]).meta == {"id": "1", "task_name": "vqa"}
    assert forms.llava(
        {"idx": 7, "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    ).meta == {"id": 7}


def messages(*turns: dict, **more: Any) -> forms.Record:
    return forms.messages({"messages": list(turns), **more})


def test_openai_parts_with_urls_paths_and_data() -> None:
    data = picture()
    url = "data:image/jpeg;base64," + base64.b64encode(data).decode()
    record = messages(
        {
            "role": "user",
            "content": [
                {"type": "image_url", "image_url": {"url": url}},
                {"type": "text", "text": "Same as "},
                {"type": "image", "image": "b.png"},
                {"type": "text", "text": "?"},
            ],
        },
        {"role": "assistant", "content": "Yes."},
    )
    assert record.messages[0].content == (ImageRef(0), "Same as ", ImageRef(1), "?")
    assert record.images == (data, "b.png")


def test_parts_may_hold_their_value_under_value() -> None:
    # the form of LLaMA-Factory's v1 demo
    record = messages(
        {"role": "user", "content": [{"type": "image_url", "value": "1.jpg"}, {"type": "text", "value": "Who?"}]},
        {"role": "assistant", "content": [{"type": "text", "value": "Kane."}]},
    )
    assert record.images == ("1.jpg",)
    assert [m.content for m in record.messages] == [(ImageRef(0), "Who?"), ("Kane.",)]


def test_image_parts_without_a_source_take_the_next_of_the_list() -> None:
    record = messages(
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "or"}, {"type": "image"}]},
        {"role": "assistant", "content": "Both."},
        images=["a.jpg", {"path": "b.jpg"}],
    )
    assert record.images == ("a.jpg", "b.jpg")
    assert record.messages[0].content == (ImageRef(0), "or", ImageRef(1))


def test_placeholders_in_strings_keep_their_places() -> None:
    # the form of LLaMA-Factory: a placeholder may follow the question
    record = messages(
        {"role": "user", "content": "<image>Who are they?"},
        {"role": "assistant", "content": "Kane."},
        {"role": "user", "content": "What are they doing?<image>"},
        {"role": "assistant", "content": "Celebrating."},
        images=["1.jpg", "1.jpg"],
    )
    assert record.messages[0].content == (ImageRef(0), "Who are they?")
    assert record.messages[2].content == ("What are they doing?", ImageRef(1))


def test_a_placeholder_in_a_text_part_is_not_a_picture() -> None:
    record = messages(
        {"role": "user", "content": [{"type": "text", "text": "What does <image> mean in HTML?"}]},
        {"role": "assistant", "content": "Nothing."},
    )
    assert record.messages[0].content == ("What does <image> mean in HTML?",)


def test_weight_zero_leaves_an_answer_untrained() -> None:
    record = messages(
        {"role": "user", "content": "a"},
        {"role": "assistant", "content": "b", "weight": 0},
        {"role": "user", "content": "c"},
        {"role": "assistant", "content": "d"},
    )
    assert [m.is_trained for m in record.messages] == [False, False, False, True]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ([{"type": "audio", "audio": "a.wav"}], "only text, image and image_url"),
        ([{"type": "image_url", "image_url": {"url": "data:image/png;base64,!!"}}], "a data URL cannot be decoded"),
        (None, "not text"),
    ],
)
def test_parts_that_cannot_be_read_are_named(content: object, reason: str) -> None:
    with pytest.raises(SampleError, match=reason):
        messages({"role": "user", "content": content}, {"role": "assistant", "content": "x"})


def test_a_caption_becomes_a_picture_and_an_answer() -> None:
    record = forms.caption({"file_name": "a.jpg", "text": " A red square.\n", "id": 3})
    assert [m.content for m in record.messages] == [(IMAGE,), ("A red square.",)]
    assert record.images == ("a.jpg",)
    assert record.meta == {"id": 3}
    assert forms.caption({"image": "a", "caption": "b"}, "Describe it.").messages[0].content == (IMAGE, "Describe it.")
    with pytest.raises(SampleError, match="no caption: none of caption, text, description holds a text"):
        forms.caption({"image": "a.jpg", "label": 3})
