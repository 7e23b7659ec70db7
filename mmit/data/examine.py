"""What may be wrong with one conversation that can be read: a pure function from it to findings."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from mmit.conversation import Conversation, ImageRef
from mmit.data.findings import Severity
from mmit.data.order import key

LONG_ANSWER = 20
"""Words from which on an answer is expected to end like a sentence."""
_ENDS_CUT = re.compile(r"[\w,;:(\[{\-–—]\Z")


@dataclass(frozen=True)
class Control:
    """Texts that steer a model instead of being read, and how bad it is to find one."""

    tokens: frozenset[str]
    severity: Severity


COMMON = Control(
    frozenset(
        {
            "<image>",
            "<video>",
            "<im_start>",
            "<im_end>",
            "<im_patch>",
            "<|image|>",
            "<|image_pad|>",
            "<|vision_start|>",
            "<|vision_end|>",
            "<|im_start|>",
            "<|im_end|>",
            "<|endoftext|>",
            "<|begin_of_text|>",
            "<|end_of_text|>",
            "<|start_header_id|>",
            "<|end_header_id|>",
            "<|eot_id|>",
            "<start_of_turn>",
            "<end_of_turn>",
            "<|user|>",
            "<|assistant|>",
            "<|system|>",
            "<|end|>",
            "[INST]",
            "[/INST]",
            "<<SYS>>",
            "<</SYS>>",
            "<s>",
            "</s>",
            "<unk>",
            "<pad>",
            "<bos>",
            "<eos>",
        }
    ),
    "warning",
)
"""Of the usual families; which of them count is known once a tokenizer is given."""


def examine(conversation: Conversation, control: Control) -> Iterator[tuple[Severity, str]]:
    """Severity and reason of each finding.

    Turns out of order, control tokens in the text, and answers that seem to be cut: of at least LONG_ANSWER words and
    ending in a letter, a digit, a comma, a colon, a dash or an open bracket. Code, lists and scripts without full
    stops end so too, hence a note only.
    """
    turns = [message for message in conversation.messages if message.role != "system"]
    if turns and turns[0].role == "assistant":
        yield "warning", "the first turn is an answer; it is not trained"
    if turns and turns[-1].role == "user":
        yield "warning", "the last turn is a question without an answer"
    for number, message in enumerate(conversation.messages, start=1):
        text = "\0".join(part if isinstance(part, str) else "" for part in message.content)
        for token in sorted(token for token in control.tokens if token in text):
            yield control.severity, f"turn {number} holds the control token '{token}'"
        answer = message.text.rstrip()
        if message.is_trained and len(answer.split()) >= LONG_ANSWER and _ENDS_CUT.search(answer):
            yield "note", f"the answer in turn {number} seems to be cut: it ends with '{answer[-20:]}'"


def content_key(conversation: Conversation) -> tuple[np.uint64, list[np.uint64]]:
    """A hash of pictures and text together, whatever the sample is called, and one of each picture."""
    pictures = [picture_key(image) for image in conversation.images]
    parts: list[str] = []
    for message in conversation.messages:
        parts.append(f"\0{message.role}")
        parts += [
            f"\1{pictures[part.index]}" if isinstance(part, ImageRef) else f"\2{part}" for part in message.content
        ]
    return key(*parts), pictures


def picture_key(image: bytes) -> np.uint64:
    """A hash of the bytes of a picture."""
    return np.uint64(int.from_bytes(hashlib.blake2b(image, digest_size=8).digest(), "little"))
