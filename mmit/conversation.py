"""A conversation between a user and an assistant, with images where they stand.

Content is a tuple of parts: ``str`` or ``ImageRef``; a placeholder such as ``<image>`` never lives inside a string.
On disk a part is ``{"type": "text", "text": ...}`` or ``{"type": "image", "index": 0}``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from msgspec import Struct, field

Role = Literal["system", "user", "assistant"]
ROLES: tuple[Role, ...] = ("system", "user", "assistant")


# Structs, not dataclasses: a conversation makes dozens of them, in a sixth of the time.
class ImageRef(Struct, frozen=True, gc=False, tag_field="type", tag="image"):
    """The place of an image in a message; ``index`` counts within the conversation."""

    index: int


Part = str | ImageRef


class Message(Struct, frozen=True, kw_only=True, gc=False):
    """One turn. ``train`` says whether an assistant's turn is trained; None leaves it to the role (assistant: yes)."""

    role: Role
    content: tuple[Part, ...]
    train: bool | None = None

    @property
    def text(self) -> str:
        """The text parts, joined."""
        return "".join(part for part in self.content if isinstance(part, str))

    @property
    def is_trained(self) -> bool:
        """True where the loss looks at this turn."""
        return self.role == "assistant" if self.train is None else self.train


class Conversation(Struct, frozen=True, kw_only=True):
    """Turns in order, and the encoded bytes of the images they refer to.

    images: one entry per image, in index order, as read from the source (JPEG, PNG, ...; never re-encoded). May be
    empty when only text and sizes are needed; ``sizes`` holds (width, height) of each image as displayed
    (after EXIF rotation).
    """

    id: str
    messages: tuple[Message, ...]
    images: tuple[bytes, ...] = ()
    sizes: tuple[tuple[int, int], ...] = ()
    source: str = ""
    meta: Mapping[str, Any] = field(default_factory=dict[str, Any])

    @property
    def image_refs(self) -> tuple[ImageRef, ...]:
        """All image places in reading order."""
        return tuple(part for message in self.messages for part in message.content if isinstance(part, ImageRef))
