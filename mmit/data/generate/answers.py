"""What a language model wrote, taken apart into questions and answers, or rejected with the reason."""

from __future__ import annotations

import re
from collections import Counter

from mmit.data.generate.prompts import Kind

MIN_ANSWER = 2
MAX_QUESTION = 600
MAX_ANSWER = 6000
MAX_TURNS = 12
_MIN_PROSE = 80
_REPEATS = 3
_LONG_SENTENCE = 20  # characters; shorter ones may well occur again

_MARK = re.compile(r"^[ \t]*[*_#]*(Q|A|Question|Answer)[ \t]*\d*[*_]*[ \t]*:[*_]*[ \t]*", re.MULTILINE | re.IGNORECASE)
_CONTROL = re.compile(
    r"<image>|<\|[^|<>]{1,40}\|>|</?s>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|<(?:pad|unk|bos|eos|im_\w+)>"
    r"|^\s*(?:USER|ASSISTANT|SYSTEM|Human|Assistant):|[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffd]",
    re.MULTILINE,
)
# remarks that only somebody who was handed notes makes, or who saw nothing at all
_SOURCE = r"(?:captions?|notes?|sentences?|annotations?|bounding box(?:es)?|coordinates|metadata)"
_TELL_TALE = tuple(
    re.compile(pattern, re.IGNORECASE)
    for pattern in (
        rf"\b(?:the|these|those|this|your|each|given|provided|first|second|third|other|one of the)\s+{_SOURCE}\s+"
        r"(?:also\s+)?(?:says?|states?|mentions?|describes?|tells?|notes?|suggests?|indicates?|shows?|provides?|provided"
        r"|given|specif(?:y|ies))\b",
        rf"\b(?:based|relying|going|judging)\s+(?:only\s+|solely\s+)?(?:on|by|from)\s+(?:the|these|your|this|what)\s+"
        rf"(?:\w+\s+){{0,2}}(?:{_SOURCE}|descriptions?|text|information|was given|was provided)\b",
        rf"\baccording to (?:the|these|your|this) (?:\w+\s+){{0,2}}(?:{_SOURCE}|descriptions?|text|information)\b",
        rf"\b(?:provided|supplied|given|above) (?:{_SOURCE}|descriptions?|text|information|context)\b",
        r"\bbounding[- ]box(?:es)?\b",
        rf"\bas (?:described|stated|mentioned|noted) in the (?:\w+\s+)?(?:{_SOURCE}|text|descriptions?)\b",
        r"\b(?:can ?not|can't|am unable to|not able to|do not|don't) (?:\w+\s+)?"
        r"(?:see|view|access|look at|have access to) (?:the|this|any|an|your) (?:\w+\s+)?(?:image|picture|photo)",
        r"\bas an? (?:AI|language model|text-based)\b",
        r"[\[(]\s*(?:0?\.\d+|[01](?:\.\d+)?)(?:\s*,\s*(?:0?\.\d+|[01](?:\.\d+)?)){3}\s*[\])]",
    )
)


class RejectedError(Exception):
    """An answer that is no good; the message is the reason."""


def read_answer(text: str, kind: Kind, *, question: str = "") -> list[tuple[str, str]]:
    """The (question, answer) turns in what a model wrote; ``question`` is that of a description.

    Raises RejectedError: not of the form asked for, empty, too long, repeating itself, with control tokens of a chat
    template, or with a remark that betrays what the model was given.
    """
    turns = [(question, _prose(text))] if kind == "description" else _pairs(text)
    if kind == "reasoning" and len(turns) != 1:
        raise RejectedError(f"{len(turns)} questions where one was asked for")
    if kind == "conversation" and not 2 <= len(turns) <= MAX_TURNS:
        raise RejectedError(f"a conversation of {len(turns)} exchanges; 2 to {MAX_TURNS} are taken")
    for number, (asked, said) in enumerate(turns, start=1):
        _check_lengths(asked, said, number)
        # the question of a description is ours, and may say that somebody cannot see the picture
        for words in (said,) if kind == "description" else (asked, said):
            _check_words(words, number)
    if len({asked.casefold() for asked, _ in turns}) < len(turns):
        raise RejectedError("a question is asked twice")
    return turns


def _pairs(text: str) -> list[tuple[str, str]]:
    """The turns that "Q:" and "A:" open, if they alternate."""
    marks = list(_MARK.finditer(text))
    if not marks:
        raise RejectedError('no "Q:" and "A:" in it')
    if text[: marks[0].start()].strip(" \t\r\n*#-_"):
        raise RejectedError(f"text before the first question: '{text[: marks[0].start()].strip()[:60]}'")
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    pieces = [(m[1][0].upper(), text[m.end() : end].strip()) for m, end in zip(marks, ends, strict=True)]
    roles = "".join(role for role, _ in pieces)
    if roles != "QA" * (len(roles) // 2):
        raise RejectedError(f"questions and answers do not alternate: {roles[:40]}")
    contents = [content for _, content in pieces]
    return list(zip(contents[::2], contents[1::2], strict=True))


def _prose(text: str) -> str:
    prose = text.strip()
    if len(prose) < _MIN_PROSE:
        raise RejectedError(f"a description of {len(prose)} characters; {_MIN_PROSE} are the least")
    if _MARK.match(prose) or re.match(r"(?:sure|certainly|of course|here is|here's)\b", prose, re.IGNORECASE):
        raise RejectedError(f"it does not begin with the description: '{prose[:40]}'")
    return prose


def _check_lengths(asked: str, said: str, number: int) -> None:
    if not asked or len(said) < MIN_ANSWER:
        raise RejectedError(f"{'question' if not asked else 'answer'} {number} is empty")
    if len(asked) > MAX_QUESTION or len(said) > MAX_ANSWER:
        raise RejectedError(
            f"turn {number} has {len(asked)} and {len(said)} characters; {MAX_QUESTION} and {MAX_ANSWER} are the most"
        )


def _check_words(text: str, number: int) -> None:
    if found := _CONTROL.search(text):
        raise RejectedError(f"turn {number} holds the control token {found[0].strip()!r}")
    for pattern in _TELL_TALE:
        if found := pattern.search(text):
            raise RejectedError(f"turn {number} betrays what it was written from: '{found[0]}'")
    sentences = Counter(s.strip().casefold() for s in re.split(r"[.!?\n]+", text) if len(s.strip()) > _LONG_SENTENCE)
    if sentences and max(sentences.values()) >= _REPEATS:
        raise RejectedError(f"turn {number} repeats itself: '{sentences.most_common(1)[0][0][:60]}'")
