"""From a conversation to what the model reads before it answers, by the code that training uses."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor

from mmit.conversation import Conversation, ImageRef
from mmit.encoding import encode
from mmit.errors import DataError
from mmit.images import read_size
from mmit.models.loaded import LoadedModel

T = TypeVar("T")


def check_turns(conversation: Conversation) -> None:
    """Raise DataError unless the turns are an optional system message, then user and assistant in turn, user last,
    and nothing the user says is empty."""
    turns = conversation.messages
    try:
        "".join(turn.text for turn in turns).encode()
    except UnicodeEncodeError:
        raise DataError("a message holds half of a surrogate pair, which is no character") from None
    start = 1 if turns and turns[0].role == "system" else 0
    for number, turn in enumerate(turns[start:]):
        wanted = ("user", "assistant")[number % 2]
        if turn.role != wanted:
            raise DataError(
                f"message {start + number + 1} is the {turn.role}'s where the {wanted}'s was expected: after an "
                "optional system message, user and assistant take turns"
            )
        if wanted == "user" and not any(not isinstance(part, str) or part.strip() for part in turn.content):
            raise DataError(f"message {start + number + 1} asks nothing: give a text or an image")
    if len(turns) == start or turns[-1].role != "user":
        raise DataError("the last message must be the user's: there is nothing to answer")


def prompt_ids(loaded: LoadedModel, conversation: Conversation) -> Tensor:
    """Ids (T,) of a conversation up to where its next answer begins: a prefix of those it would be trained with."""
    spec = loaded.model.spec
    plans = [
        spec.plan(*_named(ref, lambda data: read_size(data, max_pixels=spec.max_pixels), conversation))
        for ref in conversation.image_refs
    ]
    rendered = loaded.template.render(conversation, reply=True)
    sizes = [plan.tokens for plan in plans]
    return encode(rendered, loaded.tokenizer, sizes, image_id=loaded.image_id, style=loaded.style)[0]


def prompt_tiles(loaded: LoadedModel, conversation: Conversation) -> Tensor:
    """All pictures of a conversation as the encoder takes them: (N, 3, H, W) uint8."""
    spec = loaded.model.spec
    none = torch.empty((0, 3, *spec.canvas), dtype=torch.uint8)
    return torch.cat([none, *(_named(ref, spec.prepare, conversation) for ref in conversation.image_refs)])


def _named(ref: ImageRef, read: Callable[[bytes], T], conversation: Conversation) -> T:
    """``read`` of an image's bytes; a DataError says which of the conversation's images it is."""
    try:
        return read(conversation.images[ref.index])
    except DataError as error:
        raise DataError(f"image {ref.index + 1} of {len(conversation.images)}: {error}") from error
