"""A control run changes the named part of every sample and nothing else."""

import io
import pickle
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from data_factories import make_shards, measure, picture, talk
from hypothesis import given
from hypothesis import strategies as st
from msgspec import structs
from PIL import Image

from mmit.conversation import Conversation, ImageRef, Message
from mmit.data.control import Control, ControlledSet, circle
from mmit.data.facts import read_facts
from mmit.data.lengths import measure_lengths
from mmit.data.order import key
from mmit.data.shard_set import ShardSet, open_source
from mmit.data.shards import ShardWriter

COUNT = 9


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Samples 0-5 with a picture of their own size and colour, 6 with two, 7 and 8 without; 5 has two answers."""
    folder = tmp_path_factory.mktemp("control")
    with ShardWriter(folder / "s.tar") as shard:
        for number in range(COUNT):
            images = 1 if number < 6 else 2 if number == 6 else 0
            messages = talk(f"question {number}", f"answer {number}", images=images)
            if number == 5:
                messages += talk("and then", "more")
            sizes = ((8 + number, 6),) * images
            pictures = tuple(picture(*size, colour=f"#{number}0{number}0{number}0", kind="PNG") for size in sizes)
            task = {"task": "vqa" if number % 2 else "caption"} if number < 8 else {}
            shard.write(
                str(number),
                Conversation(id=f"s/{number}", messages=messages, images=pictures, sizes=sizes, meta=task),
            )
        shard.finish()
    return open_source(folder, cache=folder / "cache")


def controlled(shards: ShardSet, control: Control, *, seed: int = 0) -> ControlledSet:
    return ControlledSet(shards, control, seed=seed, progress=False)


def answers(conversation: Conversation) -> tuple[str, ...]:
    return tuple(m.text for m in conversation.messages if m.role == "assistant")


def questions(conversation: Conversation) -> tuple[Message, ...]:
    return tuple(m for m in conversation.messages if m.role == "user")


def test_blank_images_are_grey_and_of_their_own_size(shards: ShardSet) -> None:
    changed = controlled(shards, "blank_image")
    for number in range(COUNT):
        own, blank = shards.read(number), changed.read(number)
        assert structs.replace(blank, images=own.images) == own
        for data, size in zip(blank.images, own.sizes, strict=True):
            with Image.open(io.BytesIO(data)) as found:
                assert found.size == size
                assert found.convert("RGB").getcolors() == [(size[0] * size[1], (128, 128, 128))]


def test_shuffled_images_come_from_another_sample_with_as_many(shards: ShardSet) -> None:
    changed = controlled(shards, "shuffle_image")
    found = [changed.read(number) for number in range(COUNT)]
    for number in range(COUNT):
        own = shards.read(number)
        assert structs.replace(found[number], images=own.images, sizes=own.sizes) == own
        assert changed.read_text(number).sizes == found[number].sizes
        if number < 6:
            assert found[number].images != own.images
    assert Counter(c.images for c in found) == Counter(shards.read(n).images for n in range(COUNT))
    assert changed.alone == 1  # sample 6: the only one with two
    assert found[6] == shards.read(6)


def test_blank_instructions_keep_pictures_and_answers(shards: ShardSet) -> None:
    changed = controlled(shards, "blank_instruction")
    for number in range(COUNT):
        own, blank = shards.read(number), changed.read(number)
        assert (blank.images, answers(blank), blank.meta) == (own.images, answers(own), own.meta)
        assert [m.text for m in questions(blank)] == [""] * len(questions(own))
        assert blank.image_refs == own.image_refs


def test_shuffled_answers_come_from_another_sample_with_as_many(shards: ShardSet) -> None:
    changed = controlled(shards, "shuffle_answer")
    found = [changed.read(number) for number in range(COUNT)]
    for number in range(COUNT):
        own = shards.read(number)
        assert (found[number].images, questions(found[number])) == (own.images, questions(own))
        assert (answers(found[number]) == answers(own)) == (number == 5)  # 5: the only one with two answers
    assert Counter(map(answers, found)) == Counter(answers(shards.read(n)) for n in range(COUNT))
    assert changed.alone == 1


def test_a_control_is_the_same_for_ever_and_another_one_for_each_seed(shards: ShardSet) -> None:
    one, two = controlled(shards, "shuffle_answer"), controlled(shards, "shuffle_answer")
    assert one.fingerprint == two.fingerprint != shards.fingerprint
    assert one.partners.tolist() == two.partners.tolist()
    assert pickle.loads(pickle.dumps(one)).read(3) == two.read(3)
    others = {controlled(shards, "shuffle_answer", seed=seed).fingerprint for seed in range(5)}
    assert len(others) == 5


def test_lengths_are_those_of_the_changed_samples(shards: ShardSet) -> None:
    changed = controlled(shards, "shuffle_answer")
    table = measure_lengths(changed, measure, fingerprint="f", max_skipped=0, processes=1, progress=False)
    assert [tuple(row)[:3] for row in table.rows.tolist()] == [measure(changed.read(n)) for n in range(COUNT)]


@given(sizes=st.lists(st.integers(0, 4), max_size=60))
def test_nobody_stays_at_home_who_has_somebody_to_change_with(sizes: list[int]) -> None:
    found, alone = circle(np.array(sizes, dtype=np.uint32), key(3))
    assert sorted(found.tolist()) == list(range(len(sizes)))
    assert [sizes[partner] for partner in found.tolist()] == sizes
    often = Counter(sizes)
    for number, partner in enumerate(found.tolist()):
        assert (partner == number) == (sizes[number] == 0 or often[sizes[number]] == 1)
    assert alone == sum(count == 1 for size, count in often.items() if size)


def test_facts_are_tasks_and_answers_and_are_kept(shards: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    for _ in range(2):  # gathered, then read
        facts = read_facts(shards, processes=1, progress=False)
        assert facts.tasks == ("caption", "vqa")
        assert facts.task.tolist() == [0, 1, 0, 1, 0, 1, 0, 1, -1]
        assert facts.answers.tolist() == [1, 1, 1, 1, 1, 2, 1, 1, 1]
        monkeypatch.setattr(ShardSet, "read_text", lambda *_: pytest.fail("read again"))


def test_an_answer_with_a_picture_stays_at_home(tmp_path: Path) -> None:
    with ShardWriter(tmp_path / "s.tar") as shard:
        for number in range(3):
            drawn = Message(role="assistant", content=("here", ImageRef(0)))
            turns = (Message(role="user", content=("draw",)), drawn)
            shard.write(
                str(number), Conversation(id=f"s/{number}", messages=turns, images=(picture(),), sizes=((8, 6),))
            )
        shard.finish()
    drawings = open_source(tmp_path, cache=tmp_path / "cache")
    assert controlled(drawings, "shuffle_answer").read(1) == drawings.read(1)


def test_reading_a_set_is_unchanged_by_its_controls(tmp_path: Path) -> None:
    plain = make_shards(tmp_path, 6)
    before = [plain.read(n) for n in range(6)]
    controlled(plain, "shuffle_answer").read(0)
    assert [plain.read(n) for n in range(6)] == before
