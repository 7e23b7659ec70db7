"""Questions and answers without pictures that come with mmit: does a language model that is tuned still know its words?

They are easy and of many kinds, so that any language model finds the answers likely; what is watched is the change of
their loss, not its height.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mmit.conversation import Conversation, Message

TEXTS = Path(__file__).with_suffix(".jsonl")
"""A line for each: question and answer."""


class TextProbe:
    """The samples of ``TEXTS``; reads as a set of shards does. cache: folder in which their lengths are kept."""

    name = "probe"
    left_out = ""
    blocks: Sequence[int] = ()

    def __init__(self, cache: Path) -> None:
        self.directory = self.cache = cache.expanduser()
        self.quarantined = np.zeros(0, dtype=np.uint32)
        content = TEXTS.read_bytes()
        self.fingerprint = hashlib.sha256(content).hexdigest()
        self._pairs = [json.loads(line) for line in content.splitlines()]

    def __len__(self) -> int:
        return len(self._pairs)

    def read(self, number: int) -> Conversation:
        """A question and its answer."""
        question, answer = self._pairs[number]["question"], self._pairs[number]["answer"]
        return Conversation(
            id=f"{self.name}/{number:08d}",
            messages=(Message(role="user", content=(question,)), Message(role="assistant", content=(answer,))),
            images=(),
            sizes=(),
            source=self.name,
            meta={},
        )

    def read_text(self, number: int) -> Conversation:
        """The same, since there are no pictures."""
        return self.read(number)

    def place(self, number: int) -> tuple[str, str]:
        """No shard; the number is the key."""
        return self.name, str(number)
