"""The loss of reference answers with the true picture, a blank one, and another sample's: does the model look?"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from mmit.batch import collate
from mmit.conversation import Conversation
from mmit.encoding import encode_conversation
from mmit.evaluate.pictures import Pictures, with_pictures
from mmit.models import LoadedModel
from mmit.templates import ChatTemplate


def answer_loss(
    loaded: LoadedModel,
    conversations: Sequence[Conversation],
    pictures: Pictures,
    *,
    template: ChatTemplate | None = None,
    batch_size: int = 32,
) -> float:
    """Mean of -log p over the trained tokens of ``conversations``, in nats; all tokens count the same.

    template: of a stage, where it is not the model's own. Raises DataError.
    """
    device = next(loaded.model.parameters()).device
    total, tokens = 0.0, 0
    changed = with_pictures(conversations, pictures)
    for start in range(0, len(changed), batch_size):
        rows = [
            [
                encode_conversation(
                    conversation,
                    template=template or loaded.template,
                    tokenizer=loaded.tokenizer,
                    spec=loaded.model.spec,
                    image_id=loaded.image_id,
                    style=loaded.style,
                    instructions=loaded.instructions,
                )
            ]
            for conversation in changed[start : start + batch_size]
        ]
        batch = collate(rows, pad_id=loaded.pad_id, image_size=loaded.model.spec.canvas)
        with torch.no_grad():
            total += float(loaded.model(batch.to(device)))
        tokens += batch.trained_tokens
    return total / tokens
