"""Control runs: what a model learns when one part of its data says nothing, or says it about something else.

A model that does as well without the part has not learned from it (superficial alignment: arXiv 2308.10792, sec. 8.7;
the instructions: arXiv 2305.11383). Each control changes the named part of every sample and nothing else:

- ``blank_image``: every picture is plain grey, of its own size;
- ``shuffle_image``: the pictures are those of another sample of the same set with as many of them;
- ``blank_instruction``: the user's turns hold no text, their pictures stay;
- ``shuffle_answer``: the answers, in their order, are those of another sample of the same set with as many of them.

Samples change places along one circle, so that each part is used once and none stays at home; who has nobody to change
with (the only sample with five pictures, say) stays as it is and is counted. The lengths are measured after the change.
"""

from __future__ import annotations

import hashlib
import io
from functools import lru_cache
from typing import Literal

import numpy as np
from msgspec import structs

from mmit.conversation import Conversation, ImageRef, Message
from mmit.data.facts import count_answers, read_facts
from mmit.data.order import hashes, key
from mmit.data.shard_set import ShardSet
from mmit.errors import DataError

Control = Literal["blank_image", "shuffle_image", "blank_instruction", "shuffle_answer"]

GREY = 128


class ControlledSet:
    """A data set with one part changed; reads as the set itself does.

    partners: which sample each one's part comes from; alone: how many have nobody to change with.
    """

    def __init__(self, shards: ShardSet, control: Control, *, seed: int, progress: bool = True) -> None:
        self.name = shards.name
        self.directory = shards.directory
        self.cache = shards.cache
        self.quarantined = shards.quarantined
        self.left_out = shards.left_out
        self.blocks = shards.blocks
        self.control = control
        self.fingerprint = hashlib.sha256(f"{shards.fingerprint} {control} {seed} 1".encode()).hexdigest()
        self.alone = 0
        self.partners = np.zeros(0, dtype=np.uint32)
        self._shards = shards
        if control.startswith("shuffle"):
            sizes = shards.images if control == "shuffle_image" else read_facts(shards, progress=progress).answers
            self.partners, self.alone = circle(sizes, key(seed, "control", control, shards.name))

    def __len__(self) -> int:
        return len(self._shards)

    def read(self, number: int) -> Conversation:
        """The changed sample with its images. Raises as the set does, also for what is wrong with the partner."""
        return self._changed(self._shards.read(number), number, with_bytes=True)

    def read_text(self, number: int) -> Conversation:
        """The changed sample, without the bytes of its images where their sizes are stored."""
        return self._changed(self._shards.read_text(number), number, with_bytes=False)

    def place(self, number: int) -> tuple[str, str]:
        """Shard and key of the sample."""
        return self._shards.place(number)

    def _changed(self, own: Conversation, number: int, *, with_bytes: bool) -> Conversation:
        if self.control == "blank_image":
            return structs.replace(own, images=tuple(blank_picture(size) for size in own.sizes) if own.images else ())
        if self.control == "blank_instruction":
            return structs.replace(own, messages=tuple(map(_without_text, own.messages)))
        partner = int(self.partners[number])
        if partner == number:
            return own
        read = self._shards.read if with_bytes and self.control == "shuffle_image" else self._shards.read_text
        try:
            other = read(partner)
        except DataError as error:
            error.args = (f"its partner in {self.control}, sample {partner}: {error}",)
            raise
        if self.control == "shuffle_image":
            return structs.replace(own, images=other.images if own.images else (), sizes=other.sizes)
        return _with_answers(own, other)


def circle(sizes: np.ndarray, stream: np.uint64) -> tuple[np.ndarray, int]:
    """For each sample another one of the same size, each taken once, and how many there are without another: uint32.

    Within a size the samples stand in the order of the stream, and each takes from the next. Size 0 gives nothing.
    """
    found = np.arange(len(sizes), dtype=np.uint32)
    order = np.lexsort((hashes(len(sizes), stream), sizes))
    order = order[sizes[order] > 0]
    alone = 0
    edges = np.flatnonzero(np.diff(sizes[order].astype(np.int64))) + 1
    for group in np.split(order, edges):
        found[group] = np.roll(group, -1)
        alone += len(group) == 1
    return found, alone


def _without_text(message: Message) -> Message:
    if message.role != "user":
        return message
    return structs.replace(message, content=tuple(part for part in message.content if isinstance(part, ImageRef)))


def _with_answers(own: Conversation, other: Conversation) -> Conversation:
    assert count_answers(own) == count_answers(other), "partners have as many answers"
    answers = iter([message for message in other.messages if message.role == "assistant"])
    messages = [
        structs.replace(message, content=next(answers).content) if message.role == "assistant" else message
        for message in own.messages
    ]
    return structs.replace(own, messages=tuple(messages))


@lru_cache(maxsize=64)
def blank_picture(size: tuple[int, int]) -> bytes:
    """A grey picture of (width, height), as a PNG."""
    from PIL import Image

    file = io.BytesIO()
    Image.new("L", size, GREY).save(file, "PNG")
    return file.getvalue()
