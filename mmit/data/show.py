"""Look at samples as the model will see them: trained tokens coloured, runs of image tokens folded."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.text import Text
from transformers import PreTrainedTokenizerBase

from mmit.conversation import Conversation
from mmit.data.faults import SampleError
from mmit.data.shard_set import ShardSet, open_source
from mmit.encoding import Style, encode_conversation, show_tokens
from mmit.errors import DataError
from mmit.images import ImageSpec
from mmit.templates import ChatTemplate
from mmit.tokenizer import load_tokenizer, prepare_tokenizer

TRAINED = "bold green"
NOT_TRAINED = "dim"


@dataclass(frozen=True, kw_only=True)
class View:
    """How samples become tokens."""

    tokenizer: PreTrainedTokenizerBase
    template: ChatTemplate
    spec: ImageSpec
    image_id: int
    style: Style = "hf"


def text_view(tokenizer: str, *, template: str = "own", style: Style = "hf", image_tokens: int = 576) -> View:
    """The view of a language model alone, a directory or hub name, for which every picture takes ``image_tokens``.

    576 is CLIP ViT-L/14 at 336 pixels.
    """
    prepared = prepare_tokenizer(load_tokenizer(tokenizer))
    return View(
        tokenizer=prepared.tokenizer,
        template=ChatTemplate.load(template, prepared.tokenizer),
        spec=ImageSpec(
            size=(1, 1), mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), resize="squash", tokens_per_tile=image_tokens
        ),
        image_id=prepared.image_id,
        style=style,
    )


def show(source: str | Path, view: View, *, samples: Sequence[int] = (0,), marks: bool = False) -> Iterator[Text]:
    """Each of ``samples`` of the shards at ``source``, for rich to print: a line of facts, then its tokens.

    samples: numbers from 0. marks: put trained tokens in [[ ]] too, for a screen without colour. Raises DataError for
    a number that is not there and for a sample that cannot be used.
    """
    shards = open_source(source)
    for number in samples:
        if not 0 <= number < len(shards):
            raise DataError(f"{source}: there is no sample {number}; the shards hold 0 to {len(shards) - 1}")
        conversation = _read(shards, number)
        encoded = encode_conversation(
            conversation,
            template=view.template,
            tokenizer=view.tokenizer,
            spec=view.spec,
            image_id=view.image_id,
            style=view.style,
            pixels=False,
        )
        shard, key = shards.place(number)
        sizes = ", ".join(f"{width} x {height}" for width, height in conversation.sizes) or "none"
        text = Text(f"sample {number}: {shard} {key} ({conversation.id}); images: {sizes}; ")
        text.append(f"{encoded.length} tokens, {encoded.trained_tokens} trained\n")
        for piece, is_trained in show_tokens(encoded, view.tokenizer, image_id=view.image_id):
            if marks and is_trained:
                piece = f"[[{piece}]]"  # noqa: PLW2901
            text.append(piece, style=TRAINED if is_trained else NOT_TRAINED)
        yield text


def _read(shards: ShardSet, number: int) -> Conversation:
    try:
        return shards.read_text(number)
    except SampleError as error:
        shard, key = shards.place(number)
        raise DataError(f"{shard}: {key}: {error}") from None
