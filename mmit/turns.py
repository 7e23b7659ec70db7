"""The turns of a conversation that a chat template gets to see.

The rules for odd conversations, the same for every template:

- a system message may stand first, and nowhere else;
- assistant turns before the first user turn are left out (as LLaVA does) and counted in ``Rendered.dropped_turns``;
- user and assistant take turns after that; two of one role in a row are a DataError;
- a last user turn without an answer stays and is not trained;
- an empty answer trains its end-of-turn token alone;
- ``Message.train`` False takes an answer out of training; True on another role is a DataError;
- a control token of the tokenizer, or ``<image>``, written out in a message is a DataError: data cannot steer;
- pictures that open a message are followed by a line feed if its text does not begin with white space.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import pairwise

from msgspec import structs

from mmit.conversation import Conversation, ImageRef, Message, Part
from mmit.errors import DataError
from mmit.tokenizer import IMAGE_TEXT

Turn = tuple[int, Message]
"""A message with its number in the record, for error messages."""


def turns_to_render(conversation: Conversation) -> tuple[list[Turn], int]:
    """The turns to render, and how many leading answers were left out. Raises DataError by the rules above."""
    record = conversation.id
    numbered = list(enumerate(conversation.messages))
    system = numbered[:1] if numbered and numbered[0][1].role == "system" else []
    rest = numbered[len(system) :]
    first_user = next((k for k, (_, turn) in enumerate(rest) if turn.role == "user"), len(rest))
    dropped, turns = rest[:first_user], rest[first_user:]
    if not turns:
        raise DataError(f"record '{record}' has no user turn; a conversation needs at least one")
    for number, turn in (*dropped, *turns):
        if turn.role == "system":
            raise DataError(f"record '{record}', turn {number}: a system message may only stand first; move it there")
    for number, turn in dropped:
        if any(isinstance(part, ImageRef) for part in turn.content):
            raise DataError(
                f"record '{record}', turn {number}: an image stands before the first user turn; move it to a user turn"
            )
    for (_, before), (number, turn) in pairwise(turns):
        if turn.role == before.role:
            raise DataError(f"record '{record}': turns {number - 1} and {number} are both {turn.role}'s; merge them")
    for number, turn in (*system, *turns):
        if turn.train and turn.role != "assistant":
            raise DataError(
                f"record '{record}', turn {number}: train is set on a {turn.role} turn; only answers are trained"
            )
    return [*system, *turns], len(dropped)


def question_of(conversation: Conversation) -> tuple[Conversation, str]:
    """The conversation up to its first question, and the answer that follows. Raises DataError where there is none."""
    turns = conversation.messages
    for number, turn in enumerate(turns):
        if turn.role == "assistant":
            shown = turns[:number]
            used = [ref.index for ref in structs.replace(conversation, messages=shown).image_refs]
            if used != list(range(len(used))):
                break
            kept = slice(0, len(used))
            asked = structs.replace(
                conversation, messages=shown, images=conversation.images[kept], sizes=conversation.sizes[kept]
            )
            return asked, turn.text
    raise DataError(f"record '{conversation.id}' has no question with an answer; it cannot be scored")


def refuse_control_tokens(turns: Iterable[Turn], control: Iterable[str], record: str) -> None:
    """Raise DataError if a message writes out a text that the tokenizer would turn into a control token."""
    for number, turn in turns:
        text = as_text(turn.content, image="\0")  # joined as the template joins it; an image ends a run of text
        for token in control:
            if token in text:
                raise DataError(
                    f"record '{record}', turn {number}: the text holds the control token {token}, which would steer "
                    "the model instead of being read; remove or rewrite it in the data"
                )


def as_text(content: Sequence[Part], *, image: str = IMAGE_TEXT) -> str:
    """A content as one string; the rule of the line feed is that of ``chat_templates/_content.jinja``."""
    written, seen_image, seen_text = "", False, False
    for part in content:
        if isinstance(part, ImageRef):
            written, seen_image = written + image, True
        elif part:
            if seen_image and not seen_text and part[0] not in " \t\r\n":
                written += "\n"
            written, seen_text = written + part, True
    return written
