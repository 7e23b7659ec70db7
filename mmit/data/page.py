"""HTML pages that stand alone: no script, no link, pictures inside, and every word of the data escaped."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

from PIL import Image

from mmit.conversation import Conversation, ImageRef
from mmit.data.findings import Diagnosis, Prediction, Report, bars
from mmit.data.shard_set import one_shard
from mmit.errors import DataError
from mmit.images import ImageSpec, read_size

LONGEST = 240
"""Pixels of the longer side of a picture on the page."""

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem auto; max-width: 70rem; padding: 0 1rem; color: #222; }
table { border-collapse: collapse; } td, th { padding: .2rem .8rem .2rem 0; text-align: left; vertical-align: top; }
td.number { text-align: right; font-variant-numeric: tabular-nums; }
.card { border: 1px solid #ccc; border-radius: 6px; padding: .6rem .9rem; margin: .8rem 0; }
.card h3 { font-size: .85rem; font-weight: normal; color: #666; margin: 0 0 .4rem; overflow-wrap: anywhere; }
.turn { margin: .3rem 0; white-space: pre-wrap; overflow-wrap: anywhere; } .turn b { color: #666; font-weight: 600; }
.assistant { background: #eef6ee; } .error { color: #b00020; } .warning { color: #9a5b00; } .note { color: #666; }
img { vertical-align: middle; margin: 2px; border: 1px solid #ddd; }
"""


def page(title: str, body: Iterable[str]) -> str:
    """A whole page; ``title`` is escaped here, ``body`` is HTML already."""
    # the policy is a second lock: even if some text were not escaped, nothing would be loaded or run
    policy = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        f'<meta name="viewport" content="width=device-width"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head><body><h1>{escape(title)}</h1>\n{''.join(body)}\n</body></html>\n"
    )


def card(heading: str, conversation: Conversation) -> str:
    """A sample: its pictures where they stand, its turns."""
    turns = []
    for message in conversation.messages:
        parts = [
            picture(conversation.images[part.index]) if isinstance(part, ImageRef) else escape(part)
            for part in message.content
        ]
        trained = "" if message.is_trained or message.role != "assistant" else " (not trained)"
        turns.append(f'<div class="turn {message.role}"><b>{message.role}{trained}:</b> {"".join(parts)}</div>')
    return f'<div class="card"><h3>{escape(heading)}</h3>{"".join(turns)}</div>\n'


def diagnosis_page(title: str, diagnosis: Diagnosis) -> str:
    """What a check found, with sample pictures."""
    body = [_report(report) for report in diagnosis.reports]
    body += [_prediction(prediction) for prediction in diagnosis.predictions]
    return page(title, body)


def _report(report: Report) -> str:
    parts = [f"<h2>{escape(report.headline())}</h2>"]
    if not report.faults:
        parts.append("<p>Nothing was found.</p>")
    for severity, kind in report.kinds():
        parts.append(
            f'<h3 class="{severity}">{severity}: {escape(kind)} ({report.faults[kind]})</h3><ul>'
            + "".join(f"<li>{escape(place)}</li>" for place in report.places[kind])
            + "</ul>"
        )
        parts += [_example(report.tars[shard], row) for shard, row in report.examples.get(kind, ())]
    return "".join(parts)


def _example(tar: Path, row: int) -> str:
    try:
        shard = one_shard(tar)
        return card(f"{tar.name}: {shard.place(row)[1]}", shard.read(row))
    except DataError as error:  # the sample is on the page because something is wrong with it
        return f'<div class="card"><h3>{escape(tar.name)}, row {row}</h3>cannot be shown: {escape(str(error))}</div>\n'


def _prediction(prediction: Prediction) -> str:
    rows = [(label, str(count), bar) for label, count, bar in bars(prediction.lengths)]
    return f"<h2>stage {escape(prediction.stage)}</h2><p>{escape(prediction.summary())}</p>" + table(
        ("tokens", "samples", ""), rows
    )


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of texts, escaped here."""
    lines = ["".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows]
    titles = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    return f"<table><tr>{titles}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def picture(data: bytes) -> str:
    """A picture as an ``img`` with its data inside, made smaller; one that cannot be read says why."""
    try:
        small, (width, height) = small_picture(data)
    except DataError as error:
        return f'<span class="error">[{escape(str(error))}]</span>'
    url = base64.b64encode(small).decode("ascii")
    return f'<img src="data:image/jpeg;base64,{url}" width="{width}" height="{height}" alt="{width} x {height}">'


def small_picture(data: bytes) -> tuple[bytes, tuple[int, int]]:
    """A picture as a JPEG of at most LONGEST pixels a side, and its width and height. Raises DataError."""
    width, height = read_size(data)
    scale = min(1.0, LONGEST / max(width, height))
    size = (max(1, round(height * scale)), max(1, round(width * scale)))
    spec = ImageSpec(size=size, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5), resize="squash", tokens_per_tile=1)
    pixels = spec.prepare(data)[0]  # (3, H, W)
    file = io.BytesIO()
    Image.fromarray(pixels.permute(1, 2, 0).numpy()).save(file, "JPEG", quality=80)
    return file.getvalue(), (size[1], size[0])
