"""Small real pictures, source files and shards, made on the spot."""

from __future__ import annotations

import io
import json
import zlib
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from mmit.batch import IGNORE, Encoded
from mmit.conversation import Conversation, ImageRef, Message
from mmit.data.convert import Conversion, convert
from mmit.data.shard_set import ShardSet, open_source
from mmit.errors import DataError


def picture(width: int = 8, height: int = 6, *, colour: str = "red", kind: str = "JPEG") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(file, kind)
    return file.getvalue()


def bomb() -> bytes:
    """A PNG of 69 bytes whose header claims 60,000 x 60,000 pixels."""
    png = picture(1, 1, kind="PNG")
    header = b"IHDR" + (60_000).to_bytes(4, "big") * 2 + png[24:29]
    return png[:12] + header + zlib.crc32(header).to_bytes(4, "big") + png[33:]


def llava_record(number: int, *, image: str | None = "a.jpg", words: int = 3) -> dict:
    """A record whose answer has ``words`` words."""
    question = "<image>\nWhat is it?" if image else "What is it?"
    answer = " ".join(["red"] * words)
    record = {
        "id": f"r{number}",
        "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}],
    }
    return {**record, "image": image} if image else record


def write_source(folder: Path, records: Sequence[dict], *, name: str = "set.json") -> Path:
    """A JSON list, or JSONL where the name says so, beside a picture a.jpg."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "a.jpg").write_bytes(picture())
    path = folder / name
    text = "".join(json.dumps(r) + "\n" for r in records) if name.endswith("l") else json.dumps(list(records))
    path.write_text(text, encoding="utf-8")
    return path


def make_shards(
    folder: Path, count: int = 12, *, name: str = "tiny", shard_samples: int = 5, lengths: Sequence[int] | None = None
) -> ShardSet:
    """Shards of ``count`` records with pictures; every third is text alone; answers of ``lengths`` words."""
    records = [
        llava_record(n, image=None if n % 3 == 2 else "a.jpg", words=lengths[n] if lengths else 1 + n % 4)
        for n in range(count)
    ]
    source = write_source(folder / "source", records)
    target = folder / name
    convert(
        Conversion(reader="llava_json", source=source, target=target, name=name, shard_samples=shard_samples),
        processes=1,
        progress=False,
    )
    return open_source(target, cache=folder / "cache")


def words(conversation: Conversation) -> int:
    """The stand-in for tokens: words of the text, and 4 for each picture."""
    return sum(len(m.text.split()) for m in conversation.messages) + 4 * len(conversation.image_refs)


def measure(conversation: Conversation) -> tuple[int, int, int]:
    """Words, words of the answers, and pictures, each of one tile."""
    if any("poison" in message.text for message in conversation.messages):
        raise DataError("the text is poisoned")
    trained = sum(len(m.text.split()) for m in conversation.messages if m.role == "assistant")
    return words(conversation), trained, len(conversation.image_refs)


def encode(conversation: Conversation) -> Encoded:
    """A sample of ``words(conversation)`` tokens, each the crc of its id; pictures are one tile of 2 x 2."""
    length = words(conversation)
    for image in conversation.images:
        try:
            Image.open(io.BytesIO(image)).load()
        except OSError:
            raise DataError("the image is damaged") from None
    token = int(conversation.id.rpartition("/")[2])
    labels = torch.full((length,), IGNORE)
    labels[0] = token
    return Encoded(
        id=conversation.id,
        input_ids=torch.full((length,), token),
        labels=labels,
        pixels=torch.zeros((len(conversation.images), 3, 2, 2), dtype=torch.uint8),
    )


def talk(question: str, answer: str, *, images: int = 0) -> tuple[Message, ...]:
    """One question, with ``images`` pictures in front, and one answer."""
    front = tuple(ImageRef(number) for number in range(images))
    return (Message(role="user", content=(*front, question)), Message(role="assistant", content=(answer,)))
