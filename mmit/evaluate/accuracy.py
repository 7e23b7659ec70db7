"""Exact match: the model's greedy answer to the first question of each sample, against the sample's own answer.

First turns only: later ones of a dialogue may be answered from what was said before.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from mmit.conversation import Conversation
from mmit.models import LoadedModel
from mmit.models.prompts import encode_prompt
from mmit.turns import question_of


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A question of a sample with the right answer, and what was answered."""

    id: str
    type: str
    question: str
    expected: str
    answer: str

    @property
    def is_right(self) -> bool:
        """Equal up to case, white space around it and one full stop at the end."""
        return normalized(self.answer) == normalized(self.expected)


def normalized(answer: str) -> str:
    """An answer as it is compared."""
    return " ".join(answer.lower().split()).removesuffix(".").strip()


def ask_all(
    loaded: LoadedModel,
    conversations: Sequence[Conversation],
    *,
    max_new_tokens: int = 16,
    batch_size: int = 32,
    on_progress: Callable[[int], None] = lambda _: None,
) -> list[Asked]:
    """Greedy answers to the first question of each conversation, ``batch_size`` at a time.

    The type of a question is ``meta["type"]`` of its sample (``all`` where it has none). ``on_progress`` is called
    with the number of answers of each batch. Raises DataError for a sample without a question and answer.
    """
    found: list[Asked] = []
    for start in range(0, len(conversations), batch_size):
        batch = conversations[start : start + batch_size]
        pairs = [question_of(conversation) for conversation in batch]
        prompts = [encode_prompt(loaded, asked) for asked, _ in pairs]
        with torch.no_grad():
            answers = loaded.model.generate_batch(
                prompts, max_new_tokens=max_new_tokens, stop_ids=loaded.template.stop_ids
            )
        for (asked, expected), ids in zip(pairs, answers, strict=True):
            text = loaded.tokenizer.decode(ids, skip_special_tokens=True)
            assert isinstance(text, str)
            found.append(
                Asked(
                    id=asked.id,
                    type=str(asked.meta.get("type", "all")),
                    question=asked.messages[-1].text.strip(),
                    expected=expected.strip(),
                    answer=text.strip(),
                )
            )
        on_progress(len(batch))
    return found


def by_type(asked: Iterable[Asked]) -> dict[str, float]:
    """Share of right answers of each type, and of all types together under ``overall`` (every question counts once)."""
    right: Counter[str] = Counter()
    count: Counter[str] = Counter()
    for one in asked:
        for name in (one.type, "overall"):
            right[name] += one.is_right
            count[name] += 1
    return {name: right[name] / count[name] for name in [*sorted(n for n in count if n != "overall"), "overall"]}


def majority(tuned_on: Iterable[tuple[str, str]], asked: Sequence[tuple[str, str]]) -> dict[str, float]:
    """What always giving the commonest answer of a type reaches: counted on tuning data, scored on held-out data.

    Both hold (type, answer) pairs.
    """
    counts: dict[str, Counter[str]] = {}
    for kind, answer in tuned_on:
        counts.setdefault(kind, Counter())[normalized(answer)] += 1
    best = {kind: counter.most_common(1)[0][0] for kind, counter in counts.items()}
    return by_type(
        Asked(id="", type=kind, question="", expected=answer, answer=best.get(kind, "")) for kind, answer in asked
    )
