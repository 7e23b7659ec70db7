"""One sample inside a shard: the JSON that mmit writes, and the forms that foreign webdataset tars have.

{"id": ..., "images": [{"w": 640, "h": 480}], "meta": {...},
 "messages": [{"role": "user", "content": [{"type": "image", "index": 0}, {"type": "text", "text": "..."}]}, ...]}
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from pydantic_core import from_json

from mmit.conversation import ROLES, Conversation, ImageRef, Message, Part
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


def whole(text: Mapping[str, bytes], images: tuple[bytes, ...], *, key: str, source: str) -> Conversation:
    """The conversation in a sample with its images.

    text: the sample's ``json`` and ``txt`` members, as far as it has them. Raises SampleError.
    """
    record = _parse(text["json"]) if "json" in text else {}
    if _is_own(record):
        return _own(record, len(images), images, key=key, source=source)
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
        return _own(record, image_count, (), key=key, source=source)
    if image_count:
        return None
    return whole(text, (), key=key, source=source)


def _is_own(record: Mapping[str, Any]) -> bool:
    """Sizes of images and contents in parts: nobody else writes both."""
    sizes, turns = record.get("images"), record.get("messages")
    if not isinstance(sizes, list) or not isinstance(turns, list):
        return False
    for size in sizes:
        if not isinstance(size, dict) or "w" not in size or "h" not in size:
            return False
    for turn in turns:  # noqa: SIM110  (one of the loops that every sample passes: all() takes twice as long)
        if not isinstance(turn, dict) or not isinstance(turn.get("content"), list):
            return False
    return True


def _own(
    record: Mapping[str, Any], image_count: int, images: tuple[bytes, ...], *, key: str, source: str
) -> Conversation:
    if len(record["images"]) != image_count:
        raise SampleError(f"the JSON names {len(record['images'])} images and the shard holds {image_count}")
    places: list[int] = []
    turns: list[Message] = []
    try:
        sizes = tuple([(int(size["w"]), int(size["h"])) for size in record["images"]])
        for turn in record["messages"]:
            content: list[Part] = []
            for part in turn["content"]:
                if part["type"] == "image":
                    places.append(int(part["index"]))
                    content.append(ImageRef(places[-1]))
                else:
                    content.append(str(part["text"]))
            if turn["role"] not in ROLES:
                raise SampleError(f"unknown role {turn['role']!r}")
            turns.append(Message(role=turn["role"], content=tuple(content), train=turn.get("train")))
    except (KeyError, TypeError, ValueError) as error:
        raise SampleError(f"its JSON is not of the form that mmit writes: {error!r}") from None
    if sorted(places) != list(range(image_count)):
        raise SampleError(f"the places {sorted(places)} do not take each of {image_count} images once")
    return Conversation(
        id=str(record.get("id", f"{source}/{key}")),
        messages=tuple(turns),
        images=images,
        sizes=sizes,
        source=source,
        meta=record.get("meta", {}),
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
        record = from_json(content)  # 1.5 times as fast as the standard library
    except ValueError:
        record = _parse_by_the_book(content)
    if not isinstance(record, dict):
        raise SampleError(f"its JSON is {type(record).__name__}, not an object")
    return record


def _parse_by_the_book(content: bytes) -> Any:  # noqa: ANN401  (any JSON)
    """What the standard library makes of JSON that the fast parser refuses, or its reason."""
    try:
        return json.loads(_decode(content, "json"))
    except ValueError as error:
        raise SampleError(f"its JSON is broken: {error}") from None


def _decode(content: bytes, what: str) -> str:
    try:
        return content.decode("utf-8")
    except UnicodeDecodeError as error:
        raise SampleError(f"its {what} is not UTF-8: {error.reason} at byte {error.start}") from None
