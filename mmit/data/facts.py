"""What a sample is about, told without a tokenizer: its task, and how many answers it has.

Read once from all texts of a data set and kept beside the shards.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from mmit.conversation import Conversation, ImageRef
from mmit.data.faults import StorageError
from mmit.data.parallel import run, usable_cores, with_progress
from mmit.data.side_files import Table, TextSet, kept
from mmit.errors import DataError

ROW = np.dtype([("task", "<i4"), ("answers", "<u2")])
CHUNK = 256
NO_TASK = -1


@dataclass(frozen=True, kw_only=True, eq=False)
class Facts:
    """tasks: the names that ``meta.task`` takes. task: which of them each sample has, NO_TASK for none.

    answers: how many answers each sample has; 0 for a sample that cannot be read or has a picture in an answer.
    """

    tasks: tuple[str, ...]
    task: np.ndarray
    answers: np.ndarray


def read_facts(data: TextSet, *, processes: int | None = None, progress: bool = True) -> Facts:
    """The facts of a data set: read where they are kept, gathered where not."""

    def make() -> Table:
        return _gather(data, processes or usable_cores(), progress=progress)

    rows, tasks = kept(data, f"facts 1 {data.fingerprint}", make, dtype=ROW)
    return Facts(tasks=tuple(tasks), task=rows["task"], answers=rows["answers"])


def _gather(data: TextSet, processes: int, *, progress: bool) -> Table:
    def work(start: int) -> tuple[int, list[tuple[str, int]]]:
        return start, [_of(data, number) for number in range(start, min(start + CHUNK, len(data)))]

    rows: Any = np.zeros(len(data), dtype=ROW)
    names: list[str] = [""] * len(data)
    results = run(work, range(0, len(data), CHUNK), processes=processes)
    for start, found in with_progress(
        results, title=f"tasks of {data.name}", total=len(data), count=lambda r: len(r[1]), shown=progress
    ):
        for number, (task, answers) in enumerate(found, start):
            names[number] = task
            rows[number]["answers"] = answers
    tasks = sorted(set(names) - {""})
    code = {"": NO_TASK, **{name: number for number, name in enumerate(tasks)}}
    rows["task"] = [code[name] for name in names]
    return rows, tasks


def _of(data: TextSet, number: int) -> tuple[str, int]:
    try:
        conversation = data.read_text(number)
    except StorageError:
        raise
    except DataError:
        return "", 0
    task = conversation.meta.get("task", "")
    return task if isinstance(task, str) else str(task), count_answers(conversation)


def count_answers(conversation: Conversation) -> int:
    """The answers of a conversation; 0 where one holds a picture, which cannot go to another conversation."""
    answers = [message for message in conversation.messages if message.role == "assistant"]
    has_picture = any(isinstance(part, ImageRef) for message in answers for part in message.content)
    return 0 if has_picture else min(len(answers), np.iinfo(np.uint16).max)
