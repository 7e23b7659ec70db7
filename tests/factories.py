"""Tiny tokenizers made on the spot: the tests need nothing from outside."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import BertTokenizer, LlamaTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast

CORPUS = (
    "A chat between a curious user and an artificial intelligence assistant.",
    "USER: ASSISTANT: [INST] [/INST] system",
    "The assistant gives helpful, detailed, and polite answers to the user's questions.",
    "What colour is the circle? The circle is red. The square is blue, the triangle is green and yellow.",
    "What is in the picture? A red bus parked next to a tree. How many? One. Two. Three. Describe the image.",
    "You are a helpful assistant. Human: Assistant: user model assistant",
)

# How Qwen2 splits a text before merging: line feeds stay together, digits apart.
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@cache
def _llama_parts() -> tuple[dict[str, int], tuple[tuple[str, str], ...]]:
    """Vocabulary and merges in Llama's order: <unk> <s> </s>, 256 bytes, then pieces."""
    specials = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    trained = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    letters = [chr(code) for code in range(33, 127)] + ["▁"]
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=specials, initial_alphabet=letters, show_progress=False
    )
    trained.train_from_iterator(CORPUS, trainer)
    made = json.loads(trained.to_str())["model"]
    return made["vocab"], tuple((left, right) for left, right in made["merges"])


def tiny_llama_tokenizer(directory: Path | str) -> PreTrainedTokenizerBase:
    """A Llama-type tokenizer (byte fallback, metaspace, ``<s>`` in front), written to ``directory``."""
    vocab, merges = _llama_parts()
    tokenizer = LlamaTokenizer(vocab=dict(vocab), merges=list(merges), legacy=False, add_bos_token=True)
    tokenizer.save_pretrained(directory)
    file = Path(directory) / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "legacy": False}, indent=2))
    return tokenizer


def tiny_qwen_tokenizer(directory: Path | str) -> PreTrainedTokenizerBase:
    """A Qwen-type tokenizer (byte-level BPE, no start token), written to ``directory``."""
    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN_WORDS), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trained.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=600, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    trained.train_from_iterator([*CORPUS, "A list:\n\n- one\n- two\n\n\nAnd  more.\n\n"], trainer)
    trained.add_special_tokens(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=trained,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
        clean_up_tokenization_spaces=False,
    )
    tokenizer.save_pretrained(directory)
    return tokenizer


def tiny_bert_tokenizer(directory: Path | str) -> PreTrainedTokenizerBase:
    """A BERT-type tokenizer (lower case, ``[CLS]`` and ``[SEP]`` around), written to ``directory``."""
    words = "what how many colour is are the this in picture circle square red blue ? . , #"
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *words.split(), *(f"##{letter}" for letter in "aeiost")]
    letters = [chr(code) for code in range(ord("a"), ord("z") + 1)]
    tokenizer = BertTokenizer(vocab={name: index for index, name in enumerate([*names, *letters])})
    tokenizer.save_pretrained(directory)
    return tokenizer
