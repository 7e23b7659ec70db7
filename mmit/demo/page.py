"""What the demo leaves to look at: a grid of scenes with answers as a picture, and one self-contained HTML page."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from PIL import Image, ImageDraw

from mmit.evaluate.accuracy import Asked

TILE = 160
_RIGHT, _WRONG = (20, 120, 50), (180, 30, 30)


@dataclass(frozen=True, kw_only=True)
class Shown:
    """One question with its picture's bytes."""

    asked: Asked
    picture: bytes


@dataclass(frozen=True, kw_only=True)
class Results:
    """Everything that the demo measured.

    accuracy: row name -> question type -> share of right answers. caption_loss: kind of picture -> mean loss in nats.
    curves: stage -> its loss curve as SVG text. facts: name -> sentence, in order. commands: what to type next.
    """

    accuracy: Mapping[str, Mapping[str, float]]
    caption_loss: Mapping[str, float]
    curves: Mapping[str, str]
    facts: Mapping[str, str]
    commands: Sequence[str]
    shown: Sequence[Shown]


def grid(shown: Sequence[Shown], *, columns: int = 6) -> Image.Image:
    """The pictures with question and answer below each; right answers in green, wrong ones in red."""
    rows = -(-len(shown) // columns)
    height = TILE + 44
    sheet = Image.new("RGB", (columns * (TILE + 16) + 16, rows * (height + 12) + 12), "white")
    pen = ImageDraw.Draw(sheet)
    for number, one in enumerate(shown):
        x, y = 16 + (number % columns) * (TILE + 16), 12 + (number // columns) * (height + 12)
        picture = Image.open(io.BytesIO(one.picture)).convert("RGB").resize((TILE, TILE), Image.Resampling.NEAREST)
        sheet.paste(picture, (x, y))
        asked = one.asked
        pen.text((x, y + TILE + 4), asked.question, fill=(40, 40, 40))
        told = asked.answer if asked.is_right else f"{asked.answer}  (right: {asked.expected})"
        pen.text((x, y + TILE + 20), told, fill=_RIGHT if asked.is_right else _WRONG)
    return sheet


def write_page(results: Results, path: Path) -> None:
    """The HTML page: tables, pictures and curves, with nothing outside it."""
    sections = [
        f"<h2>Exact match on held-out pictures</h2>{_accuracy_table(results.accuracy)}",
        f"<h2>Loss of the true caption</h2>{_table(['picture', 'nats'], _loss_rows(results.caption_loss))}",
        "<ul>" + "".join(f"<li><b>{escape(k)}</b>: {escape(v)}</li>" for k, v in results.facts.items()) + "</ul>",
        f"<h2>Answers</h2><div class=grid>{''.join(map(_figure, results.shown))}</div>",
        "<h2>Loss curves</h2>" + "".join(f"<h3>{escape(name)}</h3>{svg}" for name, svg in results.curves.items()),
        "<h2>Next</h2><pre>" + escape("\n".join(results.commands)) + "</pre>",
    ]
    path.write_text(_HEAD + "\n".join(sections) + "</body></html>\n", encoding="utf-8")


_HEAD = """<!doctype html><html lang="en"><meta charset="utf-8"><title>mmit demo</title><style>
body{font:15px/1.5 sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:#222}
table{border-collapse:collapse}td,th{padding:.25em .8em;border-bottom:1px solid #ddd;text-align:right}
td:first-child,th:first-child{text-align:left}.grid{display:flex;flex-wrap:wrap;gap:14px}
figure{margin:0;width:150px;font-size:13px}figure img{width:150px;image-rendering:pixelated}
.right{color:#147832}.wrong{color:#b41e1e}pre{background:#f4f4f4;padding:1em}</style><body>
<h1>Two stages that teach a model to look</h1>
<p>Everything here was made and measured in this run: pictures, encoder, language model, both stages, all answers.</p>
"""


def _accuracy_table(accuracy: Mapping[str, Mapping[str, float]]) -> str:
    kinds = list(next(iter(accuracy.values())))
    rows = [[name, *(f"{scores.get(kind, 0.0):.1%}" for kind in kinds)] for name, scores in accuracy.items()]
    return _table(["", *kinds], rows)


def _loss_rows(losses: Mapping[str, float]) -> list[list[str]]:
    return [[name, f"{loss:.3f}"] for name, loss in losses.items()]


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    def line(cells: Sequence[str], tag: str) -> str:
        return "<tr>" + "".join(f"<{tag}>{escape(cell)}</{tag}>" for cell in cells) + "</tr>"

    return f"<table>{line(head, 'th')}{''.join(line(row, 'td') for row in rows)}</table>"


def _figure(one: Shown) -> str:
    data = base64.b64encode(one.picture).decode()
    asked = one.asked
    kind = "right" if asked.is_right else "wrong"
    told = asked.answer if asked.is_right else f"{asked.answer} (right: {asked.expected})"
    return (
        f'<figure><img alt="" src="data:image/png;base64,{data}"><figcaption>{escape(asked.question)}<br>'
        f'<span class="{kind}">{escape(told)}</span></figcaption></figure>'
    )
