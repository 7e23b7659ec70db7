"""Line charts as SVG text: the loss curve beside a running stage, and the curves of a report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from xml.sax.saxutils import escape

Points = Sequence[tuple[int, float]]
"""(step, value), steps ascending."""

COLOURS = ("#08519c", "#d95f02", "#1b9e77", "#7570b3", "#e7298a", "#66a61e", "#a6761d", "#666666")


def line_chart(lines: Mapping[str, Points], *, title: str, width: int = 720, height: int = 320) -> str:
    """A chart of one or more lines over steps, as SVG text; values that are not finite are left out.

    Where there is one line, the thick one is a running mean over a fiftieth of its points. Several have a legend.
    Raises ValueError where no point is left.
    """
    finite = {name: [(step, value) for step, value in points if math.isfinite(value)] for name, points in lines.items()}
    finite = {name: points for name, points in finite.items() if points}
    if not finite:
        raise ValueError(f"{title}: there is nothing to draw")
    left, top, right, bottom = 64, 28, width - 16, height - 36
    steps = [step for points in finite.values() for step, _ in points]
    values = [value for points in finite.values() for _, value in points]
    first, last, low, high = min(steps), max(steps), min(values), max(values)
    span_x, span_y = max(1, last - first), (high - low) or 1.0

    def drawn(points: Points, colour: str, thickness: int) -> str:
        at = " ".join(
            f"{left + (step - first) / span_x * (right - left):.1f},"
            f"{bottom - (value - low) / span_y * (bottom - top):.1f}"
            for step, value in points
        )
        return f'<polyline fill="none" stroke="{colour}" stroke-width="{thickness}" points="{at}"/>'

    grid = []
    for k in range(5):
        y = bottom - (bottom - top) * k / 4
        grid.append(f'<line x1="{left}" y1="{y:.1f}" x2="{right}" y2="{y:.1f}" stroke="#ddd"/>')
        grid.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{low + span_y * k / 4:.3g}</text>')
    if len(finite) == 1:
        (points,) = finite.values()
        shown = [drawn(points, "#9ecae1", 1), drawn(_running_mean(points), COLOURS[0], 2)]
    else:
        shown = [drawn(points, COLOURS[k % len(COLOURS)], 2) for k, points in enumerate(finite.values())]
        shown += _legend(list(finite), right)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
            'font-family="sans-serif" font-size="12" fill="#333">',
            f'<rect width="{width}" height="{height}" fill="white"/>',
            f'<text x="{left}" y="18" font-weight="bold">{escape(title)}</text>',
            *grid,
            f'<text x="{left}" y="{height - 12}">step {first}</text>',
            f'<text x="{right}" y="{height - 12}" text-anchor="end">{last}</text>',
            *shown,
            "</svg>\n",
        ]
    )


def thinned(points: Points, *, most: int = 600) -> list[tuple[int, float]]:
    """The same curve with at most ``most`` points, each the mean of as many neighbours, at the last step of them."""
    size = -(-len(points) // most) or 1
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def _running_mean(points: Points) -> list[tuple[int, float]]:
    window = max(1, len(points) // 50)
    values = [value for _, value in points]
    return [
        (step, sum(values[max(0, i - window + 1) : i + 1]) / min(window, i + 1)) for i, (step, _) in enumerate(points)
    ]


def _legend(names: Sequence[str], right: int) -> list[str]:
    place = f'x="{right}" text-anchor="end"'
    return [
        f'<text {place} y="{18 + 14 * k}" fill="{COLOURS[k % len(COLOURS)]}">{escape(name)}</text>'
        for k, name in enumerate(names)
    ]
