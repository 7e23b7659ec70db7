"""Fewer frames of a video than the shard holds, chosen when a sample is read for training.

A video lies in a shard as pictures, its frames, with their times in ``meta.seconds`` (see sources/videos.py).
"""

from __future__ import annotations

import hashlib

from msgspec import structs

from mmit.conversation import Conversation, ImageRef, Message
from mmit.data.control import ControlledSet
from mmit.data.held_out import HeldOutSet
from mmit.data.shard_set import ShardSet
from mmit.data.sources.sampling import evenly
from mmit.data.sources.videos import time_sentence


class FewerFrames:
    """A data set with at most ``most`` frames of every video; reads as the set itself does."""

    def __init__(self, shards: ShardSet | ControlledSet | HeldOutSet, most: int) -> None:
        self.name = shards.name
        self.directory = shards.directory
        self.cache = shards.cache
        self.quarantined = shards.quarantined
        self.left_out = shards.left_out
        self.blocks = shards.blocks
        self.fingerprint = hashlib.sha256(f"{shards.fingerprint} at most {most} frames 1".encode()).hexdigest()
        self._shards = shards
        self._most = most

    def __len__(self) -> int:
        return len(self._shards)

    def read(self, number: int) -> Conversation:
        """The sample with the frames that stay."""
        return with_frames(self._shards.read(number), self._most)

    def read_text(self, number: int) -> Conversation:
        """The sample, without the bytes of its images where their sizes are stored."""
        return with_frames(self._shards.read_text(number), self._most)

    def place(self, number: int) -> tuple[str, str]:
        """Shard and key of the sample."""
        return self._shards.place(number)


def with_frames(conversation: Conversation, most: int) -> Conversation:
    """The conversation with at most ``most`` frames of its video, spread evenly, and their times.

    A sentence that tells the times, as the conversion writes it, tells those of the frames that stay. A conversation
    that is not about a video comes back as it is.
    """
    seconds = conversation.meta.get("seconds")
    count = len(conversation.sizes or conversation.images)
    if not isinstance(seconds, list | tuple) or len(seconds) != count or count <= most:
        return conversation
    kept = evenly(count, most)
    place = {old: new for new, old in enumerate(kept)}
    times = [seconds[number] for number in kept]
    before, after = time_sentence(seconds), time_sentence(times)
    return structs.replace(
        conversation,
        messages=tuple(_with(message, place, before, after) for message in conversation.messages),
        images=tuple(conversation.images[number] for number in kept) if conversation.images else (),
        sizes=tuple(conversation.sizes[number] for number in kept) if conversation.sizes else (),
        meta={**conversation.meta, "seconds": times},
    )


def _with(message: Message, place: dict[int, int], before: str, after: str) -> Message:
    content = tuple(
        part.replace(before, after) if isinstance(part, str) else ImageRef(place[part.index])
        for part in message.content
        if isinstance(part, str) or part.index in place
    )
    return structs.replace(message, content=content)
