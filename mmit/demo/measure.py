"""What the demo measures once everything is trained; held-out pictures only."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np

from mmit.chat.chat import load_for_chat
from mmit.conversation import Conversation, Message
from mmit.demo.language import told_question
from mmit.demo.page import Results, Shown
from mmit.demo.settings import DemoSettings
from mmit.demo.world import ask, make_scene
from mmit.evaluate.accuracy import Asked, ask_all, by_type, majority
from mmit.evaluate.losses import answer_loss
from mmit.evaluate.pictures import Pictures, with_pictures
from mmit.evaluate.runner import conversations_of
from mmit.models import LoadedModel
from mmit.templates import ChatTemplate

WITHOUT_ALIGN = "instruct without align, as many rows in all"
AFTER_INSTRUCT = "after align and instruct"
SHOWN = 24

Report = Callable[[str, float], None]
"""Called with what is being asked, and the share of all questions that is answered."""


def measure(
    settings: DemoSettings, stages: Mapping[str, Path], shards: Mapping[str, Path], *, report: Report
) -> Results:
    """All tables of the demo.

    stages: ``align``, ``instruct`` and ``direct`` (instruct without align) -> model directory.
    """
    seen, unseen = (conversations_of(str(shards[name])) for name in ("test", "test_unseen"))
    captions = conversations_of(str(shards["test_captions"]))
    asking = _Asking(report, total=5 * len(seen) + len(unseen) + len(seen))
    aligned = load_for_chat(stages["align"])
    accuracy = {"commonest answer of each type": _majority(shards, seen)}
    told = asking(aligned, _told_in_words(settings), "the language model, told the scene in words")
    accuracy["language model told the scene in words (the ceiling)"] = by_type(told)
    accuracy["after align"] = by_type(asking(aligned, seen, "after align"))
    plain = ChatTemplate.load("plain", aligned.tokenizer)
    kinds: tuple[Pictures, ...] = ("true", "blank", "other")
    losses = {f"{kind} picture": answer_loss(aligned, captions, kind, template=plain) for kind in kinds}

    tuned = load_for_chat(stages["instruct"])
    for kind in ("blank", "other"):
        name = f"{AFTER_INSTRUCT}, {'a blank' if kind == 'blank' else 'another'} picture"
        accuracy[name] = by_type(asking(tuned, with_pictures(seen, kind), name))
    answers = asking(tuned, seen, AFTER_INSTRUCT)
    accuracy[AFTER_INSTRUCT] = by_type(answers)
    name = f"{AFTER_INSTRUCT}, unseen colour-shape pairs"
    accuracy[name] = by_type(asking(tuned, unseen, name))
    direct = load_for_chat(stages["direct"])
    accuracy[WITHOUT_ALIGN] = by_type(asking(direct, seen, WITHOUT_ALIGN))
    return Results(
        accuracy=accuracy,
        caption_loss=losses,
        facts=_facts(accuracy, losses),
        curves={},
        commands=(),
        shown=_shown(seen, answers),
    )


def overall_after(directory: Path, shards: Path) -> float:
    """Share of right answers of one model over all question types."""
    return by_type(ask_all(load_for_chat(directory), conversations_of(str(shards))))["overall"]


class _Asking:
    """Asks, and tells how far it is."""

    def __init__(self, report: Report, *, total: int) -> None:
        self._report = report
        self._total = total
        self._done = 0

    def __call__(self, loaded: LoadedModel, conversations: list[Conversation], what: str) -> list[Asked]:
        def progress(count: int) -> None:
            self._done += count
            self._report(what, min(1.0, self._done / self._total))

        return ask_all(loaded, conversations, max_new_tokens=4, on_progress=progress)


def _majority(shards: Mapping[str, Path], seen: list[Conversation]) -> dict[str, float]:
    """The commonest answer of each type is counted on questions about other pictures of the same world."""
    tuned = [_type_and_answer(c) for c in conversations_of(str(shards["majority"]))]
    return majority(tuned, [_type_and_answer(c) for c in seen])


def _type_and_answer(conversation: Conversation) -> tuple[str, str]:
    return str(conversation.meta["type"]), conversation.messages[-1].text


def _told_in_words(settings: DemoSettings) -> list[Conversation]:
    """Text-only questions: the scene is told, and something is asked of it."""
    rng = np.random.default_rng(106)
    found = []
    for number in range(settings.test_pictures):
        scene = make_scene(settings.world, rng, pairs="all")
        for kind in settings.world.question_types:
            if scene.admits(kind):
                question = ask(scene, kind, rng)
                turns = (
                    told_question(scene, question, rng),
                    Message(role="assistant", content=(question.answer,)),
                )
                found.append(Conversation(id=f"{number}-{kind}", messages=turns, meta={"type": kind}))
    return found


def _facts(accuracy: Mapping[str, Mapping[str, float]], losses: Mapping[str, float]) -> dict[str, str]:
    tuned, direct = accuracy[AFTER_INSTRUCT]["overall"], accuracy[WITHOUT_ALIGN]["overall"]
    blind = max(scores["overall"] for name, scores in accuracy.items() if name.endswith(" picture"))
    gain = 100 * (tuned - direct)
    pays = "pays" if gain > 2 else "does not pay" if gain < -2 else "makes no difference beyond 2 points"
    ratio = losses["true picture"] / losses["other picture"]
    return {
        "visual gain": f"{100 * (tuned - blind):.1f} points over the same model without the true picture",
        "alignment": f"caption loss with the true picture is {ratio:.2f} of that with another picture",
        "align, then instruct": f"{gain:+.1f} points against instruct alone: alignment {pays} here",
    }


def _shown(conversations: list[Conversation], answers: list[Asked]) -> list[Shown]:
    """A spread of answers over all types, as they come: not chosen by right or wrong."""
    step = max(1, len(answers) // SHOWN)
    picked = range(0, step * SHOWN, step)
    return [Shown(asked=answers[n], picture=conversations[n].images[0]) for n in picked if n < len(answers)]


def with_curves(results: Results, curves: Mapping[str, str], commands: tuple[str, ...]) -> Results:
    """The same results with loss curves and next commands."""
    return replace(results, curves=curves, commands=commands)
