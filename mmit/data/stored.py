"""One sample inside a shard: the JSON that mmit writes, and the forms that foreign webdataset tars have.

{"id": ..., "images": [{"w": 640, "h": 480}], "meta": {...},
 "messages": [{"role": "user", "content": [{"type": "image", "index": 0}, {"type": "text", "text": "..."}]}, ...]}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import msgspec
from msgspec import Struct

from mmit.conversation import Conversation, ImageRef, Message, Part, Role
from mmit.data import forms
from mmit.data.faults import SampleError
from mmit.images import read_size


def to_json(conversation: Conversation) -> bytes:
    """The JSON of a sample; the bytes depend on the conversation alone."""
    record = {
        "id": conversation.id,
        "images": [{"w": width, "h": height} for width, height in conversation.sizes],
        "messages": [_message_to_json(message) for message in conversation.messages],
        "meta": dict(conversation.meta),
    }
    return json.dumps(record, ensure_ascii=False).encode("utf-8")


def own(content: bytes, images: tuple[bytes, ...], *, image_count: int, source: str) -> Conversation | None:
    """The conversation in the JSON that mmit writes, with its images where they are given; None for any other JSON.

    Raises SampleError for one that does not fit its images.
    """
    try:
        record = _DECODER.decode(content)
    except (ValueError, RecursionError):
        return None
    return _conversation(record, record.id, images, image_count=image_count, source=source) if record.id else None


def whole(text: Mapping[str, bytes], images: tuple[bytes, ...], *, key: str, source: str) -> Conversation:
    """The conversation in a sample with its images.

    text: the sample's ``json`` and ``txt`` members, as far as it has them. Raises SampleError.
    """
    record = _parse(text["json"]) if "json" in text else {}
    if _is_own(record):
        return _own_record(record, images, image_count=len(images), key=key, source=source)
    found = _foreign(record, text, len(images))
    return Conversation(
        id=f"{source}/{key}",
        messages=found.messages,
        images=images,
        sizes=tuple(read_size(image) for image in images),
        source=source,
        meta=found.meta,
    )


def without_images(text: Mapping[str, bytes], *, image_count: int, key: str, source: str) -> Conversation | None:
    """The conversation with the sizes of its images but not their bytes; None where only the bytes tell the sizes.

    Raises SampleError.
    """
    record = _parse(text["json"]) if "json" in text else {}
    if _is_own(record):
        return _own_record(record, (), image_count=image_count, key=key, source=source)
    if image_count:
        return None
    return whole(text, (), key=key, source=source)


class _Text(Struct, tag_field="type", tag="text", gc=False):
    text: str


class _Turn(Struct, gc=False):
    role: Role
    content: list[_Text | ImageRef]
    train: bool | None = None


class _Size(Struct, gc=False):
    w: int
    h: int


class _Own(Struct):
    """The JSON that mmit writes."""

    images: list[_Size]
    messages: list[_Turn]
    id: str = ""
    meta: dict[str, Any] = {}


_DECODER = msgspec.json.Decoder(_Own)


def _is_own(record: Mapping[str, Any]) -> bool:
    """Sizes of images and contents in parts: nobody else writes both."""
    sizes, turns = record.get("images"), record.get("messages")
    if not isinstance(sizes, list) or not isinstance(turns, list):
        return False
    return all(isinstance(size, dict) and "w" in size and "h" in size for size in sizes) and all(
        isinstance(turn, dict) and isinstance(turn.get("content"), list) for turn in turns
    )


def _own_record(
    record: Mapping[str, Any], images: tuple[bytes, ...], *, image_count: int, key: str, source: str
) -> Conversation:
    try:
        converted = msgspec.convert(record, _Own, strict=False)
    except msgspec.ValidationError as error:
        raise SampleError(f"its JSON is not of the form that mmit writes: {error}") from None
    name = converted.id or f"{source}/{key}"
    return _conversation(converted, name, images, image_count=image_count, source=source)


def _conversation(own: _Own, name: str, images: tuple[bytes, ...], *, image_count: int, source: str) -> Conversation:
    if len(own.images) != image_count:
        raise SampleError(f"the JSON names {len(own.images)} images and the shard holds {image_count}")
    places: list[int] = []
    turns: list[Message] = []
    for turn in own.messages:
        content: list[Part] = []
        for part in turn.content:
            if isinstance(part, ImageRef):
                places.append(part.index)
                content.append(part)
            else:
                content.append(part.text)
        turns.append(Message(role=turn.role, content=tuple(content), train=turn.train))
    if sorted(places) != list(range(image_count)):
        raise SampleError(f"the places {sorted(places)} do not take each of {image_count} images once")
    return Conversation(
        id=name,
        messages=tuple(turns),
        images=images,
        sizes=tuple([(size.w, size.h) for size in own.images]),
        source=source,
        meta=own.meta,
    )


def _foreign(record: Mapping[str, Any], text: Mapping[str, bytes], image_count: int) -> forms.Record:
    """A record of another's tar: its images are the members, whatever its JSON calls them."""
    names = [f"{number}" for number in range(image_count)]
    for key, parse in (("conversations", forms.llava), ("messages", forms.messages)):
        if key in record:
            stated = {k: v for k, v in record.items() if k not in ("image", "images")}
            found = parse({**stated, "images": names})
            if len(found.images) != image_count:
                raise SampleError(f"the JSON names {len(found.images)} images and the shard holds {image_count}")
            return found
    if "txt" in text:
        record = {**record, "caption": _decode(text["txt"], "txt")}
    if not record:
        raise SampleError("it has neither a json nor a txt member")
    if image_count != 1:
        raise SampleError(f"a caption needs one image and the shard holds {image_count}")
    return forms.caption({**record, "image": "0"})


def _message_to_json(message: Message) -> dict[str, Any]:
    content = [
        {"type": "image", "index": part.index} if isinstance(part, ImageRef) else {"type": "text", "text": part}
        for part in message.content
    ]
    stored: dict[str, Any] = {"role": message.role, "content": content}
    return stored if message.train is None else {**stored, "train": message.train}


def _parse(content: bytes) -> dict[str, Any]:
    try:
        record = json.loads(_decode(content, "json"))
    except (ValueError, RecursionError) as error:
        raise SampleError(f"its JSON is broken: {error}") from None
    if not isinstance(record, dict):
        raise SampleError(f"its JSON is {type(record).__name__}, not an object")
    return record


def _decode(content: bytes, what: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SampleError(f"its {what} is not UTF-8: {error.reason} at byte {error.start}") from None
