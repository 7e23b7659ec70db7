"""Pieces of text from token ids: whole characters, nothing lost, nothing taken back."""

from __future__ import annotations

import pytest
from factories import tiny_llama_tokenizer, tiny_qwen_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaTokenizer, PreTrainedTokenizerBase

from mmit.chat.text_stream import TextStream


@pytest.fixture(scope="module", params=[tiny_llama_tokenizer, tiny_qwen_tokenizer])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PreTrainedTokenizerBase:
    return request.param(tmp_path_factory.mktemp("tokenizer"))


def pieces(tokenizer: PreTrainedTokenizerBase, ids: list[int], stop: tuple[str, ...] = ()) -> list[str]:
    stream = TextStream(tokenizer, stop)
    found = [stream.push(token) for token in ids]
    return [*found, stream.finish()]


def text_of(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    text = tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
    assert isinstance(text, str)
    return text


def ids_of(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False)


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(codec="utf-8", exclude_characters="\ufffd"), max_size=30))
def test_the_pieces_of_any_text_are_whole_characters_and_join_to_it(
    tokenizer: PreTrainedTokenizerBase, text: str
) -> None:
    found = pieces(tokenizer, ids_of(tokenizer, text))
    assert "".join(found) == text.strip()
    assert not any("\ufffd" in piece for piece in found)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_ids_that_spell_broken_utf8_lose_nothing(tokenizer: PreTrainedTokenizerBase, data: st.DataObject) -> None:
    ids = data.draw(st.lists(st.integers(3, len(tokenizer) - 1), max_size=20))
    whole = text_of(tokenizer, ids).strip()
    found = "".join(pieces(tokenizer, ids))
    # Llama's decoder turns a run of byte tokens with one bad byte into U+FFFD altogether; a stream has already said the
    # good characters of it, so it may hold more of them, in the same order, and fewer U+FFFD.
    assert found == whole or isinstance(tokenizer, LlamaTokenizer)
    said = iter(found)
    assert all(character in said for character in whole.replace("\ufffd", ""))
    assert found.count("\ufffd") <= whole.count("\ufffd")


def test_a_character_of_four_tokens_comes_in_one_piece(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = ids_of(tokenizer, "A🐕B")
    assert len(ids) >= 6  # the dog alone is four tokens
    assert [piece for piece in pieces(tokenizer, ids) if piece] == ["A", "🐕", "B"]


def test_a_cut_character_at_the_end_is_not_lost(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = ids_of(tokenizer, "A🐕")[:-1]
    assert "".join(pieces(tokenizer, ids)) == text_of(tokenizer, ids)
    assert "\ufffd" in text_of(tokenizer, ids)


def test_a_stop_string_ends_the_text_before_it_even_across_tokens(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = ids_of(tokenizer, "The circle is red. And the square")
    assert "".join(pieces(tokenizer, ids, stop=(". And",))) == "The circle is red"
    assert "".join(pieces(tokenizer, ids, stop=("square", "circle"))) == "The"


def test_the_beginning_of_a_stop_string_that_does_not_come_is_said(tokenizer: PreTrainedTokenizerBase) -> None:
    ids = ids_of(tokenizer, "red. An apple. An")
    found = pieces(tokenizer, ids, stop=(". And",))
    assert "".join(found) == "red. An apple. An"
    assert found[-1] == ". An"  # held until the end was known


def test_white_space_around_the_answer_is_left_out(tokenizer: PreTrainedTokenizerBase) -> None:
    assert "".join(pieces(tokenizer, ids_of(tokenizer, "\n  red  bus \n\n"))) == "red  bus"


def test_a_stop_string_of_white_space_counts_where_the_answer_begins(tokenizer: PreTrainedTokenizerBase) -> None:
    stream = TextStream(tokenizer, ("\n",))
    said = [stream.push(token) for token in ids_of(tokenizer, "\nred")]
    assert "".join(said) == ""
    assert stream.is_stopped
