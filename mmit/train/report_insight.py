"""What looked on while a stage trained, for its page: answers with their pictures, memory by part, spikes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from html import escape
from pathlib import Path
from typing import Any

from mmit.data.page import picture, table
from mmit.train.run_files import ON_DISK, ON_HOST, StageFiles

SHOWN_TIMES = 4
"""Answers to each question on the page: the first, the last, and some between."""
SHOWN_SPIKES = 20


def last_answers(stage: StageFiles) -> dict[str, str]:
    """The id of each question with the last answer to it."""
    return {str(line.get("id")): str(line.get("answer")) for line in stage.answers}


def answers(stage: StageFiles) -> Iterator[str]:
    """A card for each question: pictures, the sample's own answer, and how the model's changed."""
    by_id: dict[str, list[dict[str, Any]]] = {}
    for line in stage.answers:
        by_id.setdefault(str(line.get("id")), []).append(line)
    if by_id:
        yield "<h3>Answers to held-out questions</h3>"
    for name, lines in by_id.items():
        first = lines[0]
        shown = "".join(_picture(stage.folder, file) for file in _list(first.get("pictures")))
        turns = [("user", shown + escape(str(first.get("question"))), "question")]
        turns.append(("user", escape(str(first.get("reference"))), "reference"))
        turns += [("assistant", escape(str(line.get("answer"))), f"step {line['step']}") for line in _spread(lines)]
        told = "".join(f'<div class="turn {role}"><b>{what}:</b> {text}</div>' for role, text, what in turns)
        yield f'<div class="card"><h3>{escape(str(first.get("source")))}: {escape(name)}</h3>{told}</div>\n'


def memory(stage: StageFiles) -> dict[str, dict[str, float]]:
    """What -> part -> GiB of rank 0, with the rest of its peak under ``rest``; empty where it is not known."""
    held = stage.device.get("held")
    peak = max((line["memory_bytes"] for line in stage.steps if isinstance(line.get("memory_bytes"), int)), default=0)
    if not isinstance(held, dict) or not peak:
        return {}
    found = {
        str(what): {str(part): count / 2**30 for part, count in parts.items()}
        for what, parts in held.items()
        if isinstance(parts, dict)
    }
    on_device = sum(sum(parts.values()) for what, parts in found.items() if not what.endswith((ON_HOST, ON_DISK)))
    return found | {"rest: activations, batches, buckets, libraries": {"": peak / 2**30 - on_device}}


def memory_table(stage: StageFiles) -> Iterator[str]:
    """What fills the memory of rank 0."""
    found = memory(stage)
    if not found:
        return
    parts = list(dict.fromkeys(part for kind in found.values() for part in kind if part))
    rows = [(what, *(_gib(of.get(part)) for part in parts), _gib(sum(of.values()))) for what, of in found.items()]
    yield "<h3>Memory of rank 0 at its peak, GiB</h3>" + table(("", *parts, "in all"), rows)


def spikes(stage: StageFiles) -> Iterator[str]:
    """The steps whose loss jumped."""
    found = [line for line in stage.steps if line.get("spike")]
    if found:
        done = {"skip": "update left out", "warn": "told"}
        rows = [
            (str(line["step"]), f"{line.get('loss'):.4g}", done.get(line["spike"], str(line["spike"])))
            for line in found[:SHOWN_SPIKES]
        ]
        yield f"<h3>Spikes of the loss ({len(found)})</h3>" + table(("step", "loss", ""), rows)


def _spread(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    last = len(lines) - 1
    chosen = sorted({round(last * turn / (SHOWN_TIMES - 1)) for turn in range(SHOWN_TIMES)})
    return [lines[number] for number in chosen]


def _picture(folder: Path, name: object) -> str:
    path = folder / str(name)
    try:
        if not path.resolve().is_relative_to(folder.resolve()):
            return ""
        return picture(path.read_bytes())
    except OSError as error:
        return f'<span class="error">[{escape(str(name))}: {escape(str(error.strerror))}]</span>'


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _gib(value: float | None) -> str:
    return "" if value is None else f"{value:,.3f}"


def mean_mfu(stage: StageFiles) -> Mapping[str, float]:
    """Share of what the devices reach, over all steps that tell it: their operations over their seconds."""
    lines = [line for line in stage.steps if isinstance(line.get("mfu"), float) and line.get("seconds")]
    seconds = sum(line["seconds"] for line in lines)
    return {"MFU": sum(line["mfu"] * line["seconds"] for line in lines) / seconds} if seconds else {}
