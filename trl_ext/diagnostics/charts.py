"""Line charts and a scatter as inline SVG: no script, no network, colours from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 340, 170
LEFT, RIGHT, TOP, BOTTOM = 46, 8, 8, 20
MAX_POINTS = 300


@dataclass(frozen=True)
class Line:
    """A named line; `colour` numbers the style sheet's colours."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    colour: int = 0
    dashed: bool = False


def line_chart(lines: Sequence[Line], caption: str) -> str:
    """Lines over optimizer steps."""
    return _chart(lines, caption, scatter=False)


def scatter(lines: Sequence[Line], caption: str) -> str:
    """The same as points; later points are more opaque."""
    return _chart(lines, caption, scatter=True)


def _chart(lines: Sequence[Line], caption: str, scatter: bool) -> str:
    lines = [Line(line.label, *_thinned(line), line.colour, line.dashed) for line in lines]
    xs = [x for line in lines for x in line.x]
    ys = [y for line in lines for y in line.y]
    if not xs:
        return ""
    (x0, x1), (y0, y1) = _span(xs), _span(ys)

    def at(x: float, y: float) -> tuple[float, float]:
        right, down = (x - x0) / (x1 - x0), (y1 - y) / (y1 - y0)
        return LEFT + right * (WIDTH - LEFT - RIGHT), TOP + down * (HEIGHT - TOP - BOTTOM)

    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(caption)}">',
        *(
            f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{at(x0, y)[1]:.1f}" y2="{at(x0, y)[1]:.1f}"/>'
            f'<text class="tick" x="{LEFT - 4}" y="{at(x0, y)[1] + 3:.1f}" text-anchor="end">{number(y)}</text>'
            for y in (y0, (y0 + y1) / 2, y1)
        ),
        f'<text class="tick" x="{LEFT}" y="{HEIGHT - 6}">{number(x0)}</text>',
        f'<text class="tick" x="{WIDTH - RIGHT}" y="{HEIGHT - 6}" text-anchor="end">{number(x1)}</text>',
    ]
    for line in lines:
        points = [at(x, y) for x, y in zip(line.x, line.y, strict=True)]
        if scatter or len(points) == 1:
            parts += [
                f'<circle class="c{line.colour}" cx="{x:.1f}" cy="{y:.1f}" r="2.5" '
                f'opacity="{0.25 + 0.75 * (i + 1) / len(points):.2f}"/>'
                for i, (x, y) in enumerate(points)
            ]
        else:
            path = " ".join(f"{x:.1f},{y:.1f}" for x, y in points)
            dash = ' stroke-dasharray="4 3"' if line.dashed else ""
            parts.append(f'<polyline class="l{line.colour}" points="{path}"{dash}/>')
    return "".join([*parts, "</svg>"])


def number(value: float) -> str:
    """Three digits, as short as they can be written."""
    return f"{value:.3g}".replace("e+0", "e").replace("e-0", "e-") if math.isfinite(value) else str(value)


def _thinned(line: Line) -> tuple[list[float], list[float]]:
    """Finite points, at most so many; the last one stays."""
    points = [(x, y) for x, y in zip(line.x, line.y, strict=True) if math.isfinite(x) and math.isfinite(y)]
    stride = max(1, math.ceil(len(points) / MAX_POINTS))
    thinned = points[::-1][::stride][::-1]
    return [x for x, _ in thinned], [y for _, y in thinned]


def _span(values: Sequence[float]) -> tuple[float, float]:
    low, high = min(values), max(values)
    if low == high:
        room = abs(low) * 0.1 or 1.0
        return low - room, high + room
    return low, high
