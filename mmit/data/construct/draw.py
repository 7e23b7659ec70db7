"""Choices that look random and never change: hashes of a seed and the id of a record."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from mmit.data.order import key

Item = TypeVar("Item")


@dataclass(frozen=True)
class Draw:
    """The choices for one record; ``what`` keeps different choices apart."""

    seed: int
    id: str

    def index(self, what: str, count: int) -> int:
        """A number from 0 to ``count`` - 1."""
        return int(key(self.seed, "construct", what, self.id)) % count

    def shuffled(self, what: str, items: Sequence[Item]) -> list[Item]:
        """The items in another order; an item's rank depends on its position, not on its value."""
        ranks = [(int(key(self.seed, "construct", what, n, self.id)), n) for n in range(len(items))]
        return [items[n] for _, n in sorted(ranks)]

    def some(self, what: str, items: Sequence[Item], most: int) -> list[Item]:
        """At most ``most`` of the items, in the order they had."""
        kept = self.shuffled(what, range(len(items)))[:most]
        return [items[n] for n in sorted(kept)]
