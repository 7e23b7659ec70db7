"""From token ids, one at a time, to pieces of text that are never taken back.

A character may be spread over several tokens, a stop string too: what may still change is held until it is certain.
The pieces joined are the answer; nobody computes it another way.
"""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

_UNFINISHED = "\ufffd"


class TextStream:
    """The text of an answer as it grows, without white space around it and without what follows a stop string.

    ``is_stopped`` turns True when one of ``stop`` appears; it and everything after it are not part of the answer.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stop: Sequence[str] = ()) -> None:
        self.is_stopped = False
        self._characters = _Characters(tokenizer)
        self._stop = tuple(stop)
        self._held = ""
        self._begun = False

    def push(self, token: int) -> str:
        """The text that this token makes certain; often empty."""
        return self._release(self._characters.push(token), last=False)

    def finish(self) -> str:
        """The rest, once no token will follow; the bytes of an unfinished character appear as U+FFFD."""
        return self._release(self._characters.finish(), last=True)

    def _release(self, text: str, *, last: bool) -> str:
        if self.is_stopped:
            return ""
        text = self._held + text
        found = [place for stop in self._stop if (place := text.find(stop)) >= 0]
        if found:
            self.is_stopped = True
            text = text[: min(found)]
        certain = len(text) if last or found else len(text) - self._start_of_stop(text)
        piece = text[:certain].rstrip()
        self._held = text[len(piece) :]
        if not self._begun:
            piece = piece.lstrip()
            self._begun = bool(piece)
        return piece

    def _start_of_stop(self, text: str) -> int:
        """Characters at the end of ``text`` that may be the beginning of a stop string."""
        return max(
            (size for stop in self._stop for size in range(1, len(stop)) if text.endswith(stop[:size])), default=0
        )


class _Characters:
    """Ids to text, whole characters only.

    A token has no text of its own: the bytes of a character may be spread over several, and decoders drop the space in
    front of the first. So ids are decoded together until they end with a character, always behind the same letter.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tokenizer = tokenizer
        self._letter: list[int] = tokenizer.encode("a", add_special_tokens=False)
        self._letter_size = len(self._decode(self._letter))
        self._open: list[int] = []  # ids whose text is not out yet

    def push(self, token: int) -> str:
        self._open.append(token)
        text = self._text()
        if not text or text.endswith(_UNFINISHED):
            return ""
        self._open = []
        return text

    def finish(self) -> str:
        return self._text()

    def _text(self) -> str:
        return self._decode(self._letter + self._open)[self._letter_size :]

    def _decode(self, ids: list[int]) -> str:
        text = self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        assert isinstance(text, str), "one sequence decodes to one string"
        return text
