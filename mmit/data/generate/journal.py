"""The journal of a generation: one line for every answer that came, appended and never changed.

A line is ``{"key", "kind", "id", "status": "done" | "rejected" | "failed", ...}``. A line counts when its line break is
on disk; half a line, left by a run that was killed, is cut away when the journal is opened again.
"""

from __future__ import annotations

import fcntl
import json
import os
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from mmit.data.atomic import cannot_write
from mmit.errors import DataError

JOURNAL = "journal.jsonl"


@dataclass
class Usage:
    """Tokens and answers so far, over all runs on a journal."""

    answers: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0


class Journal:
    """What has been answered, by key; one process at a time."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / JOURNAL
        self.usage = Usage()
        self._done: dict[str, int] = {}  # key -> where its line starts
        self._rejected: dict[str, int] = {}  # key -> how often
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        except OSError as error:
            raise cannot_write(self.path, error) from None
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            self._end = self._replay()
        except BlockingIOError:
            os.close(self._file)
            raise DataError(f"{self.path}: another process is generating into it; wait for it to end") from None
        except BaseException:
            os.close(self._file)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._file)

    def is_done(self, key: str) -> bool:
        """True where a good answer is there."""
        return key in self._done

    def rejections(self, key: str) -> int:
        """How many answers to a question were rejected."""
        return self._rejected.get(key, 0)

    def append(self, entry: dict[str, Any]) -> None:
        """Write one line, through to the disk. Raises DataError where that is full."""
        line = json.dumps(entry, ensure_ascii=False).encode("utf-8", "backslashreplace") + b"\n"
        try:
            left = line
            while left:
                left = left[os.write(self._file, left) :]
            os.fsync(self._file)
        except OSError as error:
            os.ftruncate(self._file, self._end)
            raise cannot_write(self.path, error) from None
        self._count(entry, self._end)
        self._end += len(line)

    def read(self, key: str) -> dict[str, Any]:
        """The line of a good answer."""
        with self.path.open("rb") as file:
            file.seek(self._done[key])
            return json.loads(file.readline())

    def _replay(self) -> int:
        """Count what is there; returns where the next line starts."""
        end = 0
        with self.path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.endswith(b"\n"):
                    break
                try:
                    self._count(json.loads(line), end)
                except (ValueError, KeyError, TypeError, AttributeError):
                    raise DataError(
                        f"{self.path}:{number}: is no line of a journal; remove that line to ask again what it held"
                    ) from None
                end += len(line)
        os.ftruncate(self._file, end)
        return end

    def _count(self, entry: dict[str, Any], start: int) -> None:
        key = str(entry["key"])
        if entry["status"] == "done":
            self._done[key] = start
        elif entry["status"] == "rejected":
            self._rejected[key] = self.rejections(key) + 1
        usage = entry.get("usage")
        if usage is not None:
            self.usage.answers += 1
            self.usage.prompt_tokens += usage["prompt_tokens"]
            self.usage.completion_tokens += usage["completion_tokens"]
