"""Whose picture a question is asked with."""

import io

from PIL import Image

from mmit.conversation import Conversation, ImageRef, Message
from mmit.data.control import GREY
from mmit.evaluate.pictures import with_pictures


def sample(name: str, *images: bytes) -> Conversation:
    parts = (*(ImageRef(k) for k in range(len(images))), "What?")
    turns = (Message(role="user", content=parts), Message(role="assistant", content=("x",)))
    return Conversation(id=name, messages=turns, images=images, sizes=tuple((4, 3) for _ in images))


SAMPLES = [sample("a", b"A"), sample("b"), sample("c", b"C"), sample("d", b"D1", b"D2"), sample("e", b"E")]


def test_the_true_pictures_are_their_own() -> None:
    assert with_pictures(SAMPLES, "true") == SAMPLES


def test_other_pictures_come_from_the_next_sample_with_as_many() -> None:
    changed = with_pictures(SAMPLES, "other")
    # a, c and e have one picture each and pass them round; d is the only one with two and keeps its own
    assert [c.images for c in changed] == [(b"C",), (), (b"E",), (b"D1", b"D2"), (b"A",)]


def test_a_blank_picture_has_the_size_of_the_true_one() -> None:
    image = Image.open(io.BytesIO(with_pictures(SAMPLES, "blank")[0].images[0]))
    assert image.size == (4, 3)
    assert set(image.get_flattened_data()) == {GREY}
