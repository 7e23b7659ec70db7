"""Tokenizers: load one from a directory or the hub, and give it an image token and a padding token.

transformers reads most of them right. Cured here: a directory with ``tokenizer.model`` only (the original LLaVA, Vicuna
and Llama repositories), whose merges transformers 5 rebuilds without the scores of the pieces, so that runs of spaces
come out as other tokens than the model learned.
"""

from __future__ import annotations

import json
import re
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mmit.errors import ConfigError, MissingExtra
from mmit.hub import revision_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

IMAGE_TEXT = "<image>"
"""The text of an image's place in a rendered conversation; one special token in a prepared tokenizer."""

PAD_TEXT = "<pad>"

# Tokens that vocabularies keep for later: Llama 3, Gemma, Qwen 1, OLMo, Phi 3, Mistral (two ways), Falcon 3.
_RESERVED = re.compile(
    r"<\|reserved_special_token_\d+\|>|<unused\d+>|<\|extra_\d+\|>|<\|extra_id_\d+\|>|<\|placeholder\d+\|>"
    r"|\[control_\d+\]|<SPECIAL_\d+>|>>UNUSED_\d+<<"
)
_READABLE = ("tokenizer.json", "vocab.json", "vocab.txt", "tekken.json")
_LLAMA_CLASSES = ("LlamaTokenizer", "LlamaTokenizerFast")
_SPECIAL_NAMES = ("bos_token", "eos_token", "unk_token", "pad_token")
_COPIED = ("add_bos_token", "add_eos_token", "legacy", "model_max_length", "padding_side", "chat_template")


@dataclass(frozen=True)
class PreparedTokenizer:
    """A tokenizer that knows ``<image>`` and can pad."""

    tokenizer: PreTrainedTokenizerBase
    image_id: int
    pad_id: int


def add_tokens(tokenizer: PreTrainedTokenizerBase, texts: Sequence[str]) -> tuple[int, ...]:
    """Make each text a token, in place, and give their ids. Raises ConfigError for one that is a token already."""
    from transformers import AddedToken

    for text in texts:
        if not text.strip() or is_single_token(tokenizer, text):
            what = f"'{text}' is a token of this tokenizer already" if text.strip() else "a text is empty"
            raise ConfigError(f"model.language_model.new_tokens: {what}; leave it out")
        tokenizer.add_tokens([AddedToken(text, lstrip=False, rstrip=False, normalized=False, special=False)])
    return tuple(token_id(tokenizer, text) for text in texts)


def load_tokenizer(path: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a local directory, or of a hub name, unchanged.

    ``legacy`` of a Llama tokenizer is as the directory says, and False where it says nothing. No code of a repository
    is ever run. Raises ConfigError if there is no tokenizer or it cannot be read, MissingExtra if reading it needs
    sentencepiece.
    """
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoTokenizer

    directory = Path(path).expanduser()
    is_local = directory.is_dir()
    if not is_local and (directory.is_absolute() or str(path).startswith((".", "~"))):
        raise ConfigError(f"tokenizer '{path}': there is no such directory")
    if is_local and not any((directory / name).is_file() for name in _READABLE):
        if (directory / "tokenizer.model").is_file():
            return _from_sentencepiece(directory)
        raise ConfigError(f"tokenizer '{path}': the directory has neither tokenizer.json nor tokenizer.model")
    try:
        with _without_remarks():
            found = AutoTokenizer.from_pretrained(
                directory if is_local else str(path), revision=revision_of(path), trust_remote_code=False
            )
    except (OSError, ValueError, ImportError, KeyError, TypeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())[:200]
        where = "" if is_local else " (no local directory of this name; taken for a name on the hub)"
        raise ConfigError(f"tokenizer '{path}'{where} cannot be loaded: {reason}") from error
    if found is None:
        raise ConfigError(f"tokenizer '{path}': transformers knows no tokenizer for this model")
    return found


@contextmanager
def _without_remarks() -> Generator[None]:
    """transformers remarks on a config.json that is no class of its own; the tokenizer does not depend on it."""
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def prepare_tokenizer(tokenizer: PreTrainedTokenizerBase, *, rows: int | None = None) -> PreparedTokenizer:
    """Give ``tokenizer``, in place, the special token ``<image>`` and a padding token where they are absent.

    rows: of the model's token table. Where all are taken, a token that the vocabulary keeps in reserve (such as
    ``<|reserved_special_token_7|>``) gets the name, its id and its row; where there is none, a token is added.
    """
    from transformers import AddedToken

    if not is_single_token(tokenizer, IMAGE_TEXT) and not _take_reserved(tokenizer, IMAGE_TEXT, rows):
        added = AddedToken(IMAGE_TEXT, lstrip=False, rstrip=False, normalized=False, special=True)
        tokenizer.add_tokens([added], special_tokens=True)
    if tokenizer.pad_token is None:
        _take_reserved(tokenizer, PAD_TEXT, rows)
        tokenizer.add_special_tokens({"pad_token": PAD_TEXT})
    return PreparedTokenizer(tokenizer, token_id(tokenizer, IMAGE_TEXT), token_id(tokenizer, tokenizer.pad_token))


def _take_reserved(tokenizer: Any, name: str, rows: int | None) -> bool:  # noqa: ANN401  (one with a backend)
    """Rename the last reserved token, where the table has no row to spare; False where nothing was renamed."""
    if rows is None or len(tokenizer) < rows or not tokenizer.is_fast or name in tokenizer.get_vocab():
        return False
    from tokenizers import Tokenizer

    named = set(map(str, tokenizer.all_special_tokens))
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    free = [
        token
        for token in content["added_tokens"]
        if token["special"] and token["content"] not in named and _RESERVED.fullmatch(token["content"])
    ]
    if not free:
        return False
    chosen = max(free, key=lambda token: token["id"])
    vocabulary = content["model"].get("vocab")
    if isinstance(vocabulary, dict) and chosen["content"] in vocabulary:
        vocabulary[name] = vocabulary.pop(chosen["content"])
    chosen |= {"content": name, "lstrip": False, "rstrip": False, "normalized": False}
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(content))
    return True


def token_id(tokenizer: PreTrainedTokenizerBase, token: str) -> int:
    """The id of a token of the vocabulary."""
    found = tokenizer.convert_tokens_to_ids(token)
    assert isinstance(found, int), f"{token} is not in the vocabulary"
    return found


def is_single_token(tokenizer: PreTrainedTokenizerBase, text: str) -> bool:
    """True where ``text`` is one entry of the vocabulary and is encoded as that entry."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    return len(ids) == 1 and tokenizer.get_vocab().get(text) == ids[0]


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> frozenset[str]:
    """The texts that this tokenizer turns into control tokens wherever they stand, and ``<image>``."""
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    return frozenset({IMAGE_TEXT, *special, *map(str, tokenizer.all_special_tokens)})


def _from_sentencepiece(directory: Path) -> PreTrainedTokenizerBase:
    """A Llama tokenizer from ``tokenizer.model``, its merges in the order of the pieces' scores."""
    config = {**_json(directory / "special_tokens_map.json"), **_json(directory / "tokenizer_config.json")}
    kind = config.get("tokenizer_class", "LlamaTokenizer")
    if kind not in _LLAMA_CLASSES:
        raise ConfigError(
            f"tokenizer '{directory}': a {kind} with tokenizer.model only; "
            "save it once with a transformers that reads it, so that it has a tokenizer.json"
        )
    try:
        from sentencepiece import SentencePieceProcessor
    except ImportError as error:
        raise MissingExtra("sentencepiece", "llama", f"reading {directory / 'tokenizer.model'}") from error
    from transformers import AddedToken, LlamaTokenizer
    from transformers.convert_slow_tokenizer import generate_merges

    try:
        pieces = SentencePieceProcessor(model_file=str(directory / "tokenizer.model"))
    except (RuntimeError, OSError) as error:
        raise ConfigError(f"tokenizer '{directory}': tokenizer.model is damaged ({error})") from error
    vocab = {pieces.id_to_piece(index): index for index in range(pieces.get_piece_size())}
    scores = {piece: pieces.get_score(index) for piece, index in vocab.items()}
    control = [piece for piece, index in vocab.items() if pieces.is_control(index) or pieces.is_unknown(index)]
    settings: dict[str, Any] = {name: config[name] for name in _COPIED if config.get(name) is not None}
    for name in _SPECIAL_NAMES:
        if config.get(name):
            settings[name] = _token_text(config[name])
    chat_template = directory / "chat_template.jinja"
    if chat_template.is_file():
        settings["chat_template"] = chat_template.read_text(encoding="utf-8")
    defaults: dict[str, Any] = {"legacy": False, "add_bos_token": True}
    merges = generate_merges(vocab, scores, skip_tokens=control)
    tokenizer = LlamaTokenizer(vocab=vocab, merges=merges, **{**defaults, **settings})
    decoder = config.get("added_tokens_decoder", {})
    more = {token["content"]: int(index) for index, token in decoder.items() if int(index) >= len(vocab)}
    more.update(_json(directory / "added_tokens.json"))
    for content in sorted(more, key=lambda text: more[text]):
        flags = decoder.get(str(more[content]), {})
        tokenizer.add_tokens([AddedToken(content, normalized=False, special=flags.get("special", True))])
    tokenizer.name_or_path = str(directory)
    return tokenizer


def _json(file: Path) -> dict[str, Any]:
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{file} is not JSON: {error}") from error
    return found if isinstance(found, dict) else {}


def _token_text(token: str | dict[str, Any]) -> str:
    return token if isinstance(token, str) else str(token["content"])
