"""The parts of a conversation."""

from __future__ import annotations

from mmit.conversation import Conversation, ImageRef, Message


def test_images_are_listed_in_reading_order_and_text_is_joined() -> None:
    first = Message(role="user", content=("Compare ", ImageRef(1), " with ", ImageRef(0), "."))
    second = Message(role="user", content=(ImageRef(2),))
    assert first.text == "Compare  with ."
    conversation = Conversation(id="a", messages=(first, second))
    assert [ref.index for ref in conversation.image_refs] == [1, 0, 2]


def test_answers_are_trained_unless_told_otherwise() -> None:
    assert Message(role="assistant", content=()).is_trained
    assert not Message(role="assistant", content=(), train=False).is_trained
    assert not Message(role="user", content=()).is_trained
