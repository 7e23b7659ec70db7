"""What the model answers to some held-out questions while a stage trains, beside the pictures that were asked about.

The questions are chosen and encoded before the first step. Answers are greedy and made one at a time, so that each is
what a chat with the model of that step would give. Every rank answers its share in as many rounds: under ZeRO-3 the
ranks hand each other the weights of every forward pass, and one that had nothing to do would leave the others waiting.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from mmit.batch import Encoded
from mmit.config import RunConfig
from mmit.conversation import Conversation
from mmit.data.order import key, permutation
from mmit.data.page import small_picture
from mmit.distributed import gathered, logger, rank, world_size
from mmit.errors import DataError
from mmit.models.prompts import encode_prompt
from mmit.train.evaluation import Evaluation, measuring
from mmit.train.records import AnswerRecord
from mmit.turns import question_of

if TYPE_CHECKING:
    from mmit.models import LoadedModel
    from mmit.templates import ChatTemplate
    from mmit.train.engine import Engine

FOLDER = "answers"
"""Where the pictures lie, in the folder of the stage."""
PICTURES = 4
"""Most pictures of a question that are kept; videos have more."""
TRIES = 8
"""A sample without a question, or too long for an answer, is passed over; so many times more are looked at."""


@dataclass(frozen=True, kw_only=True)
class Question:
    """The first question of a held-out sample, and its own answer."""

    id: str
    source: str
    asked: Conversation
    reference: str
    prompt: Encoded


class Answers:
    """The questions of a stage.

    template: of the stage, which says where an answer ends. folder: of the stage.
    """

    def __init__(
        self,
        loaded: LoadedModel,
        template: ChatTemplate,
        questions: Sequence[Question],
        *,
        new_tokens: int,
        folder: Path,
    ) -> None:
        self._loaded = loaded
        self._template = template
        self._questions = questions
        self._new_tokens = new_tokens
        self._folder = folder

    @property
    def fingerprint(self) -> str:
        """Changes with the questions."""
        return " ".join(question.id for question in self._questions)

    def give(self, engine: Engine, step: int, mark: Callable[[Sequence[str]], None]) -> list[AnswerRecord]:
        """The answers after ``step``, on every rank; collective. mark: told the samples that are being answered."""
        questions, ranks = self._questions, world_size()
        synced = engine.zero_stage == 3 and ranks > 1
        own: dict[int, str] = {}
        with measuring(engine.module):
            for first in range(0, len(questions), ranks):
                number = min(first + rank(), len(questions) - 1)  # a rank beyond the last one answers that too
                mark((questions[number].id,))
                own[number] = self._answer(questions[number].prompt, synced=synced)
        answers = {number: text for part in gathered(own) for number, text in part.items()}
        return [self._record(question, answers[number], step) for number, question in enumerate(questions)]

    def _answer(self, prompt: Encoded, *, synced: bool) -> str:
        model, tokenizer = self._loaded.model, self._loaded.tokenizer
        alone = [] if model.image_newline is None else [model.image_newline]  # belongs to no module that is called
        with model.placement.whole(alone):
            ids = model.generate(
                prompt,
                max_new_tokens=self._new_tokens,
                stop_ids=self._template.stop_ids,
                synced=synced,
            )
        text = tokenizer.decode(ids, skip_special_tokens=True)
        assert isinstance(text, str), "one answer, one text"
        for stop in self._template.stop:  # where it is no single token
            text = text.partition(stop)[0]
        return text.strip()

    def _record(self, question: Question, answer: str, step: int) -> AnswerRecord:
        return AnswerRecord(
            step=step,
            id=question.id,
            source=question.source,
            pictures=tuple(self._kept(picture) for picture in question.asked.images[:PICTURES]),
            question=question.asked.messages[-1].text.strip(),
            reference=question.reference.strip(),
            answer=answer,
        )

    def _kept(self, picture: bytes) -> str:
        """The file of a picture, made smaller; written once, by rank 0."""
        name = f"{FOLDER}/{hashlib.blake2b(picture, digest_size=8).hexdigest()}.jpg"
        if rank() == 0 and not (self._folder / name).exists():
            (self._folder / FOLDER).mkdir(exist_ok=True)
            (self._folder / name).write_bytes(small_picture(picture)[0])
        return name


def plan_answers(
    config: RunConfig, name: str, loaded: LoadedModel, evaluation: Evaluation | None, template: ChatTemplate
) -> Answers | None:
    """What ``evaluate.answers`` of a stage asks for; None where it asks for none. The same on every rank.

    template: of the stage. Raises DataError where no held-out sample has a question that can be answered.
    """
    asked = config.stages[name].evaluate
    if asked is None or evaluation is None or not asked.answers:
        return None
    room = getattr(loaded.model.language_model.config.get_text_config(), "max_position_embeddings", None)
    questions: list[Question] = []
    for source, conversation in _candidates(evaluation, asked.answers * TRIES, seed=config.seed):
        try:
            shown, reference = question_of(conversation)
            prompt = encode_prompt(loaded, shown, template=template)
        except DataError as error:
            logger.warning("not asked: %s", error)
            continue
        if room is None or prompt.length + asked.answer_tokens <= room:
            found = Question(id=conversation.id, source=source, asked=shown, reference=reference, prompt=prompt)
            questions.append(found)
        if len(questions) == asked.answers:
            break
    if not questions:
        raise DataError(
            f"stages.{name}.evaluate.answers: no held-out sample that was looked at has a question and room for "
            f"{asked.answer_tokens} more tokens; take answers out, or make answer_tokens smaller"
        )
    return Answers(
        loaded,
        template,
        questions,
        new_tokens=asked.answer_tokens,
        folder=config.stage_folder(name),
    )


def _candidates(evaluation: Evaluation, most: int, *, seed: int) -> Iterator[tuple[str, Conversation]]:
    """Held-out samples with their sources, one of each source in turn, in an order of their own."""
    feed, owners = evaluation.feeds["true"], evaluation.owners["true"]
    plan = feed.plan
    of_source: dict[int, list[tuple[int, int]]] = {number: [] for number in range(len(evaluation.names))}
    for number in permutation(plan.samples, key(seed, "answers")).tolist():
        part = int(plan.source_of[number])
        of_source[owners[part]].append((part, int(plan.sample_of[number])))
    turns = sorted((turn, source, place) for source, places in of_source.items() for turn, place in enumerate(places))
    for _, source, (part, number) in turns[:most]:
        yield evaluation.names[source], plan.sources[part].read(number)
