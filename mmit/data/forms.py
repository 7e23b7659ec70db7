"""The forms in which conversations are published, turned into messages and image references.

One function per form; each takes a parsed JSON object and knows no files. ``<image>`` placeholders become image parts
here, once, and never live in text afterwards. Line breaks between pictures that open a turn and its text go with the
placeholders: the chat template writes its own there.
"""

from __future__ import annotations

import base64
import binascii
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from mmit.conversation import ImageRef, Message, Part, Role
from mmit.data.faults import SampleError

IMAGE_MARK = "<image>"

_ROLES: Mapping[str, Role] = {
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "chatgpt": "assistant",
    "bing": "assistant",
    "bard": "assistant",
    "model": "assistant",
    "system": "system",
}
CAPTION_KEYS = ("caption", "text", "description")
IMAGE_KEYS = ("image", "file_name", "filename", "image_path", "path", "file")


@dataclass(frozen=True, kw_only=True)
class Record:
    """A record as read: ``images`` are paths relative to the image root, or the bytes of a data URL."""

    messages: tuple[Message, ...]
    images: tuple[str | bytes, ...]
    meta: Mapping[str, Any]


Parse = Callable[[Mapping[str, Any]], Record]


def llava(record: Mapping[str, Any]) -> Record:
    """LLaVA's form: ``{"id", "image": absent | path | [paths], "conversations": [{"from", "value"}]}``.

    As in LLaVA's own code, the one picture of a turn stands in front of its text, wherever the placeholder was; several
    keep their places. A record whose images have no placeholder gets them in front of the first user turn.
    Raises SampleError.
    """
    turns = _list_of_objects(record, "conversations")
    images = _image_list(record)
    texts = [(_role(turn.get("from", turn.get("role"))), turn.get("value", turn.get("content"))) for turn in turns]
    if isinstance(record.get("system"), str) and record["system"]:
        texts.insert(0, ("system", record["system"]))
    places = _Places(images)
    messages = [Message(role=role, content=_image_first(places.split(_string(text, role)))) for role, text in texts]
    return Record(
        messages=checked_turns(places.settled(messages)),
        images=tuple(places.images),
        meta=_meta(record, without=("conversations", "image", "images", "system")),
    )


def messages(record: Mapping[str, Any]) -> Record:
    """OpenAI's form: ``{"messages": [{"role", "content": text | [parts]}]}``, optionally with ``images`` beside it.

    Image parts name their picture, or take the next of ``images``, as a ``<image>`` in a text content does.
    ``weight: 0`` of an assistant's message leaves it untrained. Raises SampleError.
    """
    places = _Places(_image_list(record))
    found: list[Message] = []
    for turn in _list_of_objects(record, "messages"):
        role = _role(turn.get("role"))
        content = turn.get("content")
        parts = places.parts(content, role) if isinstance(content, list) else places.split(_string(content, role))
        train = None if "weight" not in turn else bool(turn["weight"])
        found.append(Message(role=role, content=parts, train=train))
    return Record(
        messages=checked_turns(places.settled(found)),
        images=tuple(places.images),
        meta=_meta(record, without=("messages", "image", "images")),
    )


def caption(record: Mapping[str, Any], prompt: str = "") -> Record:
    """A picture and its caption: one user turn with the picture (and ``prompt``), one assistant turn with the caption.

    The columns may be called image, file_name, filename, image_path, path or file, and caption, text or description.
    Raises SampleError.
    """
    image, image_key = _first(record, IMAGE_KEYS, "image")
    text, text_key = _first(record, CAPTION_KEYS, "caption")
    question: tuple[Part, ...] = (ImageRef(0), prompt) if prompt else (ImageRef(0),)
    turns = [Message(role="user", content=question), Message(role="assistant", content=(text.strip(),))]
    return Record(
        messages=checked_turns(turns),
        images=(_image(image.strip()),),
        meta=_meta(record, without=(image_key, text_key)),
    )


def checked_turns(turns: list[Message]) -> tuple[Message, ...]:
    """The turns, if there is an answer to a question among them, none is empty, and the two sides take turns.

    A system message may stand first, and answers before the first question and a question without an answer at the end
    are let through: the chat template leaves them untrained. Raises SampleError; nothing is repaired.
    """
    try:
        "".join(turn.text for turn in turns).encode("utf-8")
    except UnicodeEncodeError:
        raise SampleError("a text holds half of a surrogate pair, which is no character") from None
    start = 1 if turns and turns[0].role == "system" else 0
    for number, turn in enumerate(turns):
        if not any(isinstance(part, ImageRef) or part.strip() for part in turn.content):
            raise SampleError(f"turn {number + 1} ({turn.role}) is empty")
        if number >= start and turn.role == "system":
            raise SampleError(f"turn {number + 1} is the system's; it may only stand first")
        if number > start and turn.role == turns[number - 1].role:
            raise SampleError(f"turns {number} and {number + 1} are both the {turn.role}'s")
    roles = [turn.role for turn in turns[start:]]
    if "user" not in roles or "assistant" not in roles[roles.index("user") :]:
        raise SampleError("there is no question with an answer to learn from")
    return tuple(turns)


def _image_first(content: tuple[Part, ...]) -> tuple[Part, ...]:
    pictures = [part for part in content if isinstance(part, ImageRef)]
    if len(pictures) != 1 or content[0] == pictures[0]:
        return content
    text = "".join(part for part in content if isinstance(part, str)).strip()
    return (pictures[0], text) if text else (pictures[0],)


class _Places:
    """Hands out the images of a record to the places that ask for one, in reading order."""

    def __init__(self, given: list[str | bytes]) -> None:
        self.given = given  # images named beside the conversation
        self.images: list[str | bytes] = []  # images in the order of their places
        self.anonymous = 0  # places that take the next of the given ones

    def split(self, text: str) -> tuple[Part, ...]:
        """A text with its placeholders turned into image parts."""
        first, *others = text.split(IMAGE_MARK)
        parts: list[Part] = [first] if first.strip("\n") or not others else []
        for piece in others:
            parts.append(self._next())
            opens = all(isinstance(part, ImageRef) for part in parts)
            words = piece.lstrip("\n") if opens else piece
            if words:
                parts.append(words)
        return tuple(parts)

    def parts(self, content: list[Any], role: Role) -> tuple[Part, ...]:
        """OpenAI's content parts; also with ``value`` in place of ``text`` or ``image_url``."""
        parts: list[Part] = []
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text":
                parts.append(_string(part.get("text", part.get("value")), role))
            elif kind in ("image", "image_url"):
                source = next(
                    (part[key] for key in ("image_url", "image", "url", "path", "value") if key in part), None
                )
                parts.append(self._next() if source is None else self._own(source))
            else:
                raise SampleError(f"a content part of type {kind!r}: only text, image and image_url are read")
        return tuple(part for part in parts if part != "")

    def settled(self, turns: list[Message]) -> list[Message]:
        """The messages, with images that have no place put in front of the first user turn."""
        if self.anonymous == len(self.given):
            return turns
        if self.anonymous:
            raise SampleError(f"{self.anonymous} {IMAGE_MARK} placeholders for {len(self.given)} images")
        first = next((n for n, turn in enumerate(turns) if turn.role == "user"), None)
        if first is None or self.images:
            raise SampleError(f"{len(self.given)} images are listed and none of them has a place in the text")
        self.images = list(self.given)
        front = tuple(ImageRef(number) for number in range(len(self.given)))
        moved = Message(role="user", content=front + turns[first].content, train=turns[first].train)
        return [*turns[:first], moved, *turns[first + 1 :]]

    def _next(self) -> ImageRef:
        self.anonymous += 1
        if self.anonymous > len(self.given):
            raise SampleError(
                f"the text has more {IMAGE_MARK} placeholders than the record has images ({len(self.given)})"
            )
        self.images.append(self.given[self.anonymous - 1])
        return ImageRef(len(self.images) - 1)

    def _own(self, source: Any) -> ImageRef:  # noqa: ANN401  (whatever JSON holds)
        self.images.append(_image(source))
        return ImageRef(len(self.images) - 1)


def _image_list(record: Mapping[str, Any]) -> list[str | bytes]:
    found = record.get("image") or record.get("images") or []
    for other in ("video", "videos", "audio", "pcl"):
        if record.get(other):
            raise SampleError(f"the record has '{other}'; only images are read")
    return [_image(image) for image in (found if isinstance(found, list) else [found])]


def _image(source: Any) -> str | bytes:  # noqa: ANN401
    """A path, or the bytes of a data URL, from a string or an object that holds one."""
    if isinstance(source, dict):
        source = next((source[key] for key in ("url", "path", "image") if source.get(key)), None)
    if not isinstance(source, str) or not source:
        raise SampleError("an image is neither a path nor a data URL")
    if source.startswith("data:"):
        head, _, body = source.partition(",")
        try:
            if not head.endswith(";base64"):
                raise binascii.Error("not base64")
            return base64.b64decode(body, validate=True)
        except binascii.Error as error:
            raise SampleError(f"a data URL cannot be decoded: {error}") from None
    if "://" in source and not source.startswith("file://"):
        raise SampleError(f"'{source[:80]}' is a remote image; download it and name the file")
    return source


def _list_of_objects(record: Mapping[str, Any], key: str) -> list[dict[str, Any]]:
    found = record.get(key)
    if not isinstance(found, list) or not all(isinstance(turn, dict) for turn in found):
        raise SampleError(
            f"'{key}' is missing or not a list of objects; the record has {', '.join(record) or 'no keys'}"
        )
    return found


def _role(name: Any) -> Role:  # noqa: ANN401
    role = _ROLES.get(name) if isinstance(name, str) else None
    if role is None:
        raise SampleError(f"unknown role {name!r}; known are {', '.join(_ROLES)}")
    return role


def _string(text: Any, role: Role) -> str:  # noqa: ANN401
    if not isinstance(text, str):
        raise SampleError(f"a turn of the {role} is {type(text).__name__}, not text")
    return text


def _first(record: Mapping[str, Any], keys: tuple[str, ...], what: str) -> tuple[str, str]:
    for key in keys:
        if isinstance(record.get(key), str) and record[key].strip():
            return record[key], key
    raise SampleError(
        f"no {what}: none of {', '.join(keys)} holds a text; the record has {', '.join(record) or 'no keys'}"
    )


def _meta(record: Mapping[str, Any], *, without: tuple[str, ...]) -> dict[str, Any]:
    """What else the record says in plain values; its id (or ``idx``) is always called id."""
    kept = {k: v for k, v in record.items() if k not in without and isinstance(v, str | int | float | bool)}
    if "id" not in kept and "idx" in kept:
        kept["id"] = kept.pop("idx")
    return kept
