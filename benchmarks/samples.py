"""Conversations and pictures with the lengths of LLaVA-1.5's training sets, from a seed.

Stage 2 draws from the seven kinds of data in LLaVA's mix of 665 thousand conversations (counts: LLaVA, arXiv
2304.08485, section 3; LLaVA-1.5, arXiv 2310.03744, table 7). How many turns a kind has and how long its questions and
answers are is our estimate, in tokens beside the 576 image tokens of a picture there. Here a picture has fewer, and all
texts shrink with it.
"""

from __future__ import annotations

import io
import json
import math
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

LLAVA_IMAGE_TOKENS = 576
PICTURE = (320, 240)
SYSTEM = "Answer what the user asks about the picture ."


@dataclass(frozen=True)
class Kind:
    """One kind of conversation; lengths in tokens, answers log-normal with ``median`` and ``spread`` (of the log)."""

    thousands: int
    turns: tuple[int, int]
    question: tuple[int, int]
    median: float
    spread: float
    has_picture: bool = True

    @property
    def room(self) -> int:
        """Text tokens that fit beside the picture in LLaVA's rows of 2048, with some left for the template."""
        return 1400 if self.has_picture else 2048


LLAVA_665K = (
    Kind(58, (3, 6), (8, 16), 35, 0.6),  # LLaVA-Instruct, conversation
    Kind(100, (1, 1), (12, 40), 130, 0.35),  # LLaVA-Instruct, detail and reasoning
    Kind(40, (2, 8), (15, 80), 170, 0.8, has_picture=False),  # ShareGPT
    Kind(164, (3, 12), (8, 16), 2, 0.4),  # VQAv2, GQA, OKVQA
    Kind(80, (5, 6), (8, 14), 5, 0.6),  # OCR-VQA
    Kind(88, (1, 1), (35, 65), 4, 0.8),  # A-OKVQA, TextCaps
    Kind(134, (5, 14), (12, 20), 11, 0.4),  # RefCOCO, Visual Genome
)
CAPTIONS = Kind(558, (1, 1), (0, 0), 17, 0.5)
LONGEST = {"caption": 70, "answer": 900}


def vocabulary() -> list[str]:
    """3000 made-up words, the same every time."""
    syllables = [a + b for a, b in product("bdfgklmnprstvz", "aeiou")]
    words = ["".join(pair) for pair in product(syllables, repeat=2)]
    return sorted(random.Random(7).sample(words, 3000))


class Writer:
    """Writes the records of one stage; the n-th record does not depend on how many follow."""

    def __init__(self, *, stage: int, image_tokens: int, seed: int) -> None:
        self._random = random.Random(f"{seed}/{stage}")
        self._words = vocabulary()
        self._scale = image_tokens / LLAVA_IMAGE_TOKENS
        self._stage = stage

    def records(self) -> Iterator[dict[str, Any]]:
        """Records in LLaVA's form, without end."""
        number = 0
        while True:
            yield self._caption(number) if self._stage == 1 else self._conversation(number)
            number += 1

    def _caption(self, number: int) -> dict[str, Any]:
        length = min(LONGEST["caption"], max(5.0, self._lognormal(CAPTIONS)))
        turns = [("<image>", self._text(self._scaled(length)))]
        return _record(number, turns, has_picture=True, system="")

    def _conversation(self, number: int) -> dict[str, Any]:
        kind = self._random.choices(LLAVA_665K, [kind.thousands for kind in LLAVA_665K])[0]
        room = self._scaled(kind.room)
        turns: list[tuple[str, str]] = []
        for turn in range(self._random.randint(*kind.turns)):
            asked = self._scaled(self._random.uniform(*kind.question))
            answered = self._scaled(min(LONGEST["answer"], self._lognormal(kind)))
            if turns and asked + answered > room:
                break
            answered = min(answered, max(1, room - asked))
            room -= asked + answered
            mark = "<image>\n" if kind.has_picture and turn == 0 else ""
            turns.append((mark + self._text(asked), self._text(answered)))
        return _record(number, turns, has_picture=kind.has_picture, system=SYSTEM)

    def _lognormal(self, kind: Kind) -> float:
        return self._random.lognormvariate(math.log(kind.median), kind.spread)

    def _scaled(self, tokens: float) -> int:
        return max(1, round(tokens * self._scale))

    def _text(self, words: int) -> str:
        return " ".join(self._random.choices(self._words, k=words))


def picture(number: int, size: tuple[int, int] = PICTURE, *, grain: float = 7.0) -> bytes:
    """A JPEG of soft colours with grain (in grey levels), about as many bytes as a photo of that size."""
    source = np.random.default_rng(number)
    soft = Image.fromarray(source.integers(0, 256, (18, 24, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
    noise = source.normal(0.0, grain, (size[1], size[0], 1))
    image = Image.fromarray(np.clip(np.asarray(soft) + noise, 0, 255).astype(np.uint8))
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=90)
    return buffer.getvalue()


def write_records(
    records: list[dict[str, Any]], file: Path, images: Path, *, picture_of: Callable[[int], bytes] = picture
) -> None:
    """Write the records as JSON, and their pictures below ``images`` where they are missing."""
    file.parent.mkdir(parents=True, exist_ok=True)
    images.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(records), encoding="utf-8")
    for record in records:
        if "image" in record and not (path := images / record["image"]).exists():
            path.write_bytes(picture_of(int(record["id"])))


def _record(number: int, turns: list[tuple[str, str]], *, has_picture: bool, system: str) -> dict[str, Any]:
    spoken = [
        {"from": who, "value": text}
        for question, answer in turns
        for who, text in (("human", question), ("gpt", answer))
    ]
    record: dict[str, Any] = {"id": f"{number:06d}", "conversations": spoken}
    if system:
        record["system"] = system
    if has_picture:
        record["image"] = f"{number:06d}.jpg"
    return record
