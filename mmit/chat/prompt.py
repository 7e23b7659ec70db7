"""Which conversations can be answered."""

from __future__ import annotations

from mmit.conversation import Conversation
from mmit.errors import DataError


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
