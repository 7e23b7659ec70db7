"""The picture that a question is asked with: its own, a blank one, or that of another sample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from msgspec import structs

from mmit.conversation import Conversation
from mmit.data.control import blank_picture

Pictures = Literal["true", "blank", "other"]
PICTURES: tuple[Pictures, ...] = ("true", "blank", "other")


def with_pictures(conversations: Sequence[Conversation], pictures: Pictures) -> list[Conversation]:
    """The same conversations with other pictures; sizes are kept for ``blank`` and follow the picture for ``other``.

    ``other`` gives each conversation the pictures of the next one that has as many, round the end: with two or more
    such conversations nobody keeps their own.
    """
    if pictures == "true":
        return list(conversations)
    if pictures == "blank":
        return [structs.replace(c, images=tuple(blank_picture(size) for size in c.sizes)) for c in conversations]
    alike: dict[int, list[int]] = {}
    for number, conversation in enumerate(conversations):
        alike.setdefault(len(conversation.images), []).append(number)
    lender = {}
    for members in alike.values():
        lender.update(zip(members, members[1:] + members[:1], strict=True))
    return [
        structs.replace(c, images=conversations[lender[n]].images, sizes=conversations[lender[n]].sizes)
        for n, c in enumerate(conversations)
    ]
