"""The question of the turn that a picture stands in, for connectors that read it before they look at the picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from mmit.batch import Instructions, join_instructions
from mmit.conversation import Conversation, ImageRef

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


@dataclass(frozen=True)
class InstructionReader:
    """Gives each tile the text of its turn, in tokens of the connector's own tokenizer, ``length`` of them at most.

    A picture's tokens stand before all that comes after its turn: they may depend on the text of their own turn alone,
    else a prompt would read otherwise once the conversation goes on. A longer text is cut, as InstructBLIP does.
    """

    tokenizer: PreTrainedTokenizerBase
    length: int

    def read(self, conversation: Conversation, tiles: Sequence[int]) -> Instructions:
        """One row for each tile; ``tiles``: how many each image has, in reading order."""
        texts = [turn.text for turn in conversation.messages for part in turn.content if isinstance(part, ImageRef)]
        assert len(texts) == len(tiles), f"{len(texts)} images, tiles of {len(tiles)}"
        return join_instructions([self._one(text, rows) for text, rows in zip(texts, tiles, strict=True)])

    def _one(self, text: str, rows: int) -> Instructions:
        # split: a control token written out in a text is read as text
        found = self.tokenizer(text.strip(), truncation=True, max_length=self.length, split_special_tokens=True)
        ids = found["input_ids"]
        row = torch.tensor(ids or [0], dtype=torch.int64)
        return Instructions(ids=row.expand(rows, -1), mask=torch.ones_like(row).expand(rows, -1))
