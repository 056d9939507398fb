"""The regions of a report as an SVG picture: a row a regime, a box an op, edges coloured by their layout."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from samoyeds_compile.report.layouts import EdgeReport, LayoutReport, RegimeReport

COLORS = {
    "tokens, token-major": "#4477aa",
    "slots, token-major": "#228833",
    "slots, feature-major": "#cc6677",
}
"""Of layouts; told apart with any kind of colour vision, and named in the legend."""
STEP, BOX, HEIGHT, LEFT, TOP = 150, 104, 34, 170, 84
"""Pixels from op to op, width and height of an op, and the margins."""
ROW = 96
"""Pixels from regime to regime."""


def picture(report: LayoutReport) -> str:
    """One block's regimes as SVG."""
    ops = len(report.regimes[0].edges) - 1 if report.regimes else 0
    width, height = LEFT + ops * STEP + 110, TOP + len(report.regimes) * ROW + 16
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text(16, 24, f"{report.block}: {report.kernel}, {report.constants} costs", size=15),
        *_legend(),
        *(part for number, regime in enumerate(report.regimes) for part in _regime(regime, TOP + number * ROW)),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _legend() -> list[str]:
    parts = []
    for number, (name, color) in enumerate(COLORS.items()):
        x = 16 + 190 * number
        parts += [f'<rect x="{x}" y="40" width="26" height="6" fill="{color}"/>', _text(x + 34, 47, name)]
    return parts


def _regime(regime: RegimeReport, top: int) -> list[str]:
    parts = [_text(16, top + 30, regime.title, size=14), _text(16, top + 48, f"{regime.tokens_text} tokens")]
    for number, edge in enumerate(regime.edges):
        parts += _edge(edge, LEFT + number * STEP - (STEP - BOX), top + 32)
    for number, name in enumerate(_ops(regime.edges)):
        x = LEFT + number * STEP
        parts.append(f'<rect x="{x}" y="{top + 15}" width="{BOX}" height="{HEIGHT}" rx="5" fill="#eee" stroke="#555"/>')
        parts.append(_text(x + BOX // 2, top + 36, name.replace("_", " "), anchor="middle"))
    return parts


def _ops(edges: Sequence[EdgeReport]) -> list[str]:
    """Each op's name, off the edges that leave it."""
    inside = [edge.edge.split(" -> ") for edge in edges if " -> " in edge.edge]
    return [*(first for first, _ in inside), *(last for _, last in inside[-1:])]


def _edge(edge: EdgeReport, x: int, y: int) -> list[str]:
    """A line in the colour of what is written; its second half in that of what is read, where a conversion stands."""
    gap = STEP - BOX
    halves = ((x, edge.layout), (x + gap / 2, edge.read or edge.layout))
    lines = [
        f'<line x1="{start}" y1="{y}" x2="{start + gap / 2}" y2="{y}" stroke="{COLORS[layout]}" stroke-width="6"/>'
        for start, layout in halves
    ]
    tip = f"{edge.edge}: {edge.layout}, {edge.microseconds} us; {_second(edge)}"
    title = f"<g><title>{escape(tip)}</title>{''.join(lines)}</g>"
    margin = [_text(x + gap // 2, y + 34, f"+{edge.margin:.0f} us", "middle", 10)] if edge.runner_up else []
    return [title, *margin]


def _second(edge: EdgeReport) -> str:
    return f"{edge.runner_up} would cost {edge.margin} us more" if edge.runner_up else "no other is possible"


def _text(x: float, y: float, text: str, anchor: str = "start", size: int = 12) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" font-size="{size}" fill="#222">{escape(text)}</text>'
