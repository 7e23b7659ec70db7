"""From a conversation to token ids, labels and pixels: the one way there, for training, planning and chat.

The whole text goes through the tokenizer in one call, and a token is trained if and only if its last character lies in
a trained span: pieces tokenized one by one give other ids than the text the model will see. The one exception keeps a
prompt what it was in training: where a token would reach from a prompt into its answer, the text is cut in two.

Three styles of image places. ``hf``, for models of our own: ``<image>`` is a token of the text, as transformers'
LlavaProcessor has it. ``llava``, for original LLaVA checkpoints: the text between images is tokenized piece by piece,
so that a Llama tokenizer puts a space token after each image. ``blip``, for InstructBLIP: images that open the text
stand before the start token, and the text behind them is tokenized in one piece.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import pairwise
from typing import TYPE_CHECKING, Literal

import numpy as np
import torch
from torch import Tensor

from mmit.batch import IGNORE, Encoded
from mmit.conversation import Conversation
from mmit.errors import ConfigError, DataError
from mmit.images import ImageSpec, read_size
from mmit.instructions import InstructionReader
from mmit.templates import ChatTemplate, Rendered
from mmit.tiling import TilePlan
from mmit.tokenizer import IMAGE_TEXT

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Style = Literal["hf", "llava", "blip"]


def encode(
    rendered: Rendered,
    tokenizer: PreTrainedTokenizerBase,
    image_tokens: Sequence[int],
    *,
    image_id: int,
    style: Style = "hf",
) -> tuple[Tensor, Tensor]:
    """Token ids (T,) int64 and whether each is trained (T,) bool.

    image_tokens: how many ``image_id`` each image becomes, in the order of the text.
    The start token comes once, where the tokenizer's family has one. Raises ConfigError for style ``hf`` if the
    tokenizer has no token ``<image>`` of the id ``image_id``.
    """
    text, leading = _Text.of(rendered), 0
    while style == "blip" and text.text.startswith(IMAGE_TEXT):
        text, leading = text.part(len(IMAGE_TEXT), len(text.text)), leading + 1
    ids, trained = (_between_images if style == "llava" else _whole)(text, tokenizer, image_id)
    if (found := ids.count(image_id) + leading) != len(image_tokens):
        raise ConfigError(
            f"the text has {len(image_tokens)} images but {found} tokens of id {image_id}; "
            f"the tokenizer has no {IMAGE_TEXT} of that id (prepare_tokenizer adds one)"
        )
    start_ids = [] if _begins_with_start(text.text, tokenizer) else list(_habits(tokenizer).start_ids)
    before = [image_id] * leading + start_ids
    tokens = np.array([*before, *ids], dtype=np.int64)
    is_image = tokens == image_id
    copies = np.ones(len(tokens), dtype=np.int64)
    copies[is_image] = image_tokens
    mask = np.array([False] * len(before) + trained, dtype=bool) & ~is_image
    return torch.from_numpy(tokens.repeat(copies)), torch.from_numpy(mask.repeat(copies))


def encode_conversation(
    conversation: Conversation,
    *,
    template: ChatTemplate,
    tokenizer: PreTrainedTokenizerBase,
    spec: ImageSpec,
    image_id: int,
    style: Style = "hf",
    pixels: bool = True,
    features: Callable[..., Tensor] | None = None,
    instructions: InstructionReader | None = None,
) -> Encoded:
    """One sample for the model. ``pixels=False`` decodes nothing: lengths are known from ``conversation.sizes``.

    features: called as ``features(image, images=...)`` with an encoded image and how many its sample has, gives what
    the encoder makes of it, (tiles, P, D_vision); taken in place of its pixels.
    instructions: for a connector that reads them.

    Raises DataError, naming the record, if the images and their places do not match, an image cannot be read, the
    conversation breaks a rule of turns.py, or no token of it would be trained.
    """
    record = conversation.id
    order = [ref.index for ref in conversation.image_refs]
    sizes = _sizes(conversation, spec)
    if sorted(order) != list(range(len(sizes))):
        raise DataError(f"record '{record}' has {len(sizes)} images, but its turns refer to images {order}; each once")
    rendered = template.render(conversation)
    plans = tuple(spec.plan(*sizes[index], images=len(order)) for index in order)
    ids, trained = encode(rendered, tokenizer, [plan.tokens for plan in plans], image_id=image_id, style=style)
    if not trained.any():
        raise DataError(f"record '{record}' has no trained token: no answer in it is to be learned; leave it out")
    labels = torch.full_like(ids, IGNORE)
    labels[:-1] = torch.where(trained[1:], ids[1:], IGNORE)
    tiles = [torch.empty((0, 3, *spec.canvas), dtype=torch.uint8)]
    found: list[Tensor] = []
    if pixels and order:
        if not conversation.images:
            raise DataError(f"record '{record}' came without the bytes of its {len(order)} images")
        taken = tiles if features is None else found
        take = partial(features or spec.prepare, images=len(order))
        taken += [_taken(take, conversation, index, spec, plan) for index, plan in zip(order, plans, strict=True)]
    return Encoded(
        id=record,
        input_ids=ids,
        labels=labels,
        pixels=torch.cat(tiles),
        plans=plans,
        features=torch.cat(found) if found else None,
        instructions=None if instructions is None else instructions.read(conversation, [plan.tiles for plan in plans]),
    )


def show_tokens(encoded: Encoded, tokenizer: PreTrainedTokenizerBase, *, image_id: int) -> list[tuple[str, bool]]:
    """The sample for reading: (text of a token, is it trained), runs of image tokens folded to ``<image> x 576``."""
    ids = encoded.input_ids.tolist()
    trained = [False, *(label != IGNORE for label in encoded.labels.tolist()[:-1])]
    shown: list[tuple[str, bool]] = []
    pending: list[int] = []  # tokens that are no whole character yet
    run = 0
    for position, token in enumerate(ids):
        if token == image_id:
            run += 1
            if position + 1 == len(ids) or ids[position + 1] != image_id:
                shown.append((f"{IMAGE_TEXT} x {run}", False))
                run = 0
            continue
        pending.append(token)
        text = _text_of(pending, tokenizer)
        follows = position + 1 < len(ids) and ids[position + 1] != image_id
        goes_on = follows and trained[position + 1] == trained[position]
        if text.endswith("\ufffd") and goes_on and len(pending) < 4:
            continue
        shown.append((text, trained[position]))
        pending = []
    return shown


@dataclass(frozen=True)
class _Habits:
    """start_ids: what the tokenizer puts in front of a text. swallows_space: it reads " a" as it reads "a".

    swallowing: control tokens that take the white space beside them with them, and their text.
    """

    start_ids: tuple[int, ...]
    swallows_space: bool
    swallowing: Mapping[int, str]


@lru_cache(maxsize=8)
def _habits(tokenizer: PreTrainedTokenizerBase) -> _Habits:
    start = tuple(tokenizer.encode("")[:1])
    letter, spaced = (tokenizer.encode(text, add_special_tokens=False) for text in ("a", " a"))
    added = getattr(tokenizer, "added_tokens_decoder", {})
    swallowing = {token: str(found.content) for token, found in added.items() if found.lstrip or found.rstrip}
    return _Habits(start if start == (tokenizer.bos_token_id,) else (), letter == spaced, swallowing)


def _begins_with_start(text: str, tokenizer: PreTrainedTokenizerBase) -> bool:
    return isinstance(tokenizer.bos_token, str) and text.startswith(tokenizer.bos_token)


@dataclass(frozen=True)
class _Text:
    """A text, and for each character whether it is trained (1) and whether an answer begins there (1)."""

    text: str
    trained: bytes
    begins: bytes

    @classmethod
    def of(cls, rendered: Rendered) -> _Text:
        trained, begins = bytearray(len(rendered.text)), bytearray(len(rendered.text) + 1)
        for start, end in rendered.trained:
            trained[start:end] = b"\1" * (end - start)
        for start in rendered.answers:
            begins[start] = 1
        return cls(rendered.text, bytes(trained), bytes(begins[:-1]))

    def part(self, start: int, end: int) -> _Text:
        return _Text(self.text[start:end], self.trained[start:end], self.begins[start:end])


def _whole(text: _Text, tokenizer: PreTrainedTokenizerBase, _: int) -> tuple[list[int], list[bool]]:
    if not text.text:
        return [], []
    found = tokenizer(text.text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
    ids = found["input_ids"]
    offsets = _without_swallowed_space(text.text, ids, found["offset_mapping"], tokenizer)
    cuts = sorted({text.begins.find(1, start + 1, end) for start, end in offsets} - {-1})
    if cuts and not _habits(tokenizer).swallows_space:
        parts = [_whole(text.part(a, b), tokenizer, 0) for a, b in pairwise([0, *cuts, len(text.text)])]
        return [i for ids, _ in parts for i in ids], [t for _, trained in parts for t in trained]
    marks = text.trained + b"\0"  # a token of no width may stand at the very end
    trained = [marks[end - 1 if end > start else start] == 1 for start, end in offsets]
    if cuts:  # a text cannot be cut where the tokenizer would put a space before the rest; the token is the prompt's
        trained = [t and text.begins.find(1, s + 1, e) < 0 for t, (s, e) in zip(trained, offsets, strict=True)]
    return ids, trained


def _without_swallowed_space(
    text: str, ids: list[int], offsets: list[tuple[int, int]], tokenizer: PreTrainedTokenizerBase
) -> list[tuple[int, int]]:
    """Offsets of control tokens cut down to the token itself.

    Some (Phi-3's) swallow the white space beside them: an end marker followed by a line feed would else seem to end
    behind the answer, and would never be trained.
    """
    swallowing = _habits(tokenizer).swallowing
    if not swallowing:
        return offsets
    exact = list(offsets)
    for position, token in enumerate(ids):
        if content := swallowing.get(token):
            start, end = offsets[position]
            first = start + max(0, text[start:end].find(content))
            exact[position] = (first, min(end, first + len(content)))
    return exact


def _between_images(text: _Text, tokenizer: PreTrainedTokenizerBase, image_id: int) -> tuple[list[int], list[bool]]:
    ids: list[int] = []
    trained: list[bool] = []
    start = 0
    for number, chunk in enumerate(text.text.split(IMAGE_TEXT)):
        if number:
            ids.append(image_id)
            trained.append(False)
        part = text.part(start, start + len(chunk))
        start += len(chunk) + len(IMAGE_TEXT)
        if chunk.startswith(" ") and _habits(tokenizer).swallows_space:
            # The reference always puts its space in front; transformers 5 leaves it out before a text with one.
            part = _Text(" " + chunk, part.trained[:1] + part.trained, b"\0" + part.begins)
        more_ids, more_trained = _whole(part, tokenizer, image_id)
        ids += more_ids
        trained += more_trained
    return ids, trained


def _sizes(conversation: Conversation, spec: ImageSpec) -> Sequence[tuple[int, int]]:
    if conversation.sizes or not conversation.images:
        return conversation.sizes
    try:
        return [read_size(data, max_pixels=spec.max_pixels) for data in conversation.images]
    except DataError as error:
        raise DataError(f"record '{conversation.id}': {error}") from error


def _taken(
    take: Callable[[bytes], Tensor], conversation: Conversation, index: int, spec: ImageSpec, plan: TilePlan
) -> Tensor:
    """The tiles of an image, or their features, as many as its plan says."""
    data = conversation.images[index]
    try:
        if spec.tiling is not None:
            size = read_size(data, max_pixels=spec.max_pixels)
            if spec.plan(*size, images=len(conversation.image_refs)) != plan:
                raise DataError(f"its size is {size[0]} x {size[1]}, not the one that the record states")
        tiles = take(data)
        if len(tiles) != plan.tiles:
            raise DataError(f"it has features of {len(tiles)} tiles and should have {plan.tiles}")
        return tiles
    except DataError as error:
        # its kind decides what becomes of the run
        error.args = (f"record '{conversation.id}', image {index}: {error}",)
        raise


def _text_of(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> str:
    """The text of tokens in the middle of a text: a space in front is kept, control tokens are shown."""
    anchor = tokenizer.encode("a", add_special_tokens=False)
    whole = tokenizer.decode([*anchor, *ids], skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert isinstance(whole, str)
    return whole.removeprefix("a")
