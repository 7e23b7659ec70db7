"""Chat in the terminal: one question for a script, or a conversation that streams.

Only answers, and in a conversation the replies to commands, go to standard output; errors and hints go to standard
error.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import closing, suppress
from dataclasses import dataclass
from pathlib import Path

from mmit.chat.chat import Chat, Precision
from mmit.chat.pictures import picture_bytes
from mmit.errors import MmitError
from mmit.models.load import ModelSource

HELP = """\
/image PATH  show a picture with the next question; again for more pictures
/reset       forget the conversation
/help        this list
/quit        leave; so does Ctrl-D. Ctrl-C stops an answer"""


@dataclass(frozen=True, kw_only=True)
class Style:
    """How answers are made in the terminal; the fields are those of ``Chat.ask``."""

    max_new_tokens: int | None = None
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int | None = None


def run_chat(
    directory: ModelSource,
    images: Sequence[Path] = (),
    prompt: str | None = None,
    *,
    style: Style,
    device: str = "auto",
    precision: Precision = "auto",
) -> None:
    """Talk to the model in ``directory``: the answer to ``prompt`` alone, or a conversation until the user leaves.

    prompt: ``-`` reads it from standard input. Raises DataError for a picture that cannot be read (before the model
    is loaded), CheckpointError for a directory without a model.
    """
    shown = [picture_bytes(path) for path in images]
    if prompt == "-":
        prompt = sys.stdin.read().strip()
    chat = Chat.load(directory, device=device, precision=precision)
    if prompt is not None:
        _say(chat, prompt, shown, style)
    else:
        _Conversation(chat, shown, style).run()


def _say(chat: Chat, question: str, images: Sequence[bytes], style: Style) -> None:
    """Write the answer as it is made, and end its line."""
    pieces = chat.stream(
        question,
        images,
        max_new_tokens=style.max_new_tokens,
        temperature=style.temperature,
        top_p=style.top_p,
        seed=style.seed,
    )
    with closing(pieces):
        for piece in pieces:
            _write(piece)
    _write("\n")


class _Conversation:
    """Reads lines until the end; pictures wait here until a question has been answered with them."""

    def __init__(self, chat: Chat, images: list[bytes], style: Style) -> None:
        self.chat = chat
        self.waiting = images
        self.style = style

    def run(self) -> None:
        with suppress(ImportError):
            import readline  # noqa: F401  (line editing and history come with the import, where there is one)
        if sys.stdin.isatty():
            _hint("ask, or /help")
        while (line := _read_line()) is not None:
            command, _, rest = line.partition(" ")
            if command == "/quit":
                break
            try:
                if command.startswith("/"):
                    self.obey(command, rest.strip())
                elif line:
                    self.answer(line)
            except MmitError as error:
                _hint(f"error: {error}")

    def obey(self, command: str, rest: str) -> None:
        if command == "/image":
            self.waiting.append(picture_bytes(rest.strip("'\"")))
            _write(f"{len(self.waiting)} picture{'s' * (len(self.waiting) > 1)} for the next question\n")
        elif command == "/reset":
            self.chat.reset()
            self.waiting.clear()
            _write("forgotten\n")
        elif command == "/help":
            _write(f"{HELP}\n")
        else:
            _hint(f"error: there is no command {command}; /help lists them")

    def answer(self, question: str) -> None:
        before = len(self.chat.messages)
        try:
            _say(self.chat, question, self.waiting, self.style)
        except KeyboardInterrupt:
            _write("\n")
            _hint("(stopped)")
        if len(self.chat.messages) > before:
            self.waiting.clear()


def _read_line() -> str | None:
    """The next line, stripped; None at the end of the input. Ctrl-C drops the line being typed."""
    prompt = "> " if sys.stdin.isatty() else ""
    while True:
        try:
            return input(prompt).strip()
        except KeyboardInterrupt:
            _write("\n")
        except EOFError:
            if prompt:
                _write("\n")
            return None


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _hint(text: str) -> None:
    sys.stderr.write(f"{text}\n")
    sys.stderr.flush()
