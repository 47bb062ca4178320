"""A bar chart as SVG, without a plotting library: one group a workload, a bar a target."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol
from xml.sax.saxutils import escape

BAR_HEIGHT = 14
GROUP_GAP = 12
LEFT = 230
WIDTH = 560
COLOURS = ("#2b6cb0", "#dd6b20", "#a0aec0", "#38a169", "#805ad5", "#d53f8c", "#718096")


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


def write_chart(path: Path, rows: Sequence[Measured]) -> None:
    """Bars are relative within their group, as the groups differ by orders of magnitude."""
    names = list(dict.fromkeys(row.target for row in rows))
    groups: dict[tuple[str, str, int], list[Measured]] = {}
    for row in rows:
        groups.setdefault((row.workload, row.rw, row.depth), []).append(row)
    y, parts = 40, []
    for i, name in enumerate(names):
        parts.append(
            f'<rect x="{LEFT + i * 170}" y="10" width="12" height="12" fill="{COLOURS[i]}"/>'
        )
        parts.append(f'<text x="{LEFT + 18 + i * 170}" y="20">{escape(name)}</text>')
    for (workload, rw, depth), bars in groups.items():
        most = max(bar.median for bar in bars)
        middle = y + BAR_HEIGHT * len(bars) / 2 + 4
        parts.append(f'<text x="8" y="{middle:.0f}">{workload}, {rw}, depth {depth}</text>')
        for bar in bars:
            width = WIDTH * bar.median / most
            colour = COLOURS[names.index(bar.target)]
            parts.append(
                f'<rect x="{LEFT}" y="{y}" width="{width:.1f}" height="{BAR_HEIGHT - 2}" '
                f'fill="{colour}"/>'
            )
            parts.append(
                f'<text x="{LEFT + width + 6:.1f}" y="{y + 10}">{bar.median / 1000:,.0f}k</text>'
            )
            y += BAR_HEIGHT
        y += GROUP_GAP
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{LEFT + WIDTH + 80}" height="{y + 10}" '
        'font-family="sans-serif" font-size="11"><rect width="100%" height="100%" fill="white"/>'
    )
    path.write_text("\n".join([head, *parts, "</svg>"]) + "\n")
