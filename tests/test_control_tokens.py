"""Control tokens that swallow the white space beside them, as Phi-3's do."""

from pathlib import Path

import pytest
from factories import tiny_llama_tokenizer
from tokenizers import AddedToken

from mmit.conversation import Conversation, Message, Role
from mmit.encoding import encode_conversation, show_tokens
from mmit.images import ImageSpec
from mmit.templates import ChatTemplate
from mmit.tokenizer import prepare_tokenizer

HALF = (0.5, 0.5, 0.5)
SPEC = ImageSpec(size=(8, 8), mean=HALF, std=HALF, resize="pad", tokens_per_tile=4)
TURNS: list[tuple[Role, str]] = [("user", "What?"), ("assistant", "a tree"), ("user", "And?"), ("assistant", "a bus")]


@pytest.mark.parametrize("swallows", [True, False])
def test_the_end_marker_of_an_answer_is_trained_even_if_it_swallows_the_line_feed(
    tmp_path: Path, swallows: bool
) -> None:
    tokenizer = tiny_llama_tokenizer(tmp_path)
    names = ("<|user|>", "<|assistant|>", "<|system|>", "<|end|>")
    tokenizer.add_tokens([AddedToken(name, rstrip=swallows, special=True) for name in names], special_tokens=True)
    prepared = prepare_tokenizer(tokenizer)
    conversation = Conversation(id="r", messages=tuple(Message(role=r, content=(t,)) for r, t in TURNS))
    encoded = encode_conversation(
        conversation,
        template=ChatTemplate.load("phi3", prepared.tokenizer),
        tokenizer=prepared.tokenizer,
        spec=SPEC,
        image_id=prepared.image_id,
    )
    shown = show_tokens(encoded, prepared.tokenizer, image_id=prepared.image_id)
    assert [is_trained for text, is_trained in shown if text == "<|end|>"] == [False, True, False, True]
    trained = "".join(text for text, is_trained in shown if is_trained)
    assert trained.replace(" ", "") == "atree<|end|>abus<|end|>"
    assert not any(is_trained for text, is_trained in shown if text.startswith(("<|user|>", "<|assistant|>")))
