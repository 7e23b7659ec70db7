"""From conversations to ids, shifted labels and pixels."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import pytest
import torch
from factories import CORPUS, tiny_llama_tokenizer, tiny_qwen_tokenizer
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers

from mmit.batch import IGNORE, Encoded
from mmit.conversation import Conversation, ImageRef, Message, Part
from mmit.encoding import encode, encode_conversation, show_tokens
from mmit.errors import ConfigError, DataError
from mmit.images import ImageSpec
from mmit.templates import ChatTemplate, Rendered
from mmit.tokenizer import PreparedTokenizer, load_tokenizer, prepare_tokenizer

SPEC = ImageSpec(size=(8, 8), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), resize="squash", tokens_per_tile=4)


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> PreparedTokenizer:
    return prepare_tokenizer(tiny_llama_tokenizer(tmp_path_factory.mktemp("llama")))


@pytest.fixture(scope="module")
def qwen(tmp_path_factory) -> PreparedTokenizer:
    return prepare_tokenizer(tiny_qwen_tokenizer(tmp_path_factory.mktemp("qwen")))


def png(colour: str, width: int = 12, height: int = 6) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, "PNG")
    return file.getvalue()


def talk(*turns: tuple[Part, ...], **fields) -> Conversation:
    roles = ("user", "assistant")
    messages = tuple(Message(role=roles[n % 2], content=content) for n, content in enumerate(turns))
    return Conversation(id="r7", messages=messages, **fields)


def encoded(conversation: Conversation, known: PreparedTokenizer, name: str = "vicuna", **options) -> Encoded:
    return encode_conversation(
        conversation,
        template=ChatTemplate.load(name, known.tokenizer),
        tokenizer=known.tokenizer,
        spec=SPEC,
        image_id=known.image_id,
        **options,
    )


def trained_text(sample: Encoded, known: PreparedTokenizer) -> str:
    return "".join(text for text, trained in show_tokens(sample, known.tokenizer, image_id=known.image_id) if trained)


def test_labels_are_the_next_tokens_of_the_answer_and_its_end(llama: PreparedTokenizer) -> None:
    sample = encoded(talk(("What is it?",), ("A red bus.",)), llama, "mistral")
    ids = sample.input_ids.tolist()
    words = llama.tokenizer.convert_ids_to_tokens(ids)
    assert words[0] == "<s>"
    assert words.count("<s>") == 1
    assert words[-6:] == ["▁A", "▁red", "▁bus", ".", "▁", "</s>"]
    assert sample.labels.tolist() == [IGNORE] * (len(ids) - 7) + ids[-6:] + [IGNORE]
    assert sample.trained_tokens == 6


def test_each_image_becomes_as_many_tokens_as_its_plan_says(qwen: PreparedTokenizer) -> None:
    images = (png("red"), png("blue"))
    sample = encoded(talk((ImageRef(1), " or ", ImageRef(0), "?"), ("The first.",), images=images), qwen, "chatml")
    runs = "".join("#" if token == qwen.image_id else "." for token in sample.input_ids.tolist()).strip(".")
    assert runs.count("#") == 8
    assert runs.startswith("####.")
    assert sample.pixels.shape == (2, 3, 8, 8)
    assert sample.pixels[:, :, 0, 0].tolist() == [[0, 0, 255], [255, 0, 0]]  # in the order of their places
    assert trained_text(sample, qwen) == "The first.<|im_end|>"


def test_lengths_need_sizes_only(qwen: PreparedTokenizer) -> None:
    turns: tuple[tuple[Part, ...], ...] = ((ImageRef(0), "What?"), ("A bus.",))
    whole = encoded(talk(*turns, images=(png("red"),)), qwen, "chatml")
    short = encoded(talk(*turns, sizes=((12, 6),)), qwen, "chatml", pixels=False)
    assert torch.equal(short.input_ids, whole.input_ids)
    assert torch.equal(short.labels, whole.labels)
    assert short.pixels.shape == (0, 3, 8, 8)


def test_an_image_in_an_answer_is_never_a_label(llama: PreparedTokenizer) -> None:
    sample = encoded(talk(("Draw",), ("Here: ", ImageRef(0), " done"), sizes=((1, 1),)), llama, pixels=False)
    assert (sample.input_ids == llama.image_id).sum() == 4
    assert not (sample.labels == llama.image_id).any()
    assert trained_text(sample, llama) == " Here:  done</s>"


def test_the_last_character_decides_whether_a_token_is_trained() -> None:
    """A vocabulary in which the end of a question, the start of an answer, and two line feeds are one token each."""
    letters = [*"abQA: ", "Ċ", "Ġ"]
    merges = [("Ċ", "Ċ"), ("b", "A"), ("Ġ", "a")]
    vocab = {token: n for n, token in enumerate([*letters, *("".join(pair) for pair in merges)])}
    from transformers import PreTrainedTokenizerFast

    core = Tokenizer(models.BPE(vocab=vocab, merges=merges))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core)

    def tokens(rendered: Rendered) -> tuple[list[str], list[bool]]:
        ids, mask = encode(rendered, tokenizer, [], image_id=99)
        return [str(tokenizer.convert_ids_to_tokens(token)) for token in ids.tolist()], mask.tolist()

    # " a" holds the last character of the span (3, 5) and is trained; "bA" ends outside of the span (0, 1).
    assert tokens(Rendered("aQ: aQ", ((3, 5),))) == (["a", "Q", ":", "Ġa", "Q"], [False, False, False, True, False])
    assert tokens(Rendered("bA", ((0, 1),))) == (["bA"], [False])
    # The prompt "Q\n" was followed by an answer "\na": cut, so that the prompt alone has the same ids.
    assert tokens(Rendered("Q\n\na", ((2, 4),), (2,))) == (["Q", "Ċ", "Ċ", "a"], [False, False, True, True])
    assert tokens(Rendered("Q\n", ())) == (["Q", "Ċ"], [False, False])
    assert tokens(Rendered("Q\n\na", ()))[0] == ["Q", "ĊĊ", "a"]


def test_llava_style_is_sentencepiece_on_each_piece_between_images(tmp_path: Path) -> None:
    """The reference of LLaVA: the slow tokenizer of its day, that is sentencepiece, for each piece on its own."""
    import sentencepiece

    file = tmp_path / "tokenizer.model"
    with file.open("wb") as writer:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([*CORPUS] * 4),
            model_writer=writer,
            vocab_size=380,
            model_type="bpe",
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            num_threads=1,
            minloglevel=2,
        )
    reference = sentencepiece.SentencePieceProcessor(model_file=str(file))
    known = prepare_tokenizer(load_tokenizer(tmp_path))
    pieces = ["USER: ", "\nWhat is", " in the picture?", ""]
    ids, _ = encode(
        Rendered("<image>".join(pieces), ()), known.tokenizer, [2, 1, 1], image_id=known.image_id, style="llava"
    )
    a, b, c, _ = (reference.encode(piece) for piece in pieces)
    image = known.image_id
    assert ids.tolist() == [1, *a, image, image, *b, image, *c, image]
    # The hf style has no space token after an image: that is the one difference here.
    ids, _ = encode(Rendered("a<image>\nb", ()), known.tokenizer, [1], image_id=image)
    assert known.tokenizer.convert_ids_to_tokens(ids.tolist()) == ["<s>", "▁a", "<image>", "<0x0A>", "b"]


def test_blip_style_puts_the_pictures_that_open_a_text_before_the_start_token(llama: PreparedTokenizer) -> None:
    image, plain = llama.image_id, llama.tokenizer
    ids, trained = encode(
        Rendered("<image><image>What? Red.<image>", ((19, 24),)), plain, [2, 1, 1], image_id=image, style="blip"
    )
    assert ids.tolist() == [image] * 3 + [1] + plain.encode("What? Red.", add_special_tokens=False) + [image]
    answer = plain.convert_ids_to_tokens(ids[trained].tolist())
    assert "".join(answer) == "▁Red."


@pytest.mark.parametrize(("name", "kind"), [("vicuna", "llama"), ("llama2", "llama"), ("qwen", "qwen")])
def test_the_ids_are_those_of_the_processor_of_transformers(name: str, kind: str, llama, qwen) -> None:
    from transformers import CLIPImageProcessor, LlavaProcessor

    known = {"llama": llama, "qwen": qwen}[kind]
    template = ChatTemplate.load(name, known.tokenizer)
    processor = LlavaProcessor(
        CLIPImageProcessor(size={"shortest_edge": 28}, crop_size=28),
        known.tokenizer,
        patch_size=14,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,  # 28 / 14 = 2, so an image is 2 x 2 tokens, as SPEC says
        chat_template=template.jinja,
    )
    question = [{"type": "image", "image": Image.new("RGB", (12, 6))}, {"type": "text", "text": "What is it?"}]
    messages: Any = [{"role": "user", "content": question}]
    theirs: Any = processor.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=True)
    rendered = template.render(talk((ImageRef(0), "What is it?")), reply=True)
    ours, _ = encode(rendered, known.tokenizer, [4], image_id=known.image_id)
    assert ours.tolist() == list(theirs["input_ids"][0])


def test_a_sample_is_shown_with_its_images_folded(llama: PreparedTokenizer) -> None:
    sample = encoded(talk((ImageRef(0), "\nÜ?"), ("Red 猫",), sizes=((1, 1),)), llama, "mistral", pixels=False)
    shown = show_tokens(sample, llama.tokenizer, image_id=llama.image_id)
    assert ("<image> x 4", False) in shown
    assert ("猫", True) in shown  # three bytes, three tokens, one character
    assert "".join(text for text, _ in shown) == "<s> [INST] <image> x 4\nÜ? [/INST] Red 猫 </s>"
    assert "".join(text for text, trained in shown if trained) == " Red 猫 </s>"


@pytest.mark.parametrize(
    ("conversation", "reason"),
    [
        (talk(("Hi",)), "no trained token"),
        (talk((ImageRef(0), "Hi"), ("Yo",)), r"has 0 images, but its turns refer to images \[0\]"),
        (talk(("Hi",), ("Yo",), images=(png("red"),)), r"has 1 images, but its turns refer to images \[\]"),
        (talk((ImageRef(0), ImageRef(0)), ("Yo",), images=(png("red"),)), "has 1 images"),
        (talk((ImageRef(0),), ("Yo",), images=(b"no",)), "2 bytes that are no image"),
        (talk((ImageRef(0),), ("Yo",), images=(b"no",), sizes=((3, 3),)), "image 0: 2 bytes that are no image"),
        (talk((ImageRef(0),), ("Yo",), sizes=((3, 3),)), "without the bytes"),
    ],
)
def test_what_cannot_be_encoded_is_refused_by_record(conversation: Conversation, reason: str, llama) -> None:
    with pytest.raises(DataError, match=f"record 'r7'.*{reason}"):
        encoded(conversation, llama)


def test_a_tokenizer_without_an_image_token_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="prepare_tokenizer"):
        encode(Rendered("<image>a", ()), tiny_llama_tokenizer(tmp_path), [1], image_id=5_000)
