"""Charts as SVG, without a plotting library: bars in groups, and lines side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol
from xml.sax.saxutils import escape

BAR_HEIGHT = 14
GROUP_GAP = 12
LEFT = 230
WIDTH = 560
PANEL_WIDTH = 340
PANEL_HEIGHT = 240
LEGEND_COLUMNS = 4
LEGEND_WIDTH = 170
COLOURS = (
    *("#2b6cb0", "#dd6b20", "#a0aec0", "#38a169", "#805ad5"),
    *("#d53f8c", "#718096", "#319795", "#b7791f", "#4a5568"),
)


class Measured(Protocol):
    """What a bar needs."""

    target: str

    @property
    def workload(self) -> str: ...

    @property
    def rw(self) -> str: ...

    @property
    def depth(self) -> int: ...

    @property
    def median(self) -> float: ...


def _colour(number: int) -> str:
    """Peers may be more than there are colours."""
    return COLOURS[number % len(COLOURS)]


def write_chart(path: Path, rows: Sequence[Measured]) -> None:
    """Bars are relative within their group, as the groups differ by orders of magnitude."""
    names = list(dict.fromkeys(row.target for row in rows))
    groups: dict[tuple[str, str, int], list[Measured]] = {}
    for row in rows:
        groups.setdefault((row.workload, row.rw, row.depth), []).append(row)
    y, parts = 40 + 16 * (len(names) // LEGEND_COLUMNS), []
    for i, name in enumerate(names):
        line, column = divmod(i, LEGEND_COLUMNS)
        x, top = LEFT + column * LEGEND_WIDTH, 10 + 16 * line
        parts.append(f'<rect x="{x}" y="{top}" width="12" height="12" fill="{_colour(i)}"/>')
        parts.append(f'<text x="{x + 18}" y="{top + 10}">{escape(name)}</text>')
    for (workload, rw, depth), bars in groups.items():
        most = max(bar.median for bar in bars)
        middle = y + BAR_HEIGHT * len(bars) / 2 + 4
        parts.append(f'<text x="8" y="{middle:.0f}">{workload}, {rw}, depth {depth}</text>')
        for bar in bars:
            width = WIDTH * bar.median / most
            colour = _colour(names.index(bar.target))
            parts.append(
                f'<rect x="{LEFT}" y="{y}" width="{width:.1f}" height="{BAR_HEIGHT - 2}" '
                f'fill="{colour}"/>'
            )
            parts.append(
                f'<text x="{LEFT + width + 6:.1f}" y="{y + 10}">{bar.median / 1000:,.0f}k</text>'
            )
            y += BAR_HEIGHT
        y += GROUP_GAP
    path.write_text("\n".join([_head(LEFT + WIDTH + 80, y + 10), *parts, "</svg>"]) + "\n")


def _head(width: int, height: int) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" '
        'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>'
    )


@dataclass
class Panel:
    """One diagram of lines over the same numbers."""

    title: str
    series: dict[str, list[tuple[int, float]]]

    def add(self, name: str, x: int, y: float) -> None:
        self.series.setdefault(name, []).append((x, y))


def write_lines(path: Path, x_title: str, panels: Sequence[Panel]) -> None:
    """Panels side by side; the numbers on the x axis are evenly spaced, y starts at zero."""
    xs = sorted({x for panel in panels for line in panel.series.values() for x, _ in line})
    names = list(dict.fromkeys(name for panel in panels for name in panel.series))
    parts = []
    for i, name in enumerate(names):
        left = 20 + i * 190
        parts.append(f'<rect x="{left}" y="10" width="12" height="12" fill="{_colour(i)}"/>')
        parts.append(f'<text x="{left + 18}" y="20">{escape(name)}</text>')
    for number, panel in enumerate(panels):
        parts += _panel(panel, xs, names, 70 + number * (PANEL_WIDTH + 90), x_title)
    width = max(70 + len(panels) * (PANEL_WIDTH + 90), 40 + 190 * len(names))
    path.write_text("\n".join([_head(width, PANEL_HEIGHT + 120), *parts, "</svg>"]) + "\n")


def _panel(
    panel: Panel, xs: Sequence[int], names: Sequence[str], left: int, x_title: str
) -> list[str]:
    top, most = 60, max(y for line in panel.series.values() for _, y in line) or 1.0
    step = PANEL_WIDTH / max(len(xs) - 1, 1)
    bottom = top + PANEL_HEIGHT
    parts = [f'<text x="{left}" y="{top - 12}">{escape(panel.title)}</text>']
    for part in range(5):
        y, value = bottom - PANEL_HEIGHT * part / 4, most * part / 4
        end = left + PANEL_WIDTH
        parts.append(f'<path d="M{left} {y:.1f}H{end}" stroke="#e2e8f0" fill="none"/>')
        parts.append(f'<text x="{left - 6}" y="{y + 4:.1f}" text-anchor="end">{value:,.0f}</text>')
    for i, x in enumerate(xs):
        at = left + i * step
        parts.append(f'<text x="{at:.1f}" y="{bottom + 16}" text-anchor="middle">{x}</text>')
    parts.append(f'<text x="{left}" y="{bottom + 34}">{escape(x_title)}</text>')
    for name, line in panel.series.items():
        colour = _colour(names.index(name))
        points = " ".join(
            f"{left + xs.index(x) * step:.1f},{bottom - PANEL_HEIGHT * y / most:.1f}"
            for x, y in line
        )
        parts.append(f'<polyline points="{points}" stroke="{colour}" fill="none"/>')
    return parts
