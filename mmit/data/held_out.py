"""Samples that are measured and not trained on, with their own pictures, blank ones, or those of each other."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np
from msgspec import structs

from mmit.conversation import Conversation
from mmit.data.control import blank_picture, circle
from mmit.data.order import key
from mmit.data.shard_set import ShardSet

Pictures = Literal["true", "blank", "other"]


class HeldOutSet:
    """Some samples of a data set, numbered anew; reads as the set itself does.

    numbers: those of the samples in ``shards``. pictures: ``blank`` makes every picture plain grey, of its own size;
    ``other`` takes the pictures of ``partners``, which are numbers of this set.
    """

    def __init__(
        self, shards: ShardSet, numbers: np.ndarray, *, pictures: Pictures = "true", partners: np.ndarray | None = None
    ) -> None:
        assert (partners is not None) == (pictures == "other"), "partners lend their pictures"
        self.name = shards.name
        self.directory = shards.directory
        self.cache = shards.cache
        self.quarantined = np.zeros(0, dtype=np.uint32)
        self.left_out = ""
        self.blocks: Sequence[int] = ()
        parts = [numbers.astype(np.uint32).tobytes(), b"" if partners is None else partners.tobytes()]
        state = hashlib.sha256(f"{shards.fingerprint} held out {pictures} 1 ".encode())
        for part in parts:
            state.update(part)
        self.fingerprint = state.hexdigest()
        self._shards = shards
        self._numbers = numbers
        self._pictures = pictures
        self._partners = partners

    def __len__(self) -> int:
        return len(self._numbers)

    def read(self, number: int) -> Conversation:
        """The sample with the pictures that it is measured with. Raises as the set does, also for the partner."""
        own = self._shards.read(int(self._numbers[number]))
        if self._pictures == "blank":
            return structs.replace(own, images=tuple(blank_picture(size) for size in own.sizes))
        if self._partners is None:
            return own
        other = self._shards.read(int(self._numbers[self._partners[number]]))
        return structs.replace(own, images=other.images, sizes=other.sizes)

    def read_text(self, number: int) -> Conversation:
        """The sample, without the bytes of its images where their sizes are stored."""
        own = self._shards.read_text(int(self._numbers[number]))
        if self._partners is None:
            return own
        other = self._shards.read_text(int(self._numbers[self._partners[number]]))
        return structs.replace(own, images=other.images, sizes=other.sizes)

    def place(self, number: int) -> tuple[str, str]:
        """Shard and key of the sample."""
        return self._shards.place(int(self._numbers[number]))


def lenders(shards: ShardSet, numbers: np.ndarray, *, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Of the samples those that another one can lend pictures to, as a mask, and who lends to each of them.

    The lenders are counted within those samples. Who has no picture, or is alone with its number of pictures, has none.
    """
    stream = key(seed, "held out", shards.name)
    sizes = np.asarray(shards.images)[numbers]
    first, _ = circle(sizes, stream)
    has_one = first != np.arange(len(numbers))
    partners, _ = circle(sizes[has_one], stream)
    return has_one, partners
