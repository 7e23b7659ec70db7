"""Loading tokenizers, with sentencepiece itself as the reference for ``tokenizer.model``."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from factories import CORPUS, tiny_llama_tokenizer, tiny_qwen_tokenizer

from mmit.errors import ConfigError, MissingExtra
from mmit.tokenizer import control_tokens, is_single_token, load_tokenizer, prepare_tokenizer


@pytest.fixture(scope="module")
def sentencepiece_directory(tmp_path_factory) -> Path:
    """A directory like the original Llama and Vicuna repositories: tokenizer.model, no tokenizer.json."""
    import sentencepiece

    directory = tmp_path_factory.mktemp("llama")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([*CORPUS, "    if a  b:\n        return    c"] * 4),
        model_writer=model,
        vocab_size=400,
        model_type="bpe",
        byte_fallback=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        pad_id=-1,
        num_threads=1,
        minloglevel=2,
    )
    (directory / "tokenizer.model").write_bytes(model.getvalue())
    config = {"tokenizer_class": "LlamaTokenizer", "legacy": False, "model_max_length": 2048, "pad_token": None}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return directory


TEXTS = ["a  b", "\n    return", "What is in the picture?", "Ünï 日本 🗼\r\n\tq", "a     ", "x" * 40]


def test_a_tokenizer_model_gives_the_ids_of_sentencepiece(sentencepiece_directory: Path) -> None:
    import sentencepiece

    reference = sentencepiece.SentencePieceProcessor(model_file=str(sentencepiece_directory / "tokenizer.model"))
    tokenizer = load_tokenizer(sentencepiece_directory)
    for text in TEXTS:
        assert tokenizer(text)["input_ids"] == [1, *reference.encode(text)], text
    assert tokenizer.model_max_length == 2048


def test_what_was_read_from_a_tokenizer_model_survives_saving(sentencepiece_directory: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(sentencepiece_directory)
    tokenizer.save_pretrained(tmp_path)
    again = load_tokenizer(tmp_path)
    for text in [*TEXTS, "one</s>USER: two"]:
        assert again(text)["input_ids"] == tokenizer(text)["input_ids"]


def test_without_sentencepiece_the_extra_is_named(sentencepiece_directory: Path, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(MissingExtra, match=r"mmit\[llama\]"):
        load_tokenizer(sentencepiece_directory)


def test_legacy_is_as_the_directory_says(sentencepiece_directory: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((sentencepiece_directory / "tokenizer.model").read_bytes())
    config = tmp_path / "tokenizer_config.json"
    pieces = {}
    for legacy in (True, False):
        config.write_text(json.dumps({"tokenizer_class": "LlamaTokenizer", "legacy": legacy}))
        tokenizer = load_tokenizer(tmp_path)
        pieces[legacy] = tokenizer.convert_ids_to_tokens(tokenizer("hi</s>USER")["input_ids"])
    after = {legacy: found[found.index("</s>") + 1] for legacy, found in pieces.items()}
    assert after[True].startswith("▁")  # the old behaviour: a space after every control token
    assert not after[False].startswith("▁")
    config.unlink()
    assert load_tokenizer(tmp_path)("hi</s>USER")["input_ids"] == tokenizer("hi</s>USER")["input_ids"]


def test_preparing_adds_an_image_token_and_a_padding_token_once(tmp_path: Path) -> None:
    llama = tiny_llama_tokenizer(tmp_path / "llama")
    before = len(llama)
    prepared = prepare_tokenizer(llama)
    assert (prepared.image_id, prepared.pad_id) == (before, before + 1)
    assert prepare_tokenizer(llama) == prepared
    assert llama("a <image>\nb")["input_ids"].count(prepared.image_id) == 1
    assert {"<image>", "<pad>", "<s>", "</s>", "<unk>"} <= control_tokens(llama)
    qwen = tiny_qwen_tokenizer(tmp_path / "qwen")
    assert prepare_tokenizer(qwen).pad_id == qwen.convert_tokens_to_ids("<|endoftext|>")  # it had one
    assert is_single_token(qwen, "<|im_end|>")
    assert not is_single_token(qwen, "<|eot_id|>")


def test_a_wrong_place_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such directory"):
        load_tokenizer(tmp_path / "nothing")
    with pytest.raises(ConfigError, match="neither tokenizer"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"garbage")
    with pytest.raises(ConfigError, match="damaged"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "T5Tokenizer"}')
    with pytest.raises(ConfigError, match="a T5Tokenizer with"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ConfigError, match="cannot be loaded"):
        load_tokenizer(tmp_path)
