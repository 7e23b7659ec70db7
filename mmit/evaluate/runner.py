"""``mmit eval``: exact match of a model on held-out shards, with the true picture and without."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.progress import track
from rich.table import Table

from mmit.chat.chat import load_for_chat
from mmit.conversation import Conversation
from mmit.data import open_source
from mmit.errors import ConfigError
from mmit.evaluate.accuracy import Asked, ask_all, by_type
from mmit.evaluate.pictures import PICTURES, Pictures, with_pictures
from mmit.models.load import ModelSource


@dataclass(frozen=True)
class Scores:
    """Share of right answers by question type, for each kind of picture, and every single answer."""

    by_pictures: dict[Pictures, dict[str, float]]
    asked: dict[Pictures, list[Asked]]

    def table(self, title: str) -> Table:
        """Question types as rows, kinds of picture as columns, for rich to print."""
        table = Table("question type", title=title)
        for pictures in self.by_pictures:
            table.add_column(f"{pictures} picture", justify="right")
        for kind in next(iter(self.by_pictures.values())):
            table.add_row(kind, *(f"{scores[kind]:.1%}" for scores in self.by_pictures.values()))
        return table

    def write(self, path: Path) -> None:
        """All of it as JSON. Raises ConfigError."""
        content = {
            pictures: {"exact_match": self.by_pictures[pictures], "answers": [asdict(one) for one in asked]}
            for pictures, asked in self.asked.items()
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(content, indent=1), encoding="utf-8")
        except OSError as error:
            raise ConfigError(f"--out {path}: cannot be written: {error.strerror}") from None


def evaluate(
    directory: ModelSource,
    shards: str,
    *,
    pictures: Sequence[str] = ("true",),
    limit: int | None = None,
    max_new_tokens: int = 16,
    progress: bool = True,
) -> Scores:
    """Exact match of the model in ``directory`` on the first questions of ``shards``.

    limit: the first so many samples only. Raises CheckpointError, DataError and ConfigError.
    """
    if unknown := [name for name in pictures if name not in PICTURES]:
        raise ConfigError(f"--pictures {unknown[0]}: take {', '.join(PICTURES)}")
    conversations = conversations_of(shards, limit)
    loaded = load_for_chat(directory)
    asked: dict[Pictures, list[Asked]] = {}
    for kind in (name for name in PICTURES if name in pictures):
        changed = with_pictures(conversations, kind)
        batches = [changed[start : start + 32] for start in range(0, len(conversations), 32)]
        shown = track(batches, description=f"{kind} pictures", disable=not progress, transient=True)
        asked[kind] = [one for batch in shown for one in ask_all(loaded, batch, max_new_tokens=max_new_tokens)]
    return Scores({kind: by_type(found) for kind, found in asked.items()}, asked)


def conversations_of(shards: str, limit: int | None = None) -> list[Conversation]:
    """The samples of ``shards`` with their pictures, the first ``limit`` of them. Raises DataError."""
    source = open_source(shards)
    return [source.read(number) for number in range(min(len(source), limit or len(source)))]
