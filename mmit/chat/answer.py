"""One answer of a loaded model to one conversation: checked prompt in, pieces of text out.

Stateless: ``Chat`` keeps a history on top of it, the server keeps a queue. The prompt is rendered, tokenized and
prepared by the code that training uses, so that the model sees what it has learned.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Literal

import torch

from mmit.batch import Encoded
from mmit.chat.prompt import check_turns
from mmit.chat.text_stream import TextStream
from mmit.conversation import Conversation
from mmit.errors import ConfigError, DataError
from mmit.models.loaded import LoadedModel
from mmit.models.prompts import read_prompt, with_pictures

DEFAULT_NEW_TOKENS = 512
"""The longest answer where none is asked for, context permitting."""

FinishReason = Literal["stop", "length"]


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How an answer is chosen and where it ends.

    max_new_tokens: None takes what the context has room for, at most DEFAULT_NEW_TOKENS. temperature 0 is greedy.
    stop: strings that end the answer and are not part of it. seed: fixes the draw at a temperature above 0.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    stop: tuple[str, ...] = ()
    seed: int | None = None

    def __post_init__(self) -> None:
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            raise ConfigError(f"max_new_tokens is {self.max_new_tokens}; an answer needs at least 1")
        if not 0 <= self.temperature < float("inf"):
            raise ConfigError(f"temperature is {self.temperature}; choose 0 (greedy) or above")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}; choose above 0, up to 1")
        if not all(self.stop):
            raise ConfigError("an empty stop string would end every answer before it begins")


class Answer:
    """The answer to one prompt: iterate once for its pieces, in order, none ever taken back.

    Leaving the iteration early stops the model. ``completion_tokens`` counts as the answer grows; ``finish_reason`` is
    None until it is complete: ``stop`` where the model ended it or a stop string did, ``length`` where the limit did.
    """

    def __init__(self, loaded: LoadedModel, prompt: Encoded, sampling: Sampling) -> None:
        self.prompt_tokens = prompt.length
        self.completion_tokens = 0
        self.finish_reason: FinishReason | None = None
        self._loaded = loaded
        self._prompt = prompt
        self._sampling = sampling
        self._limit = _limit(loaded, self.prompt_tokens, sampling.max_new_tokens)

    def __iter__(self) -> Generator[str, None, None]:
        text = TextStream(self._loaded.tokenizer, (*self._loaded.template.stop, *self._sampling.stop))
        tokens = self._tokens()
        try:
            for token in tokens:
                self.completion_tokens += 1
                if piece := text.push(token):
                    yield piece
                if text.is_stopped:
                    break
        finally:
            tokens.close()
        if piece := text.finish():
            yield piece
        ended = text.is_stopped or self.completion_tokens < self._limit
        self.finish_reason = "stop" if ended else "length"

    def _tokens(self) -> Generator[int, None, None]:
        """The ids as the model makes them, from a thread of its own; closing the iterator ends the thread."""
        made: SimpleQueue[int | None] = SimpleQueue()
        unwanted = threading.Event()

        def on_token(token: int) -> None:
            if unwanted.is_set():
                raise _UnwantedError
            made.put(token)

        with ThreadPoolExecutor(1, thread_name_prefix="answer") as worker:
            work = worker.submit(self._generate, on_token)
            work.add_done_callback(lambda _: made.put(None))
            try:
                while (token := made.get()) is not None:
                    yield token
            finally:
                unwanted.set()
        with suppress(_UnwantedError):
            work.result()

    def _generate(self, on_token: Callable[[int], None]) -> None:
        device = next(self._loaded.model.parameters()).device
        with torch.random.fork_rng([device] if device.type == "cuda" else [], enabled=self._sampling.seed is not None):
            if self._sampling.seed is not None:
                torch.manual_seed(self._sampling.seed)
            self._loaded.model.generate(
                self._prompt,
                max_new_tokens=self._limit,
                temperature=self._sampling.temperature,
                top_p=self._sampling.top_p,
                stop_ids=self._loaded.template.stop_ids,
                on_token=on_token,
            )


class _UnwantedError(Exception):
    """Unwinds the model's generation when nobody reads on."""


def answer(loaded: LoadedModel, conversation: Conversation, sampling: Sampling) -> Answer:
    """The answer to ``conversation``, whose last turn is the user's; nothing is generated before it is iterated.

    Raises DataError for turns out of order, an empty question, a picture that cannot be read, or a prompt that leaves
    no room for ``sampling.max_new_tokens`` in the model's context.
    """
    check_turns(conversation)
    prompt = read_prompt(loaded, conversation)
    _limit(loaded, prompt.length, sampling.max_new_tokens)  # before any picture is decoded
    return Answer(loaded, with_pictures(prompt, loaded, conversation), sampling)


def _limit(loaded: LoadedModel, prompt_tokens: int, asked: int | None) -> int:
    """The number of new tokens; raises DataError where they do not fit behind the prompt."""
    context = getattr(loaded.model.language_model.config.get_text_config(), "max_position_embeddings", None)
    if context is None:  # positions without a table, such as ALiBi
        return asked or DEFAULT_NEW_TOKENS
    room = context - prompt_tokens
    if room < (asked or 1):
        raise DataError(
            f"the prompt has {prompt_tokens} tokens and {asked or 1} new ones are wanted, but the model's context "
            f"holds {context}: shorten the conversation, send fewer images or ask for fewer new tokens"
        )
    return asked or min(room, DEFAULT_NEW_TOKENS)
