"""What an export is tried on: a question about a drawn picture, and one without a picture."""

from __future__ import annotations

import io
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmit.batch import Encoded, collate
from mmit.conversation import Conversation, ImageRef, Message
from mmit.models.loaded import LoadedModel
from mmit.models.prompts import encode_prompt

ANSWER_TOKENS = 8
"""Length of the greedy answers that are compared."""

_QUESTION = "What is in the picture? Name its colours, from the left to the right."
_SIZE = (120, 80)


@dataclass(frozen=True, kw_only=True)
class Probe:
    """A prompt, and what the model makes of it: logits (T, V) and the greedy answer."""

    name: str
    prompt: Encoded
    picture: bytes | None
    logits: Tensor
    answer: list[int]


def picture() -> bytes:
    """A PNG of smooth colours, wider than high, the same on every machine."""
    width, height = _SIZE
    across, down = np.meshgrid(np.linspace(0, 1, width), np.linspace(0, 1, height))
    waves = np.stack([np.sin(5 * across + down), np.cos(3 * down - across), np.sin(4 * across * down + 1)], axis=-1)
    file = io.BytesIO()
    Image.fromarray(np.uint8(127.5 * (waves + 1))).save(file, format="PNG")
    return file.getvalue()


def conversation(name: str, image: bytes | None) -> Conversation:
    """The question, with the picture or without it."""
    parts = (_QUESTION,) if image is None else (ImageRef(0), _QUESTION)
    return Conversation(
        id=name, messages=(Message(role="user", content=parts),), images=() if image is None else (image,)
    )


@torch.no_grad()
def probe(loaded: LoadedModel, *, only_text: bool = False) -> list[Probe]:
    """The model's own logits and answers, which another reader must give too."""
    shown = {"text": None} if only_text else {"text": None, "picture": picture()}
    probes = []
    for name, image in shown.items():
        prompt = encode_prompt(loaded, conversation(name, image))
        batch = collate([[prompt]], pad_id=loaded.pad_id, image_size=loaded.spec.canvas)
        logits = loaded.model.logits(batch)[0]
        answer = loaded.model.generate(prompt, max_new_tokens=ANSWER_TOKENS)
        probes.append(Probe(name=name, prompt=prompt, picture=image, logits=logits, answer=answer))
    return probes
