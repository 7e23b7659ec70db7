"""From a conversation to what a model reads before it answers, by the code that training uses."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

import torch

from mmit.batch import IGNORE, Encoded
from mmit.conversation import Conversation, ImageRef
from mmit.encoding import encode
from mmit.errors import DataError
from mmit.images import read_size
from mmit.models.loaded import LoadedModel
from mmit.templates import ChatTemplate

T = TypeVar("T")


def read_prompt(loaded: LoadedModel, conversation: Conversation, *, template: ChatTemplate | None = None) -> Encoded:
    """A conversation up to where its next answer begins, its pictures not decoded yet: no tiles.

    The ids are a prefix of those it would be trained with. template: of a stage, where it is not the model's own.
    Raises DataError.
    """
    spec, refs = loaded.model.spec, conversation.image_refs
    plans = tuple(
        spec.plan(
            *_named(ref, lambda data: read_size(data, max_pixels=spec.max_pixels), conversation), images=len(refs)
        )
        for ref in refs
    )
    rendered = (template or loaded.template).render(conversation, reply=True)
    sizes = [plan.tokens for plan in plans]
    ids, _ = encode(rendered, loaded.tokenizer, sizes, image_id=loaded.image_id, style=loaded.style)
    none = torch.empty((0, 3, *spec.canvas), dtype=torch.uint8)
    reader = loaded.instructions
    return Encoded(
        id=conversation.id,
        input_ids=ids,
        labels=torch.full_like(ids, IGNORE),
        pixels=none,
        plans=plans,
        instructions=None if reader is None else reader.read(conversation, [plan.tiles for plan in plans]),
    )


def with_pictures(prompt: Encoded, loaded: LoadedModel, conversation: Conversation) -> Encoded:
    """The prompt of ``read_prompt`` with the tiles of its pictures, ready for the model. Raises DataError."""
    spec, refs = loaded.model.spec, conversation.image_refs
    tiles = [_named(ref, lambda data: spec.prepare(data, images=len(refs)), conversation) for ref in refs]
    return replace(prompt, pixels=torch.cat([prompt.pixels, *tiles]))


def encode_prompt(loaded: LoadedModel, conversation: Conversation, *, template: ChatTemplate | None = None) -> Encoded:
    """A conversation up to where its next answer begins, ready for the model. Raises DataError."""
    return with_pictures(read_prompt(loaded, conversation, template=template), loaded, conversation)


def _named(ref: ImageRef, read: Callable[[bytes], T], conversation: Conversation) -> T:
    """``read`` of an image's bytes; a DataError says which of the conversation's images it is."""
    try:
        return read(conversation.images[ref.index])
    except DataError as error:
        raise DataError(f"image {ref.index + 1} of {len(conversation.images)}: {error}") from error
