"""Groups of horizontal bars as SVG text, for a page that shows a table's medians."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from xml.sax.saxutils import escape

COLOURS = ("#08519c", "#6baed6", "#9e9ac8", "#bcbddc", "#fdae6b", "#a1d99b", "#969696")
LABELS, BAR, GAP, TOP = 190, 14, 14, 40


@dataclass(frozen=True, kw_only=True)
class Bars:
    """One group: its title and the value of each of its bars."""

    title: str
    values: Mapping[str, float]


def bar_chart(groups: Sequence[Bars], *, order: Sequence[str], title: str, mark: float, width: int = 760) -> str:
    """Bars side by side, the same colour for the same name, with a line at ``mark``.

    order: names of all bars, which the legend gives too. Names of no group are left out.
    """
    there = [name for name in order if any(name in group.values for group in groups)]
    colours = dict(zip(there, COLOURS, strict=False))
    largest = max((value for group in groups for value in group.values.values()), default=1.0)
    scale = (width - LABELS - 60) / max(largest, mark)
    drawn, y = [], TOP + 18 * -(-len(there) // 3)
    first = y
    for group in groups:
        middle = y + BAR * len(group.values) / 2 + 4
        drawn.append(f'<text x="{LABELS - 8}" y="{middle:.1f}" text-anchor="end">{escape(group.title)}</text>')
        for name in there:
            if name in group.values:
                value, colour = group.values[name], colours[name]
                drawn.append(
                    f'<rect x="{LABELS}" y="{y}" width="{value * scale:.1f}" height="{BAR - 2}" fill="{colour}"/>'
                )
                drawn.append(
                    f'<text x="{LABELS + value * scale + 4:.1f}" y="{y + 10}" font-size="10">{value:.2f}</text>'
                )
                y += BAR
        y += GAP
    x = LABELS + mark * scale
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {y}" width="{width}" height="{y}" '
            'font-family="sans-serif" font-size="12" fill="#333">',
            f'<rect width="{width}" height="{y}" fill="white"/>',
            f'<text x="12" y="20" font-weight="bold">{escape(title)}</text>',
            *_legend(colours),
            *drawn,
            f'<line x1="{x:.1f}" y1="{first - 4}" x2="{x:.1f}" y2="{y - GAP}" stroke="#333" stroke-dasharray="3 3"/>',
            "</svg>\n",
        ]
    )


def _legend(colours: Mapping[str, str]) -> list[str]:
    lines = []
    for place, (name, colour) in enumerate(colours.items()):
        x, y = 12 + 240 * (place % 3), 30 + 18 * (place // 3)
        lines.append(f'<rect x="{x}" y="{y}" width="12" height="12" fill="{colour}"/>')
        lines.append(f'<text x="{x + 18}" y="{y + 10}">{escape(name)}</text>')
    return lines
