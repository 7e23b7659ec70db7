"""The question of each tile's turn: which text it is, how it is cut and padded, how a batch keeps them apart."""

from __future__ import annotations

import pytest
import torch
from factories import tiny_bert_tokenizer

from mmit.batch import IGNORE, Encoded, Instructions, collate, join_instructions
from mmit.conversation import Conversation, ImageRef, Message
from mmit.instructions import InstructionReader


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> InstructionReader:
    return InstructionReader(tiny_bert_tokenizer(tmp_path_factory.mktemp("bert")), length=6)


def said(*turns: tuple[str, tuple[str | ImageRef, ...]]) -> Conversation:
    messages = tuple(Message(role=role, content=content) for role, content in turns)  # ty: ignore[invalid-argument-type]
    return Conversation(id="talk", messages=messages)


def words(found: Instructions, reader: InstructionReader) -> list[str]:
    return [str(reader.tokenizer.decode(ids[mask.bool()])) for ids, mask in zip(found.ids, found.mask, strict=True)]


def test_a_picture_is_read_with_the_text_of_its_own_turn(reader: InstructionReader) -> None:
    talk = said(
        ("system", ("The picture is red.",)),
        ("user", (ImageRef(0), "what colour is ", ImageRef(1), "?")),
        ("assistant", ("blue",)),
        ("user", (ImageRef(2),)),
        ("assistant", ("red",)),
        ("user", ("how many?",)),
    )
    asked = reader.read(talk, tiles=[1, 2, 1])
    first = "[CLS] what colour is? [SEP]"
    assert words(asked, reader) == [first, first, first, "[CLS] [SEP]"]


def test_a_long_question_is_cut_and_keeps_its_last_token(reader: InstructionReader) -> None:
    asked = reader.read(said(("user", (ImageRef(0), "what is the colour of the circle?"))), tiles=[1])
    assert words(asked, reader) == ["[CLS] what is the colour [SEP]"]


def test_a_control_token_in_a_question_is_read_as_text(reader: InstructionReader) -> None:
    asked = reader.read(said(("user", (ImageRef(0), "[SEP]"))), tiles=[1])
    assert asked.ids[0].tolist().count(reader.tokenizer.convert_tokens_to_ids("[SEP]")) == 1


def test_a_text_without_pictures_asks_nothing(reader: InstructionReader) -> None:
    asked = reader.read(said(("user", ("what?",))), tiles=[])
    assert asked.ids.shape == asked.mask.shape == (0, 1)


def test_a_batch_keeps_the_questions_in_the_order_of_the_tiles_and_pads_them() -> None:
    def sample(ids: list[list[int]]) -> Encoded:
        rows = torch.tensor(ids, dtype=torch.int64) if ids else torch.zeros((0, 1), dtype=torch.int64)
        return Encoded(
            id="s",
            input_ids=torch.arange(3),
            labels=torch.full((3,), IGNORE),
            pixels=torch.zeros((len(ids), 3, 2, 2), dtype=torch.uint8),
            instructions=Instructions(ids=rows, mask=torch.ones_like(rows)),
        )

    rows = [[sample([[5, 6, 7]]), sample([])], [sample([[8], [8]])]]
    asked = collate(rows, pad_id=0, image_size=(2, 2)).instructions
    assert asked is not None
    assert asked.ids.tolist() == [[5, 6, 7], [8, 0, 0], [8, 0, 0]]
    assert asked.mask.tolist() == [[1, 1, 1], [1, 0, 0], [1, 0, 0]]
    assert collate([[]], pad_id=0, image_size=(2, 2)).instructions is None
    assert join_instructions([]).ids.shape == (0, 1)
