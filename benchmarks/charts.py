"""Charts of the figures, as SVG that is readable on light and dark pages."""

from __future__ import annotations

import html
from dataclasses import dataclass

_STYLE = """
  .card { fill: #ffffff; stroke: #e3e6ea }
  text { fill: #1f2933; font: 12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif }
  text { paint-order: stroke; stroke: #ffffff; stroke-width: 3px }
  .title { font-weight: 600; font-size: 13px }
  .faint { fill: #6b7785; font-size: 11px }
  .ours { font-weight: 600 }
  .bar { fill: #b3bdc9 }
  .bar.ours, .dot.ours { fill: #2463c9 }
  .bar.floor { fill: none; stroke: #8793a1; stroke-dasharray: 3 2 }
  .rule { stroke: #d5dae0; stroke-width: 1 }
  .one { stroke: #8793a1; stroke-width: 1; stroke-dasharray: 2 3 }
  .limit { stroke: #c2410c; stroke-width: 1.2; stroke-dasharray: 5 4 }
  .limit-text { fill: #c2410c; font-size: 11px }
  .line { fill: none; stroke-width: 2.2; stroke-linejoin: round; stroke-linecap: round }
  .c0 { stroke: #2463c9 } .f0 { fill: #2463c9 }
  .c1 { stroke: #b45309 } .f1 { fill: #b45309 }
  .c2 { stroke: #0f7b6c } .f2 { fill: #0f7b6c }
  @media (prefers-color-scheme: dark) {
    .card { fill: #15181c; stroke: #2b3138 }
    text { fill: #e4e8ed; stroke: #15181c }
    .faint { fill: #97a3b0 }
    .bar { fill: #56616e }
    .bar.ours { fill: #5b9bff }
    .bar.floor { fill: none; stroke: #8b97a5 }
    .rule { stroke: #2f363e }
    .one { stroke: #8b97a5 }
    .limit { stroke: #fb923c } .limit-text { fill: #fb923c }
    .c0 { stroke: #5b9bff } .f0 { fill: #5b9bff }
    .c1 { stroke: #f5a742 } .f1 { fill: #f5a742 }
    .c2 { stroke: #3fc7ae } .f2 { fill: #3fc7ae }
  }
"""
_WIDTH = 820


@dataclass(frozen=True)
class Bar:
    """A library in a panel; without a value it is only named, with the reason."""

    label: str
    value: float | None
    text: str
    kind: str = ""


@dataclass(frozen=True)
class Panel:
    """One measure: a bar for each library, and where unversioned SQLAlchemy would be."""

    title: str
    unit: str
    bars: list[Bar]
    one: float | None = None


@dataclass(frozen=True)
class Series:
    """A line of a growth chart."""

    label: str
    values: list[float]


def _text(x: float, y: float, content: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{html.escape(content)}</text>'


def _svg(height: float, description: str, parts: list[str]) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {height:.0f}" width="{_WIDTH}" '
        f'height="{height:.0f}" role="img">\n<title>{html.escape(description)}</title>\n<style>{_STYLE}</style>\n'
        f'<rect class="card" x="0.5" y="0.5" width="{_WIDTH - 1}" height="{height - 1:.0f}" rx="8"/>\n'
        + "\n".join(parts)
        + "\n</svg>\n"
    )


def draw_panels(panels: list[Panel], description: str) -> str:
    """Draw the panels side by side in two columns; shorter bars are better."""
    columns, gap, step, names = 2, 24, 19, 158
    width = (_WIDTH - gap * (columns + 1)) / columns
    parts: list[str] = []
    y = 18.0
    for row in range(0, len(panels), columns):
        pair = panels[row : row + columns]
        for column, panel in enumerate(pair):
            x = gap + column * (width + gap)
            parts += _panel(panel, x, y, width, names, step)
        y += 44 + step * max(len(panel.bars) for panel in pair) + 12
    return _svg(y, description, parts)


def _panel(panel: Panel, x: float, y: float, width: float, names: float, step: float) -> list[str]:
    left, room = x + names, width - names - 44
    longest = max([bar.value for bar in panel.bars if bar.value is not None] + [panel.one or 0]) or 1
    bottom = y + 34 + step * len(panel.bars)
    parts = [_text(x, y + 12, panel.title, "title"), _text(x, y + 26, panel.unit, "faint")]
    if panel.one is not None:
        at = left + panel.one / longest * room
        parts.append(f'<line class="one" x1="{at:.1f}" x2="{at:.1f}" y1="{y + 32:.1f}" y2="{bottom:.1f}"/>')
    for number, bar in enumerate(panel.bars):
        top = y + 36 + number * step
        kind = "ours" if bar.kind == "ours" else ""
        parts.append(_text(left - 8, top + 11, bar.label, kind, "end"))
        if bar.value is None:
            parts.append(_text(left + 2, top + 11, bar.text, "faint"))
            continue
        length = max(bar.value / longest * room, 1.5)
        parts.append(
            f'<rect class="bar {bar.kind}" x="{left:.1f}" y="{top + 1:.1f}" width="{length:.1f}" height="13" rx="2"/>'
        )
        parts.append(_text(left + length + 6, top + 11, bar.text, kind))
    return parts


def draw_growth(backends: dict[str, list[Series]], sizes: list[int], limit: float, description: str) -> str:
    """Draw for each backend how cost grows with the size of history, as a ratio to none."""
    gap, top, height = 24, 66, 190
    width = (_WIDTH - gap * (len(backends) + 1)) / len(backends)
    shown = [value for lines in backends.values() for each in lines for value in each.values]
    highest = max(limit * 1.15, max(shown) * 1.08)
    parts: list[str] = []
    for number, (title, lines) in enumerate(backends.items()):
        x = gap + number * (width + gap)
        left, right = x + 34, x + width - 8
        parts.append(_text(x, 28, title, "title"))
        parts.append(_text(x, 44, "cost as a ratio to that beside an empty history", "faint"))

        def at(value: float) -> float:
            return top + height * (1 - value / highest)

        def across(index: int, left: float = left, right: float = right) -> float:
            return left + 18 + (right - left - 36) * index / max(len(sizes) - 1, 1)

        tick = 0.5 if highest <= 4 else round(highest / 4)
        for mark in range(int(highest / tick) + 1):
            level = at(mark * tick)
            parts.append(f'<line class="rule" x1="{left:.1f}" x2="{right:.1f}" y1="{level:.1f}" y2="{level:.1f}"/>')
            parts.append(_text(left - 6, level + 4, f"{mark * tick:g}", "faint", "end"))
        parts.append(
            f'<line class="limit" x1="{left:.1f}" x2="{right:.1f}" y1="{at(limit):.1f}" y2="{at(limit):.1f}"/>'
            + _text(left + 4, at(limit) - 5, f"the most that we allow: {limit:g}", "limit-text")
        )
        for index, size in enumerate(sizes):
            label = f"{size:,}" + (" rows" if index == 0 else "")
            parts.append(_text(across(index), top + height + 18, label, "faint", "middle"))
        for color, line in enumerate(lines):
            points = [(across(index), at(value)) for index, value in enumerate(line.values)]
            path = " ".join(f"{'L' if index else 'M'}{px:.1f} {py:.1f}" for index, (px, py) in enumerate(points))
            parts.append(f'<path class="line c{color}" d="{path}"/>')
            parts += [f'<circle class="f{color}" cx="{px:.1f}" cy="{py:.1f}" r="3.4"/>' for px, py in points]
            legend = top + height + 44 + 18 * color
            parts.append(f'<circle class="f{color}" cx="{left + 4:.1f}" cy="{legend - 4:.1f}" r="4"/>')
            parts.append(_text(left + 14, legend, f"{line.label}: {line.values[-1]:.2f} at the end"))
    return _svg(top + height + 44 + 18 * 3, description, parts)
