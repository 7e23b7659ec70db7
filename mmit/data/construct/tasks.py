"""What can be asked about an annotated picture: each kind of task turns an annotation into the values of its turns.

A kind knows no wording. It gives one mapping of placeholders a turn, such as ``{"label": "dog", "count": "2"}``, or
none at all where the annotation does not hold what it needs or the answer would be ambiguous.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from string import ascii_uppercase

from mmit.data.construct.annotation import Annotation, Question, Region
from mmit.data.construct.draw import Draw
from mmit.data.faults import SampleError

Values = dict[str, str]


@dataclass(frozen=True, kw_only=True)
class Case:
    """An annotation about to be asked.

    write: the text of a region's box. labels: all labels that the source is annotated for, () where that is not known.
    """

    annotation: Annotation
    draw: Draw
    write: Callable[[Region], str]
    labels: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A kind of task: what makes its turns, the placeholders they fill, and the answer unless a wording has its own.

    asks: placeholders without which the question would not be clear.
    """

    turns: Callable[[Case], list[Values]]
    asks: frozenset[str]
    names: frozenset[str]
    say: str


def vote(answers: tuple[str, ...]) -> str:
    """The answer that most people gave; the earlier one of a tie."""
    return Counter(answers).most_common(1)[0][0]


def right_choice(question: Question) -> int:
    """Which of the choices is right: the one that the answer spells out, else the one it names by letter.

    Raises SampleError.
    """
    answer = vote(question.answers)
    same = [n for n, choice in enumerate(question.choices) if choice.casefold() == answer.casefold()]
    letter = re.fullmatch(r"\(?([A-Za-z])[).:]?", answer)
    if not same and letter:
        same = [n for n in [ascii_uppercase.index(letter[1].upper())] if n < len(question.choices)]
    if len(same) != 1:
        raise SampleError(f"'{answer[:60]}' is {'none' if not same else 'several'} of {list(question.choices)}")
    return same[0]


def _caption(case: Case) -> list[Values]:
    captions = case.annotation.captions
    return [{"caption": captions[case.draw.index("caption", len(captions))]}] if captions else []


def _description(case: Case) -> list[Values]:
    return [{"description": case.annotation.description}] if case.annotation.description else []


def _answer(case: Case) -> list[Values]:
    return [{"question": q.question, "answer": vote(q.answers)} for q in case.annotation.questions if not q.choices]


def _choice(case: Case) -> list[Values]:
    turns: list[Values] = []
    for number, question in enumerate(case.annotation.questions):
        if not question.choices:
            continue
        if not 2 <= len(question.choices) <= len(ascii_uppercase):
            raise SampleError(f"a question with {len(question.choices)} choices; 2 to 26 have letters")
        right = right_choice(question)
        order = case.draw.shuffled(f"choices/{number}", range(len(question.choices)))
        lines = [f"{letter}. {question.choices[n]}" for letter, n in zip(ascii_uppercase, order, strict=False)]
        turns.append(
            {
                "question": question.question,
                "options": "\n".join(lines),
                "letter": ascii_uppercase[order.index(right)],
                "choice": question.choices[right],
            }
        )
    return turns


def _presence(case: Case) -> list[Values]:
    """As many labels that are there as labels that are not: a set of one answer teaches that answer."""
    there = case.annotation.labels
    others = case.labels if case.annotation.regions else ()
    missing = tuple(dict.fromkeys(label for label in (*case.annotation.absent, *others) if label not in there))
    count = min(len(there), len(missing))
    turns = [{"label": label, "yes_no": "Yes"} for label in case.draw.some("there", there, count)]
    turns += [{"label": label, "yes_no": "No"} for label in case.draw.some("missing", missing, count)]
    return case.draw.shuffled("presence", turns)


def _count(case: Case) -> list[Values]:
    crowds = {region.label for region in case.annotation.regions if region.crowd}
    counts = Counter(region.label for region in case.annotation.regions if region.label)
    return [{"label": label, "count": str(n)} for label, n in counts.items() if label not in crowds]


def _colour(case: Case) -> list[Values]:
    named = [(region.phrase or region.label, region.colour) for region in case.annotation.regions]
    return [{"label": name, "colour": colour} for name, colour in named if colour and _is_unique(name, case)]


def _locate(case: Case) -> list[Values]:
    named = [(region.phrase or region.label, region) for region in case.annotation.regions if not region.crowd]
    return [{"phrase": name, "box": case.write(region)} for name, region in named if _is_unique(name, case)]


def _describe_region(case: Case) -> list[Values]:
    return [{"phrase": r.phrase, "box": case.write(r)} for r in case.annotation.regions if r.phrase]


def _name_region(case: Case) -> list[Values]:
    return [{"label": r.label, "box": case.write(r)} for r in case.annotation.regions if r.label and not r.crowd]


def _detect(case: Case) -> list[Values]:
    """All boxes of a label, from left to right as far as the record's numbers tell."""
    turns: list[Values] = []
    for label in case.annotation.labels:
        found = [region for region in case.annotation.regions if region.label == label]
        if not any(region.crowd for region in found):
            boxes = [case.write(region) for region in sorted(found, key=lambda region: region.box[:2])]
            turns.append({"label": label, "boxes": "\n".join(boxes)})
    return turns


def _read_text(case: Case) -> list[Values]:
    return [{"text": "\n".join(case.annotation.lines)}] if case.annotation.lines else []


def _read_region(case: Case) -> list[Values]:
    return [{"text": r.text, "box": case.write(r)} for r in case.annotation.regions if r.text]


def _locate_text(case: Case) -> list[Values]:
    texts = Counter(region.text for region in case.annotation.regions)
    found = [region for region in case.annotation.regions if region.text and texts[region.text] == 1]
    return [{"text": region.text, "box": case.write(region)} for region in found]


def _grounded(case: Case) -> list[Values]:
    """The description with a box behind each phrase, or each label that only one box has, at its first mention."""
    annotation = case.annotation
    text = annotation.description or (annotation.captions[0] if annotation.captions else "")
    places: list[tuple[int, str]] = []
    taken: list[tuple[int, int]] = []
    # long names first, so that "hot dog" is not taken for a dog
    for region in sorted(annotation.regions, key=lambda r: -len(r.phrase or r.label)):
        name = region.phrase or region.label
        found = re.search(rf"(?<!\w){re.escape(name)}(?!\w)", text, re.IGNORECASE) if _is_unique(name, case) else None
        if found and not region.crowd and all(found.end() <= start or found.start() >= end for start, end in taken):
            taken.append(found.span())
            places.append((found.end(), f" {case.write(region)}"))
    for at, box in sorted(places, reverse=True):
        text = text[:at] + box + text[at:]
    return [{"grounded": text}] if places else []


def _classify(case: Case) -> list[Values]:
    return [{"class": case.annotation.label}] if case.annotation.label else []


def _is_unique(name: str, case: Case) -> bool:
    """True where a name means one region: its phrase occurs once, or no other region has that label."""
    return case.annotation.names.get(name) == 1


def _kind(turns: Callable[[Case], list[Values]], say: str, asks: str = "", more: str = "") -> Kind:
    needed = frozenset(asks.split())
    answered = frozenset(re.findall(r"{(\w+)}", say))
    return Kind(turns=turns, asks=needed, names=needed | answered | frozenset(more.split()), say=say)


KINDS: Mapping[str, Kind] = {
    "caption": _kind(_caption, "{caption}"),
    "description": _kind(_description, "{description}"),
    "answer": _kind(_answer, "{answer}", asks="question"),
    "choice": _kind(_choice, "{letter}", asks="question options", more="choice"),
    "presence": _kind(_presence, "{yes_no}", asks="label"),
    "count": _kind(_count, "{count}", asks="label"),
    "colour": _kind(_colour, "{colour}", asks="label"),
    "locate": _kind(_locate, "{box}", asks="phrase", more="box_form"),
    "describe_region": _kind(_describe_region, "{phrase}", asks="box", more="box_form"),
    "name_region": _kind(_name_region, "{label}", asks="box", more="box_form"),
    "detect": _kind(_detect, "{boxes}", asks="label", more="box_form"),
    "read_text": _kind(_read_text, "{text}"),
    "read_region": _kind(_read_region, "{text}", asks="box", more="box_form"),
    "locate_text": _kind(_locate_text, "{box}", asks="text", more="box_form"),
    "grounded": _kind(_grounded, "{grounded}", more="box_form"),
    "classify": _kind(_classify, "{class}"),
}
