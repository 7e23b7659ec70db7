"""What a generation hands on: conversations in the form of the reader ``messages``, and the outcome in numbers."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mmit.data.atomic import cannot_write
from mmit.data.faults import BadSample
from mmit.data.generate.journal import Journal, Usage
from mmit.data.generate.prompts import Request

RECORDS = "records.jsonl"


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What is there after a run. All counts but ``usage`` and ``cost`` are of questions in the settings' range.

    done: good answers, from this and earlier runs. rejected: given up after their last answer was rejected too.
    failed: not answered; the next run asks again. left: not asked, since the run ended before (``stopped`` says why).
    bad: annotations that nothing can be asked from. usage, cost: of all answers in the journal.
    """

    records: Path
    done: int
    rejected: int
    failed: int
    left: int
    bad: tuple[BadSample, ...]
    usage: Usage
    cost: float
    stopped: str = ""

    def __str__(self) -> str:
        tokens = f"{self.usage.prompt_tokens} + {self.usage.completion_tokens} tokens in {self.usage.answers} answers"
        parts = [f"{self.done} conversations", f"{self.rejected} rejected", f"{self.failed} failed"]
        parts += [f"{self.left} not asked"] if self.left else []
        parts += [f"{len(self.bad)} bad annotations"] if self.bad else []
        cost = f", cost {self.cost:.4f}" if self.cost else ""
        return f"{self.records}: {', '.join(parts)}; {tokens}{cost}" + (f" ({self.stopped})" if self.stopped else "")


def done_line(request: Request, key: str, turns: list[tuple[str, str]], *, model: str, see: str) -> dict[str, Any]:
    """The journal's line of a good answer, without its usage."""
    return {
        **line(request, key, "done"),
        "image": request.image,
        "turns": turns,
        "wording": request.wording,
        "model": model,
        "seen": see,
        "meta": dict(request.meta),
    }


def line(request: Request, key: str, status: str) -> dict[str, Any]:
    """What every line of the journal begins with."""
    return {"key": key, "kind": request.kind, "id": request.id, "status": status}


def write_records(path: Path, journal: Journal, keys: Iterable[str]) -> int:
    """Write the good answers to the questions ``keys``, in their order, whole or not at all; returns how many."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    count = 0
    try:
        with partial.open("w", encoding="utf-8", errors="backslashreplace") as file:
            for key in keys:
                if journal.is_done(key):
                    file.write(json.dumps(_record(journal.read(key)), ensure_ascii=False) + "\n")
                    count += 1
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise cannot_write(path, error) from None
    return count


def _record(entry: dict[str, Any]) -> dict[str, Any]:
    messages = [
        {"role": role, "content": text}
        for turn in entry["turns"]
        for role, text in zip(("user", "assistant"), turn, strict=True)
    ]
    return {
        **entry["meta"],
        "id": entry["id"],
        "image": entry["image"],
        "messages": messages,
        "task": entry["kind"],
        "wording": entry["wording"],
        "model": entry["model"],
        "seen": entry["seen"],
    }
