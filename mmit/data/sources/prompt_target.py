"""MULTIINSTRUCT's form: ``{"unique_id", "image_path", "region": [...], "prompt", "target"}``, one task instance each.

Options stand behind the prompt as ``[Options]: a||||b``, in an order that is kept. Boxes are "x1 y1 x2 y2" in pixels
of the picture, in records with a ``region``; ``Reader`` writes them as the recipe wants them.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from mmit.conversation import ImageRef, Message
from mmit.data import forms, rows
from mmit.data.faults import SampleError
from mmit.data.sources import filters

_OPTIONS = re.compile(r"\s*\[Options\]:\s*(.*)\s*\Z", re.DOTALL)
_SEPARATOR = "||||"


@dataclass(frozen=True, kw_only=True)
class PromptTargetOptions:
    """options_as: choices on a line each after the word Options, or as they are published.

    only, skip_with: see ``filters.refuse``.
    """

    options_as: Literal["lines", "published"] = "lines"
    only: Mapping[str, tuple[str | int | bool | None, ...]] = field(default_factory=dict)
    skip_with: tuple[str, ...] = ()


def open_prompt_target(source: Path, options: PromptTargetOptions, _root: Path) -> tuple[rows.Rows, forms.Parse]:
    """One question for every record of a JSON or JSONL file. Raises DataError."""

    def parse(record: Mapping[str, Any]) -> forms.Record:
        filters.refuse(record, only=options.only, skip_with=options.skip_with)
        prompt, target, image = (_text(record, name) for name in ("prompt", "target", "image_path"))
        if options.options_as == "lines":
            prompt, target = _lines(prompt), ", ".join(part.strip() for part in target.split(_SEPARATOR))
        turns = [
            Message(role="user", content=(ImageRef(0), prompt.strip())),
            Message(role="assistant", content=(target.strip(),)),
        ]
        meta = {"id": record.get("unique_id", ""), "task_name": record.get("task_name", "")}
        if not record.get("region"):
            meta["boxes"] = "none"  # four numbers in a row are a box only where the record has one
        return forms.Record(messages=forms.checked_turns(turns), images=(image.removeprefix("./"),), meta=meta)

    return rows.open_json(source), parse


def _lines(prompt: str) -> str:
    found = _OPTIONS.search(prompt)
    if found is None:
        return prompt.replace(_SEPARATOR, ", ")
    options = [option.strip() for option in found[1].split(_SEPARATOR)]
    opening = prompt[: found.start()].replace(_SEPARATOR, ", ").strip()
    return f"{opening}\nOptions:\n" + "\n".join(options)


def _text(record: Mapping[str, Any], name: str) -> str:
    value = record.get(name)
    if not isinstance(value, str):
        raise SampleError(f"'{name}' is no text; the record has {', '.join(record)}")
    return value
