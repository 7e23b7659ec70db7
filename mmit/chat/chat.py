"""A conversation with a model, from Python.

chat = Chat.load("runs/demo/instruct")
chat.ask("What colour is the circle?", images=["photo.png"])
chat.ask("And how large is it?")
"""

from __future__ import annotations

from collections.abc import Generator, Iterable
from contextlib import closing
from typing import Literal

import torch

from mmit.chat.answer import Answer, Sampling, answer
from mmit.chat.pictures import Picture, picture_bytes
from mmit.conversation import Conversation, ImageRef, Message
from mmit.errors import ConfigError
from mmit.models.load import ModelSource, load_model
from mmit.models.loaded import LoadedModel

Precision = Literal["auto", "bf16", "fp32"]
Turns = tuple[Message, ...]


class Chat:
    """A model and the conversation so far. One question at a time: an object is not for several threads."""

    def __init__(self, loaded: LoadedModel) -> None:
        self.loaded = loaded
        self._messages: Turns = ()
        self._images: tuple[bytes, ...] = ()

    @classmethod
    def load(cls, directory: ModelSource, *, device: str = "auto", precision: Precision = "auto") -> Chat:
        """A chat with the model in ``directory``: what mmit wrote (a model, a stage or a checkpoint), or a model in any
        of the formats of docs/checkpoints.md; a ``WholeModel`` also names its base, tower and template.

        device: ``auto`` takes an accelerator if there is one. precision: ``auto`` is bf16 there and fp32 on the CPU.
        Raises CheckpointError if the directory holds no such model or is damaged, ConfigError for an unknown device.
        """
        return cls(load_for_chat(directory, device=device, precision=precision))

    @property
    def messages(self) -> Turns:
        """The turns so far, questions and answers."""
        return self._messages

    def ask(
        self,
        text: str,
        images: Iterable[Picture] = (),
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> str:
        """The answer to ``text`` and ``images`` (paths, encoded bytes or Pillow images), given what was said before.

        max_new_tokens: None takes what the context has room for, at most 512. temperature 0 is greedy. Raises
        DataError for a picture that cannot be read, an empty question, or a conversation too long for the model; the
        history is then as it was.
        """
        return "".join(
            self.stream(text, images, max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
        )

    def stream(
        self,
        text: str,
        images: Iterable[Picture] = (),
        *,
        max_new_tokens: int | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        seed: int | None = None,
    ) -> Generator[str, None, None]:
        """The pieces of ``ask``'s answer as they are made; joined they are the same text.

        What is wrong with the question raises here, before the first piece. Closing the iterator stops the model and
        keeps what was said so far; a question that got no word in reply is forgotten.
        """
        sampling = Sampling(max_new_tokens=max_new_tokens, temperature=temperature, top_p=top_p, seed=seed)
        new = tuple(picture_bytes(picture) for picture in images)
        refs = tuple(ImageRef(len(self._images) + place) for place in range(len(new)))
        messages = (*self._messages, Message(role="user", content=(*refs, text) if text else refs))
        everything = self._images + new
        conversation = Conversation(id="chat", messages=messages, images=everything)
        return self._said(answer(self.loaded, conversation, sampling), messages, everything)

    def reset(self) -> None:
        """Forget what was said and shown."""
        self._messages = ()
        self._images = ()

    def _said(self, reply: Answer, messages: Turns, images: tuple[bytes, ...]) -> Generator[str, None, None]:
        pieces: list[str] = []
        try:
            with closing(iter(reply)) as spoken:
                for piece in spoken:
                    pieces.append(piece)
                    yield piece
        finally:
            if pieces or reply.finish_reason:
                said = Message(role="assistant", content=("".join(pieces),))
                self._messages, self._images = (*messages, said), images


def load_for_chat(directory: ModelSource, *, device: str = "auto", precision: Precision = "auto") -> LoadedModel:
    """The model of ``directory`` on its device, ready to answer; see ``Chat.load``."""
    place = _device(device)
    dtypes = {"auto": torch.float32 if place.type == "cpu" else torch.bfloat16, "bf16": torch.bfloat16}
    loaded = load_model(directory, dtype=dtypes.get(precision, torch.float32))
    loaded.model.to(place)
    return loaded


def _device(name: str) -> torch.device:
    if name == "auto":
        found = torch.accelerator.current_accelerator(check_available=True)
        return found if found is not None else torch.device("cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).strip().split("\n")[0]
        raise ConfigError(f"device '{name}' cannot be used ({reason}); choose auto, cpu or cuda") from error
    return device
