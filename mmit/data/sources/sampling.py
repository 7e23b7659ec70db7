"""Which of many frames are kept."""

from __future__ import annotations


def evenly(count: int, wanted: int) -> list[int]:
    """At most ``wanted`` of 0 .. count - 1, in order: the middles of ``wanted`` equal stretches."""
    if count <= wanted:
        return list(range(count))
    return [(2 * place + 1) * count // (2 * wanted) for place in range(wanted)]
