"""Questions with choices: which one is right, and how they are written."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from mmit.data.faults import SampleError
from mmit.data.order import key, permutation

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


@dataclass(frozen=True)
class Choices:
    """The choices in the order in which they are shown, and the number of the right one."""

    texts: tuple[str, ...]
    right: int

    @property
    def letter(self) -> str:
        """The letter of the right choice."""
        return LETTERS[self.right]

    def shuffled(self, seed: int, name: str) -> Choices:
        """The same in another order, which depends on ``seed`` and the record's name alone."""
        order = permutation(len(self.texts), key(seed, "choices", name)).tolist()
        return Choices(tuple(self.texts[old] for old in order), order.index(self.right))


def read_choices(record: Mapping[str, Any], columns: Sequence[str], *, answer: Any, label: Any) -> Choices:  # noqa: ANN401
    """The choices in ``columns`` (one list, or a text each) and the right one.

    answer: its number (ScienceQA), its text (PMC-VQA 1) or its letter (PMC-VQA 2). label: its letter, stated besides,
    or None. A letter that opens its own choice, as in " A:Lung", is taken off. Raises SampleError.
    """
    given = record.get(columns[0]) if len(columns) == 1 else [record.get(column) for column in columns]
    listed = given if isinstance(given, list) else []
    texts = tuple(_bare(text, a) for text, a in zip(listed, LETTERS, strict=False) if isinstance(text, str))
    if not texts or len(texts) != len(listed):
        raise SampleError(f"its choices ({', '.join(columns)}) are not a list of texts")
    places = _places(texts, answer)
    if label is not None:
        stated = _letter(label, len(texts))
        if stated is None or (places and stated not in places):
            raise SampleError(f"its answer {answer!r} is not choice {label!r} of {list(texts)}")
        return Choices(texts, stated)
    if len(places) != 1:
        raise SampleError(f"its answer {answer!r} is {'none' if not places else 'several'} of {list(texts)}")
    return Choices(texts, places[0])


def _bare(text: str, letter: str) -> str:
    return re.sub(rf"^\s*{letter}\s*[:.)]\s*", "", text).strip()


def _places(texts: tuple[str, ...], answer: Any) -> list[int]:  # noqa: ANN401
    if isinstance(answer, int):
        return [answer] if 0 <= answer < len(texts) else []
    if not isinstance(answer, str):
        return []
    # the letter first taken off the answer too: some answers repeat the whole choice
    wanted = {answer.strip().casefold(), *(_bare(answer, letter).casefold() for letter in LETTERS[: len(texts)])}
    same = [number for number, text in enumerate(texts) if text.casefold() in wanted]
    letter = _letter(answer, len(texts))
    return same or ([] if letter is None else [letter])


def _letter(label: Any, count: int) -> int | None:  # noqa: ANN401
    text = str(label).strip().rstrip(":.)").upper()
    place = LETTERS.find(text) if len(text) == 1 else -1
    return place if 0 <= place < count else None
